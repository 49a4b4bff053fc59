"""Tables that nobody wrote: numbers of some kinds and a class, written down in one of many ways."""

import csv
import io
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

NUMBERS = {
    "reals": lambda draw, n: draw.normal(size=n).round(3),
    "whole": lambda draw, n: draw.integers(-9, 10, n),
    "tiny": lambda draw, n: draw.normal(size=n) * 1e-7,
    "large": lambda draw, n: (draw.normal(size=n) * 1e6).round(1),
    "positive": lambda draw, n: draw.uniform(1, 2, n).round(2),
}
NAMES = ("age", "blood pressure", "größe", "x1", "2020", "dose (mg)", "a.b")
CLASSES = {
    "whole": lambda c: str(c),
    "text": lambda c: f"group {'abc'[c]}",
    "accented": lambda c: "äéø"[c],
}


class Table(NamedTuple):
    """How a table is written.

    Attributes:
        kinds: What its columns of numbers hold, of `NUMBERS`.
        classes: How a class is written, of `CLASSES`.
        target: The place of the column of classes.
        rows: How many there are.
        separator: What stands between values.
        decimal: What stands before a fraction.
        encoding: Of its characters.
        ends: Of its lines.
        quoted: Whether every value stands in quotes.
        seed: Of its numbers.
    """

    kinds: list[str]
    classes: str
    target: int
    rows: int
    separator: str
    decimal: str
    encoding: str
    ends: str
    quoted: bool
    seed: int


TABLES = st.builds(
    Table,
    kinds=st.lists(st.sampled_from(sorted(NUMBERS)), min_size=1, max_size=4),
    classes=st.sampled_from(sorted(CLASSES)),
    target=st.integers(0, 4),
    rows=st.integers(9, 40),
    separator=st.sampled_from([",", ";", "\t", "|"]),
    decimal=st.sampled_from([".", ".", ","]),
    encoding=st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"]),
    ends=st.sampled_from(["\n", "\r\n"]),
    quoted=st.booleans(),
    seed=st.integers(0, 2**20),
)


def written(table):
    """Write a table: (its bytes, the names of its columns, the numbers, the classes)."""
    draw = np.random.default_rng(table.seed)
    columns = [NUMBERS[kind](draw, table.rows) for kind in table.kinds]
    classes = draw.permutation(np.arange(table.rows) % 3)
    place = min(table.target, len(columns))
    names = [*NAMES[: len(columns)]]
    names.insert(place, "label")
    text = io.StringIO()
    quoting = csv.QUOTE_ALL if table.quoted else csv.QUOTE_MINIMAL
    out = csv.writer(text, delimiter=table.separator, quoting=quoting, lineterminator=table.ends)
    out.writerow(names)
    for row, known in enumerate(classes):
        cells = [str(column[row]).replace(".", table.decimal) for column in columns]
        cells.insert(place, CLASSES[table.classes](known))
        out.writerow(cells)
    return text.getvalue().encode(table.encoding), names, np.stack(columns, axis=1), classes
