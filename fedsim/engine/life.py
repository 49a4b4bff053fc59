"""Signs of life: whether a process does anything at all, as its system sees it from outside.

It need not answer for that, so native code that keeps the interpreter's lock for an hour is alive.
What does nothing is a process that is stopped or frozen, or a machine that is gone. Beside a client
that waits for ever threads of Ray's go on: such a process is asleep, which need not be wrong.
"""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SWITCHES = (b"voluntary_ctxt_switches:", b"nonvoluntary_ctxt_switches:")
_TICKS_PER_S = 100  # of Linux's accounts, on every machine
_ASLEEP_SHARE = 0.02  # of a processor: what threads of Ray's use is far below
_ASLEEP_COUNTS = 0.1


class Life(NamedTuple):
    """What a process has done up to now.

    Attributes:
        begun: When it began, in ticks since its machine did: its id may have been another's before.
        ticks: Processor time that its threads have used.
        switches: How often they have begun or ceased to run.
        wakes: How often its first thread has, which is the one that works.
        waits: Whether that one would run if it were its turn.
        is_alone: Whether it has no processes of its own that may work for it.
    """

    begun: int
    ticks: int
    switches: int
    wakes: int
    waits: bool
    is_alone: bool

    def slept_since(self, before: "Life", seconds: float) -> bool:
        """Whether in so many seconds nothing of it has worked but threads beside the first."""
        used = self.ticks - before.ticks
        is_idle = used <= 1 + _ASLEEP_SHARE * _TICKS_PER_S * seconds
        return self.is_alone and before.is_alone and self.wakes == before.wakes and is_idle


def look(pid: int) -> Life | None:
    """Return what a process has done; None if it has ended or the system does not say."""
    place = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError, ValueError, IndexError):
        state, *fields = place.joinpath("stat").read_bytes().rpartition(b")")[2].split()
        if state in b"ZX":
            return None
        threads = list(place.joinpath("task").iterdir())
        return Life(
            begun=int(fields[18]),
            ticks=int(fields[10]) + int(fields[11]),
            switches=sum(map(_switches, threads)),
            wakes=_switches(place / "task" / str(pid)),
            waits=state == b"R",
            is_alone=not any(map(_has_children, threads)),
        )
    return None


def _switches(thread: Path) -> int:
    with contextlib.suppress(OSError):  # it has just ended
        lines = thread.joinpath("status").read_bytes().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(_SWITCHES))
    return 0


def _has_children(thread: Path) -> bool:
    try:
        return bool(thread.joinpath("children").read_bytes())
    except OSError:  # it has just ended, or the system does not say
        return thread.exists()


def end(pid: int, begun: int) -> None:
    """Kill a process of this machine, unless its id is another's by now."""
    found = look(pid)
    if found is not None and found.begun == begun:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


class WorkerWatch:
    """Looks at the workers of one machine, in a process of its own."""

    def look(self, pids: Sequence[int]) -> dict[int, Life | None]:
        """Return what these processes have done."""
        return {pid: look(pid) for pid in pids}


class Silence:
    """How long a process has given no sign of life.

    It is added up from look to look and is no difference of two times: a driver that was stopped
    itself must not find everybody silent when it goes on.

    Attributes:
        seconds: So long; while it is asleep a tenth of the time counts.
        is_asleep: Whether it was asleep when it was looked at last, rather than stopped.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.is_asleep = False
        self._last: Life | None = None

    def looked(self, life: Life | None, elapsed_s: float) -> None:
        """Note what was seen, so many seconds after the last look.

        Args:
            life: None is no news: whether a process has ended is not told by this.
            elapsed_s: What counts as silence if nothing has happened since.
        """
        last, self._last = self._last, life
        self.is_asleep = False
        if life is None or last is None or life.waits:
            self.seconds = 0.0
        elif life == last:
            self.seconds += elapsed_s
        elif life.slept_since(last, elapsed_s):
            self.is_asleep = True
            self.seconds += _ASLEEP_COUNTS * elapsed_s
        else:
            self.seconds = 0.0

    def unanswered(self, elapsed_s: float) -> None:
        """Note that nobody has answered who was asked."""
        self.is_asleep = False
        self.seconds += elapsed_s
