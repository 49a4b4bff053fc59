"""Numbers, columns and paragraphs as the commands print them."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any


def number(value: Any) -> str:
    """Write a value for people: floats to six digits, nothing as a dash."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def columns(rows: Sequence[Sequence[str]], *, gap: str = "   ") -> list[str]:
    """Align rows of cells; the last cell of a row is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def wrapped(text: str, *, first: str, indent: int) -> list[str]:
    """Return a paragraph's lines, the first after `first`, the others indented."""
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
    ) or [first.rstrip()]
