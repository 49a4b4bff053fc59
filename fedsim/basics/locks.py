"""One process at a time, by a lock file; a lock ends with the process that holds it."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from fedsim.basics.errors import BusyError


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
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BusyError(busy) from None
        yield
