"""One project's code at a time: a process has one `sys.modules`, whatever its threads run."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

from fedsim.basics.errors import ScenarioError


class _Running:
    """The folders whose code runs, by thread; a forked process begins anew."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Forget who runs what."""
        self.lock = threading.RLock()
        self.folders: dict[int, tuple[str, ...]] = {}


_running = _Running()
os.register_at_fork(after_in_child=_running.renew)


@contextlib.contextmanager
def running(folders: Sequence[str]) -> Iterator[None]:
    """Keep other threads from opening another project meanwhile.

    Args:
        folders: The project's; with none there is nothing to keep.

    Raises:
        ScenarioError: If another thread runs code of another project.
    """
    me, wanted = threading.get_ident(), real(folders)
    if not wanted:
        yield
        return
    with _running.lock:
        require_free(wanted)
        before = _running.folders.get(me)
        _running.folders[me] = wanted
    try:
        yield
    finally:
        with _running.lock:
            del _running.folders[me]
            if before is not None:
                _running.folders[me] = before


def others_run(wanted: Sequence[str]) -> tuple[str, ...] | None:
    """Return the folders of another project whose code another thread runs, or None."""
    me = threading.get_ident()
    with _running.lock:
        found = [each for thread, each in _running.folders.items() if thread != me]
    return next((each for each in found if each != tuple(wanted)), None)


def require_free(wanted: Sequence[str]) -> None:
    """Refuse to open a project while another thread runs code of another one.

    Raises:
        ScenarioError: Naming both.
    """
    other = others_run(wanted)
    if other is not None:
        raise ScenarioError(
            f"modules = '{os.pathsep.join(wanted)}': another thread of this process runs code of "
            f"{os.pathsep.join(other)}, and a process imports one project at a time; run one after "
            "the other, or each in a process of its own"
        )


def real(folders: Sequence[str]) -> tuple[str, ...]:
    """Return folders without symbolic links, each once."""
    return tuple(dict.fromkeys(os.path.realpath(folder) for folder in folders))
