"""First uses that import hundreds of modules, made with the garbage collector off."""

import contextlib
import gc
from collections.abc import Iterator

_loaded: set[str] = set()


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
