"""What the names of a table's columns tell of a first line that is no line of names."""

import re
from collections.abc import Sequence

_COMMENT = ("#", "%", "//")
_QUOTES = ("''", "‘’", "“”", "„“", "„”", "«»", "``")
_LIBSVM = re.compile(r"\d+:[^:]*")
_BETWEEN = re.compile(r"(?:[^\w.'\"+-])+")  # what may stand between two names
_NAMELESS = re.compile(r"\s*|Unnamed: \d+")


def headless(names: Sequence[str]) -> str:
    """Return a hint where names of columns look like a row, or like a line not taken apart.

    Example:
        >>> headless(["a:b:label"])
        " (one column: is its separator another? say it in [data] separator, such as ':')"
        >>> headless(["a", "label"])
        ''
    """
    if names and names[0].strip().startswith(_COMMENT):
        return " (is its first line a comment? take it away)"
    if len(names) == 1:
        return _undivided(names[0].strip())
    if names and all(map(_NAMELESS.fullmatch, names)):
        return " (its first line names no column; take lines above the names away)"
    if names and all(each.strip()[:1] + each.strip()[-1:] in _QUOTES for each in names):
        return f' (its names stand in {names[0].strip()[0]}; quote by " or not at all)'
    if len(names) > 1 and all(map(_LIBSVM.fullmatch, names[1:])):
        return " (is it of LIBSVM? scikit-learn's load_svmlight_file reads that, for a loader)"
    if sum(map(_is_number, names)) * 2 <= len(names):
        return ""
    return " (is its first line a row? then write the columns' names above it)"


def _undivided(line: str) -> str:
    """Return the hint for a first line with one name: what may stand between two."""
    found = _BETWEEN.findall(line)
    if not found:
        return ""
    mark = max(found, key=found.count)
    if mark.isspace():
        mark = " " if set(mark) == {" "} else mark
    if len(mark) > 1:
        return (
            f" (one column: is its separator {mark!r}? it must be one character: write a comma or "
            "a tab instead)"
        )
    return f" (one column: is its separator another? say it in [data] separator, such as {mark!r})"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
