"""First uses that import hundreds of modules, made with the garbage collector off."""

import contextlib
import gc
from collections.abc import Iterator

_loaded: set[str] = set()
_spared = False


@contextlib.contextmanager
def loads(what: str) -> Iterator[None]:
    """Let Python collect no garbage while something is used for the first time in this process.

    Modules are no garbage, and collections among them take a third of the time of their import.

    Args:
        what: What is used, such as "vmap".
    """
    if what in _loaded or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        _loaded.add(what)


def spare_what_is_loaded() -> None:
    """Let collections pass over all that is there now, until this process ends.

    For a process of many short tasks, once its modules are imported and before there is any data.
    """
    global _spared
    gc.freeze()
    _spared = True


def is_spared() -> bool:
    """Return whether collections pass over what was there at some time."""
    return _spared or gc.get_freeze_count() > 0  # to count takes a twentieth of a second
