"""Processes as their system sees them from outside."""

import contextlib
import os
import signal
from pathlib import Path


def begun_at(pid: int) -> int:
    """Return when a process began, in ticks since its machine did; 0 if that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return 0


def end(pid: int, begun: int) -> None:
    """Kill a process of this machine, unless its id is another's by now."""
    if pid and begun and begun_at(pid) == begun:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
