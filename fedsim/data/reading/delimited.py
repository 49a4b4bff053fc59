"""How tables of text are written: what separates their columns, decimals, encoding.

What a scenario leaves open is found in the first lines of every file. What these lines do not show,
or show two ways, is asked about.
"""

import codecs
import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedsim.basics.errors import ScenarioError, SchemaError
from fedsim.basics.text import twice_in
from fedsim.data.reading.headers import headless

_HEAD = 1 << 16  # bytes that are looked at
_FEWEST_LINES = 2
_SEPARATORS = (",", ";", "\t", "|")
_NAMES = {",": "','", ";": "';'", "\t": "'\\t'", "|": "'|'", " ": "' '"}
_BYTE_ORDER_MARKS = (
    ("utf-8", codecs.BOM_UTF8),
    ("utf-32", codecs.BOM_UTF32_LE),
    ("utf-32", codecs.BOM_UTF32_BE),
    ("utf-16", b"\xff\xfe"),
    ("utf-16", b"\xfe\xff"),
)
_COMMA = re.compile(r"\s*[+-]?\d+,\d+([eE][+-]?\d+)?\s*")
_POINT = re.compile(r"\s*[+-]?\d*\.\d+([eE][+-]?\d+)?\s*")
_THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2}(,\d{3})+\s*")

_RULE = re.compile(r"[|\s:-]*-[|\s:-]*")  # below the names of a table of Markdown

Decimal = Literal[".", ","]


@dataclass(frozen=True)
class Dialect:
    """How a table of text is written; None finds it.

    Attributes:
        separator: What stands between two values; " " for any number of blanks.
        decimal: What stands before the fraction of a number.
        encoding: How its characters are encoded, as Python names it.
        blanks: Whether a blank follows every separator and belongs to it.
    """

    separator: str | None = None
    decimal: Decimal | None = None
    encoding: str | None = None
    blanks: bool = False

    def __post_init__(self) -> None:
        if self.separator is not None and len(self.separator) != 1:
            raise ScenarioError(
                f"[data] separator = {self.separator!r}: must be one character, such as ';', or "
                "' ' for any number of blanks"
            )
        if self.separator is not None and (self.separator.isalnum() or self.separator in '."\r\n'):
            raise ScenarioError(
                f"[data] separator = {self.separator!r}: is what values themselves hold; it is "
                "what stands between two of them, such as ';'"
            )
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError:
            raise ScenarioError(
                f"[data] encoding = '{self.encoding}': is none that Python knows; such as 'utf-8', "
                "'cp1252' (Windows), 'latin-1', 'utf-16'"
            ) from None

    @property
    def options(self) -> dict[str, Any]:
        """What pandas calls it."""
        return {
            "sep": r"\s+" if self.separator == " " else self.separator,
            "decimal": self.decimal,
            "encoding": self.encoding,
            "skipinitialspace": self.blanks,
        }


ANY_DIALECT = Dialect()


class _Head(NamedTuple):
    """The first rows of a file: its name, the header, the rows, and how it is written."""

    name: str
    header: list[str]
    rows: list[list[str]]
    dialect: Dialect


def find_dialect(
    files: Sequence[tuple[str, Path]], default: str, given: Dialect
) -> tuple[Dialect, list[str]]:
    """Find how some files are written, and say what the scenario does not.

    Args:
        files: The files, and what messages call them.
        default: The separator that goes with their ending; is taken without a word.
        given: What the scenario says.

    Raises:
        ScenarioError: Naming the file that is not text, that can be read in two ways, or that is
            written otherwise than the first one.
    """
    heads = [_head(name, file, default, given) for name, file in files]
    first = heads[0]
    decimals = [head for head in heads if head.dialect.decimal is not None]
    dialect = replace(first.dialect, decimal=decimals[0].dialect.decimal if decimals else ".")
    for head in heads:
        here = replace(head.dialect, decimal=head.dialect.decimal or dialect.decimal)
        for key, then, now in (
            ("separator", dialect.separator, here.separator),
            ("decimal", dialect.decimal, here.decimal),
            ("encoding", dialect.encoding, here.encoding),
        ):
            if then != now:
                before = decimals[0] if key == "decimal" else first
                raise ScenarioError(
                    f"{head.name} has the {key} {now!r} and {before.name} {then!r}; write them "
                    "alike"
                )
    found = []
    if given.separator is None and dialect.separator != default:
        found.append(f"separator {_NAMES.get(str(dialect.separator))}")
    if given.decimal is None and dialect.decimal != ".":
        found.append(f"decimal '{dialect.decimal}'")
    if given.encoding is None and dialect.encoding != "utf-8":
        found.append(f"encoding '{dialect.encoding}'")
    said = [f"[data] {first.name} is read with {', '.join(found)}, as it seems to be written"]
    return dialect, said if found else []


def not_utf8(name: str, byte: int | None = None, encoding: str = "utf-8") -> str:
    """Say that a file is no UTF-8, or no text in what the scenario says, and what to do."""
    place = "" if byte is None else f" (byte {byte})"
    return (
        f"{name} is no text in {encoding.upper()}{place}; say how it is encoded, such as [data] "
        "encoding = 'cp1252' (Windows, western Europe) or 'latin-1', or save it as UTF-8"
    )


def _head(name: str, file: Path, default: str, given: Dialect) -> _Head:
    with file.open("rb") as content:
        head = content.read(_HEAD)
        whole = not content.read(1)
    encoding = given.encoding or next(
        (known for known, mark in _BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8"
    )
    if not whole:  # up to a line's end, which no character is torn by
        head = head[: head.rfind(b"\n") + 1] or head
    wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    if wide and b"\0" not in head:  # every line's end has one
        raise ScenarioError(not_utf8(name, encoding=encoding))
    if b"\0" in head and not wide:
        raise ScenarioError(
            f"{name} is no text, or text in UTF-16; if so say [data] encoding = 'utf-16-le'"
        )
    try:
        text = head.decode(encoding, errors="strict" if whole else "ignore").lstrip("\ufeff")
        if not whole and codecs.lookup(encoding).name == "utf-8":
            head.decode()
    except UnicodeDecodeError as error:
        raise ScenarioError(not_utf8(name, error.start, encoding)) from None
    lines = [line for line in re.split("\r\n|\r|\n", text) if line.strip()]
    if not whole and len(lines) > _FEWEST_LINES:
        lines = lines[:-1]  # may end within a quoted value
    if not lines:
        raise ScenarioError(f"{name} is empty")
    if "|" in lines[0] and len(lines) > 1 and _RULE.fullmatch(lines[1]):
        raise ScenarioError(f"{name} is a table of Markdown; save it as CSV")
    separator = given.separator or _separator(name, lines, default)
    header, *rows = _split(lines, separator)
    blanks = len(header) > 1 and all(value.startswith(" ") for value in header[1:])
    _check(name, header, rows, separator)
    cells = [cell for row in rows for cell in row]
    decimal = given.decimal or _decimal(name, cells)
    return _Head(name, header, rows, Dialect(separator, decimal, encoding, blanks))


def _split(lines: Sequence[str], separator: str) -> list[list[str]]:
    if separator == " ":
        return [line.split() for line in lines]
    return list(csv.reader(lines, delimiter=separator))


def _separator(name: str, lines: Sequence[str], default: str) -> str:
    """Return what divides every line into as many values as the header, more than one."""
    widths = {each: [len(row) for row in _split(lines, each)] for each in (*_SEPARATORS, " ")}
    even = [each for each in _SEPARATORS if widths[each][0] > 1 and len({*widths[each]}) == 1]
    if len(even) > 1:
        named = " or ".join(_NAMES[each] for each in even)
        raise ScenarioError(f"{name} may be separated by {named}; say it in [data] separator")
    if even:
        return even[0]
    if widths[default][0] > 1:
        return default  # a row that is longer or shorter is named when it is read
    in_header = [each for each in _SEPARATORS if widths[each][0] > 1]
    if in_header:
        return max(in_header, key=lambda each: widths[each][0])
    return " " if widths[" "][0] > 1 and len({*widths[" "]}) == 1 else default


def _check(name: str, header: Sequence[str], rows: Sequence[Sequence[str]], separator: str) -> None:
    """Refuse what a reader would make something else of than is there."""
    names = [each.strip() for each in header]
    if (twice := twice_in(filter(None, names))) is not None:
        raise ScenarioError(
            f"{name} has two columns '{twice}'{headless(names)}; give each a name of its own"
        )
    if not rows:
        raise SchemaError(f"{name} has no row below its first line")
    for number, row in enumerate(rows):
        if len(row) > len(header):
            mark = _NAMES.get(separator, repr(separator))
            if not any(row[len(header) :]):
                raise ScenarioError(
                    f"{name}: row {number} ends in a {mark} and the first line does not; take "
                    "them away at the lines' ends"
                )
            raise ScenarioError(
                f"{name}: its first line has {len(header)} of the names and row {number} has "
                f"{len(row)} values{headless(names) if len(names) == 1 else ''}; name every column "
                "(R leaves out that of row names), take "
                f"lines above the names away, and quote values that hold a {mark}, such as "
                "decimal commas"
            )


def _decimal(name: str, cells: Sequence[str]) -> Decimal | None:
    """Return what stands before fractions; None where no number has one."""
    commas = [cell for cell in cells if _COMMA.fullmatch(cell)]
    if any(_POINT.fullmatch(cell) for cell in cells):
        return "."
    if not commas:
        return None
    if all(_THOUSANDS.fullmatch(cell) for cell in commas):
        shown = commas[0].strip()
        raise ScenarioError(
            f"{name} holds {shown}, which may be {shown.replace(',', '.', 1)} or "
            f"{shown.replace(',', '')}; say [data] decimal = ',' for the first, or write it "
            "without the comma"
        )
    return ","
