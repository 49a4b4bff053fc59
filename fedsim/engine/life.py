"""Signs of life: whether a process does anything at all, as its system sees it from outside.

It need not answer for that, so native code that keeps the interpreter's lock for an hour is as
alive as a client that sleeps: threads of Ray's wake up many times a second beside both. What does
nothing is a process that is stopped or frozen, or a machine that is gone.
"""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SWITCHES = (b"voluntary_ctxt_switches:", b"nonvoluntary_ctxt_switches:")


class Life(NamedTuple):
    """What a process has done up to now.

    Attributes:
        begun: When it began, in ticks since its machine did: its id may have been another's before.
        ticks: Processor time that its threads have used.
        switches: How often they have begun or ceased to run.
        waits: Whether it would run if it were its turn.
    """

    begun: int
    ticks: int
    switches: int
    waits: bool


def look(pid: int) -> Life | None:
    """Return what a process has done; None if it has ended or the system does not say."""
    place = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError, ValueError, IndexError):
        state, *fields = place.joinpath("stat").read_bytes().rpartition(b")")[2].split()
        if state in b"ZX":
            return None
        switches = sum(_switches(thread) for thread in place.joinpath("task").iterdir())
        return Life(int(fields[18]), int(fields[10]) + int(fields[11]), switches, state == b"R")
    return None


def _switches(thread: Path) -> int:
    with contextlib.suppress(OSError):  # it has just ended
        lines = thread.joinpath("status").read_bytes().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(_SWITCHES))
    return 0


def end(pid: int, begun: int) -> None:
    """Kill a process of this machine, unless its id is another's by now."""
    found = look(pid)
    if found is not None and found.begun == begun:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


class Watch:
    """Looks at the workers of one machine, in a process of its own."""

    def look(self, pids: Sequence[int]) -> dict[int, Life | None]:
        """Return what these processes have done."""
        return {pid: look(pid) for pid in pids}


class Silence:
    """How long a process has given no sign of life.

    It is added up from look to look and is no difference of two times: a driver that was stopped
    itself must not find everybody silent when it goes on.

    Attributes:
        seconds: So long.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: Life | None = None

    def looked(self, life: Life | None, elapsed_s: float) -> None:
        """Note what was seen, so many seconds after the last look.

        Args:
            life: None is no news: whether a process has ended is not told by this.
            elapsed_s: What counts as silence if nothing has happened since.
        """
        stands_still = life is not None and not life.waits and life == self._last
        self.seconds = self.seconds + elapsed_s if stands_still else 0.0
        self._last = life

    def unanswered(self, elapsed_s: float) -> None:
        """Note that nobody has answered who was asked."""
        self.seconds += elapsed_s
