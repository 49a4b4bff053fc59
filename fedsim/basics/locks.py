"""One process at a time, by a lock file; a lock ends with the process that holds it."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fedsim.basics.errors import BusyError

_LOOKED_AT_S = 0.25  # far longer than `is_held` takes


@contextlib.contextmanager
def one_at_a_time(
    file: Path, *, making: contextlib.AbstractContextManager[None], busy: str | None = None
) -> Iterator[None]:
    """Hold a lock inside of the context.

    Args:
        file: The lock file; it is made when missing and stays.
        making: Entered while the file is made, to say it when that fails.
        busy: What a second process is told; None lets it wait for the first.

    Raises:
        BusyError: If another process holds the lock and this one is not to wait.
    """
    with making:
        lock = file.open("w")
    with lock:
        if busy is None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        else:
            _take_at_once(lock, busy)
        yield


def is_held(file: Path) -> bool:
    """Return whether a process holds a lock, in whichever container.

    Nobody's lock is held for that moment by this process, shared; `one_at_a_time` waits it out.

    Raises:
        OSError: If the file is not there, or cannot be opened.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take_at_once(lock: IO[str], busy: str) -> None:
    """Take a lock that nobody but a passing look may hold."""
    until = time.monotonic() + _LOOKED_AT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > until:
                raise BusyError(busy) from None
            time.sleep(0.01)
