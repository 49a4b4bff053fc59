"""Files that another process is writing, read while they grow."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

_LONGEST = 64 * 2**20  # bytes of a line
_KNOWN_BY = 256  # bytes that tell whether the file is still the same up to there


class GrowingLines:
    r"""The lines of a file that another process writes, each told once, when it is whole.

    A file that was cut back, replaced or written anew is told from its beginning again.

    Args:
        path: The file; it need not be there yet.
        begin: Called when the file is read from its beginning, so that what was counted is
            forgotten.
        take: Called with every whole line, without its end.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "log"
        >>> _ = file.write_text("one\ntw")
        >>> seen = []
        >>> lines = GrowingLines(file, seen.clear, seen.append)
        >>> lines.read()
        >>> seen
        [b'one']
        >>> _ = file.write_text("one\ntwo\n")
        >>> lines.read()
        >>> seen
        [b'one', b'two']
    """

    def __init__(
        self, path: Path, begin: Callable[[], None], take: Callable[[bytes], None]
    ) -> None:
        self._path, self._begin, self._take = path, begin, take
        self._inode: int | None = None
        self._offset = 0
        self._last = b""  # what stands before the offset

    def read(self) -> None:
        """Tell what has come since the last time; a file that is not there has nothing.

        Raises:
            OSError: If the file cannot be read.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            if self._inode is not None:
                self._anew(None)
            return
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise OSError(f"{self._path}: is no plain file")
            file.seek(max(0, self._offset - len(self._last)))
            if about.st_ino != self._inode or file.read(len(self._last)) != self._last:
                self._anew(about.st_ino)
                file.seek(0)
            while (line := file.readline(_LONGEST)).endswith(b"\n"):
                self._offset, self._last = self._offset + len(line), line[-_KNOWN_BY:]
                self._take(line[:-1])
            if len(line) == _LONGEST:
                raise OSError(f"{self._path}: a line is longer than {_LONGEST} bytes")

    def _anew(self, inode: int | None) -> None:
        self._inode, self._offset, self._last = inode, 0, b""
        self._begin()
