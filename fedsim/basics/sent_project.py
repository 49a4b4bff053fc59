"""A project on its way to another process."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.basics.project import enter


class SentProject:
    """A project that goes to another process: unpickled there, it opens the same folders.

    Args:
        folders: Its folders; None where nothing is named by import path.
        main: What of `__main__` is named, by name: it travels by value.
    """

    def __init__(self, folders: Sequence[str] | None, main: Mapping[str, Any]) -> None:
        self._folders, self._main = folders, dict(main)

    def open(self) -> None:
        """Let its modules be found, and no other project's."""
        if self._folders is not None:
            enter(self._folders)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self._folders, self._main)


def _arrive(folders: Sequence[str] | None, main: Mapping[str, Any]) -> SentProject:
    arrived = SentProject(folders, main)
    arrived.open()
    for name, value in main.items():
        setattr(sys.modules["__main__"], name, value)
    return arrived
