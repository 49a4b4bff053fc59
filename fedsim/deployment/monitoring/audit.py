"""What a site's record of instructions says so far (`[site] audit`)."""

import calendar
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.basics.growing import GrowingLines
from fedsim.basics.json_files import JsonLines

_KINDS = ("train", "evaluate", "query")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


class ObservedAudit:
    """A site's record of instructions, read while it grows.

    Attributes:
        file: The record; it is not there before the first instruction.
        instructions: How many were answered or refused, by kind: "train", "evaluate", "query" or
            "other".
        bytes_sent: How much left the site with the replies.
        errors: How many ended in an error.
        last_time: When the last one came, in seconds since 1970.
        is_unreadable: Whether the record cannot be read, or a line is none of its own.

    Args:
        file: The record.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.is_unreadable = file, False
        self._begin()
        self._lines = GrowingLines(file, self._begin, self._take)

    def look(self) -> None:
        """Read what is new."""
        try:
            self._lines.read()
        except OSError:
            self.is_unreadable = True
        else:
            self.is_unreadable = self._broken

    def _begin(self) -> None:
        self.instructions: Counter[str] = Counter()
        self.bytes_sent, self.errors = 0, 0
        self.last_time: int | None = None
        self._broken = False

    def _take(self, line: bytes) -> None:
        try:
            self._count(JsonLines.record(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._broken = True

    def _count(self, record: Mapping[str, Any]) -> None:
        when = calendar.timegm(time.strptime(record["time"], _TIME))
        kind = record["instruction"].partition(".")[0]  # the server's word, which may be any
        sent, error = record["bytes_sent"], record["error"]
        if not isinstance(sent, int) or sent < 0:
            raise ValueError(f"bytes_sent = {sent!r}: must be a whole number")
        self.last_time = when
        self.instructions[kind if kind in _KINDS else "other"] += 1
        self.bytes_sent += sent
        self.errors += error is not None
