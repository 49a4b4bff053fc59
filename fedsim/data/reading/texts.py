"""Texts where numbers should be: the first one of a column, and what to do about it."""

import re
import unicodedata
from collections.abc import Mapping

from fedsim.basics.errors import ScenarioError
from fedsim.data.reading.origins import Split

_DIGITS = r"\s*[+-]?(\d+({0}\d*)?|{0}\d+)([eE][+-]?\d+)?\s*"
_NUMBER = {mark: re.compile(_DIGITS.format(re.escape(mark)), re.ASCII) for mark in ".,"}
_WORDS = ("inf", "infinity", "nan")
_GROUPED = re.compile(
    r"[+-]?[1-9]\d{0,2}([_ '’.,\u00a0\u2009\u202f])\d{3}(\1\d{3})*([.,]\d+)?", re.ASCII
)
_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?", re.ASCII)
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([T ].*)?|\d{1,2}:\d{2}(:\d{2}.*)?", re.ASCII)
_UNIT = re.compile(r"[$€£¥]?\s*[+-]?[\d.,]+\s*([%‰$€£¥]|[^\W\d_]{1,3})?", re.ASCII)
_TRUTH = {"yes", "no", "true", "false", "y", "n", "t", "f", "on", "off"}
_NOTHING = re.compile(r"[?.\-–—*]+|missing|unknown|#[A-Z0-9/]+[!?]?|n\.?[ad]\.?", re.IGNORECASE)


def first_text(splits: Mapping[str, Split], column: str) -> str:
    """Say which value of a column of text is the first that is no number, and what to do.

    Args:
        splits: The data set's splits.
        column: The column.

    Returns:
        The end of a message: the value's place and a remedy.
    """
    decimal = next((split.text.decimal for split in splits.values() if split.text), ".")
    some = ""
    for split in splits.values():
        for row, value in enumerate(split.rows[column]):
            if not isinstance(value, str):
                continue
            if not is_number(value, decimal):
                return f"{split.place(row)} is {value!r:.60}; {remedy(value, decimal, column)}"
            some = some or value
    if not some:
        return "it holds no value; correct it"
    if any(split.text for split in splits.values()):
        return f"its numbers are too long, such as {some!r:.60}; write them with fewer digits"
    return f"its numbers are written as text, such as {some!r:.60}; write them as numbers"


def is_number(text: str, decimal: str = ".") -> bool:
    """Tell whether a text is a number as files have them.

    Example:
        >>> is_number("1.5e3"), is_number("1_000"), is_number("1,5", ",")
        (True, False, True)
    """
    plain = text.strip().lstrip("+-").lower()
    return _NUMBER[decimal].fullmatch(text) is not None or plain in _WORDS


def require_one_spelling(splits: Mapping[str, Split], column: str, what: str) -> None:
    """Refuse names that differ in a file and are one number when it is read, such as 0 and 00.

    Names that pandas writes otherwise where the column has a hole are one: 7 and 7.0.

    Args:
        splits: Those that are looked at; of tables of text, for others know numbers from text.
        column: The column of names.
        what: What they name, such as "owners".

    Raises:
        ScenarioError: Naming two of them.
    """
    spellings: dict[object, str] = {}
    for split in splits.values():
        if split.text is None or column not in split.rows.column_names:
            continue
        type_ = str(getattr(split.rows.features[column], "dtype", ""))
        if not type_.startswith(("int", "uint", "float")):
            continue
        for block in split.text.column(column):
            for text in dict.fromkeys(block):
                plain = _plain(text, split.text.decimal)
                number = _number(plain, type_.startswith("float"))
                if spellings.setdefault(number, plain) != plain:
                    raise ScenarioError(
                        f"column '{column}': {what} '{spellings[number]}' and '{plain}' are the "
                        "same number; write them alike if they are one, and with a letter if "
                        f"they are two (such as c{spellings[number]} and c{plain})"
                    )


def _plain(text: str, decimal: str) -> str:
    return re.sub(rf"{re.escape(decimal)}0*$", "", text.strip().removeprefix("+"))


def _number(plain: str, fractions: bool) -> object:
    try:
        return float(plain.replace(",", ".")) if fractions else int(plain)
    except ValueError:  # such as a hole, or a mark that pandas takes out
        return plain


def remedy(value: str, decimal: str, column: str) -> str:
    """Return what to do about a text that is no number.

    Args:
        value: The text.
        decimal: What stands before the fraction of a number.
        column: What its column is called.
    """
    text = value.strip()
    if text == column:
        return "take lines away that name the columns once more"
    if text.startswith(("# ", "%", "//")):
        return "take comments away"
    if decimal == "." and _COMMA.fullmatch(text):
        return "say [data] decimal = ',' if that is one, correct it"
    if grouped := _GROUPED.fullmatch(text):
        return f"write it without marks between its digits ({text.replace(grouped[1], '')})"
    if decimal == "," and is_number(text):
        return "say [data] decimal = '.' if that is one"
    if text.lower() in _TRUTH:
        return "write 1 and 0"
    if _NOTHING.fullmatch(text):
        return "if it stands for a missing value, put a number there or take its row out"
    if _DATE.fullmatch(text):
        return "make numbers of dates and times, such as days since the first"
    if text.startswith(("[", "(", "{")):
        return "write each number of a list in a column of its own"
    if text.startswith("="):
        return "save the value in place of the formula"
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    if plain != text and is_number(plain, decimal):
        return f"write it as {plain}, in the common signs"
    if _UNIT.fullmatch(text):
        return "write the number alone, without a unit"
    return "correct it"
