"""What other libraries say of files that they cannot read together, in our words."""

import re
from pathlib import PurePath

from fedsim.data.reading.chosen import listed
from fedsim.data.reading.headers import headless

_OTHER = re.compile(r"must have the same columns")
_CAST = re.compile(r"Couldn't cast (.*?) (?:-- schema .*)?to \{(.*)\} because column names don't")
_FILE = re.compile(r"generating data using ([^,\[]*), \[")
_LONG = re.compile(r"Expected (\d+) fields in line (\d+), saw (\d+)")
_OPEN = re.compile(r"EOF inside string starting at row (\d+)")


def in_our_words(cause: str) -> str:
    """Say in a line why files cannot be read; as it is where that is not known.

    Example:
        >>> in_our_words("Error tokenizing data. C error: Expected 3 fields in line 9, saw 4")
        'line 9 has 4 values, and those before it 3'
    """
    if found := _LONG.search(cause):
        expected, line, seen = found.groups()
        return f"line {line} has {seen} values, and those before it {expected}"
    if found := _OPEN.search(cause):
        return f"a quotation mark in line {int(found[1]) + 1} is never closed"
    if found := _CAST.search(cause):
        here, there = re.findall(r"(\S[^:]*): \w+", found[1]), re.findall(r"'([^']*)':", found[2])
        return (
            f"one has the columns {listed(here, 5)} and those before it {listed(there, 5)}"
            f"{headless(here)}; name columns alike in all files, or take the file out"
        )
    if not _OTHER.search(cause):
        return cause
    new, gone = _named("new", cause), _named("missing", cause)
    file = PurePath(found[1]).name if (found := _FILE.search(cause)) else "one of them"
    other = f"{file} has the columns {listed(new, 5)}, which the files before it have not"
    if gone:
        other += f", and not their {listed(gone, 5)}"
    return f"{other}{headless(new) or headless(gone)}; name columns alike in all files"


def _named(which: str, cause: str) -> list[str]:
    found = re.search(rf"{which} columns \(\{{(.*?)\}}\)", cause)
    return sorted(re.findall(r"'([^']*)'", found[1])) if found else []
