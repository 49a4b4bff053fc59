"""Files that are there whole or not at all: JSON, lines of JSON, and what a full disk does."""

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsim.basics.errors import CheckpointError, RunError

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@contextlib.contextmanager
def taking(path: Path) -> Iterator[None]:
    """Name the file of a run that is written inside when the disk does not take it.

    Raises:
        RunError: For any error of the operating system's.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; make room and `fedsim resume` "
            "the run, nothing is lost up to its last checkpoint"
        ) from error


class JsonLines:
    """A file of JSON records, one per line, which grows by whole lines.

    A record goes to the operating system in one write, so that a killed process leaves whole lines
    and at most one torn one, which has no line end. Floats keep every bit; what JSON cannot write
    (nan and the infinities) becomes the strings "nan", "inf" and "-inf", and `read` gives floats
    back for them.

    Args:
        path: The file; it is made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with taking(path):
            self._file = path.open("ab", buffering=0)

    @property
    def offset(self) -> int:
        """The file's length in bytes, where the next record will begin."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record.

        Raises:
            RunError: If the disk does not take it whole; nothing of it is left in the file then.
        """
        self.extend([record])

    def extend(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write some records at once.

        Raises:
            RunError: If the disk does not take them whole; nothing is left in the file then.
        """
        if not records:
            return
        lines = "".join([_encode(record, indent=None) + "\n" for record in records]).encode()
        before = self.offset
        with taking(self._path):
            if self._file.write(lines) != len(lines):
                self._file.truncate(before)
                raise OSError(errno.ENOSPC, "the disk took only a part of a record")

    def sync(self) -> None:
        """Wait until what was written is on the disk, so that a checkpoint may count on it."""
        with taking(self._path):
            os.fsync(self._file.fileno())

    def truncate(self, offset: int | None = None) -> None:
        """Forget the records from `offset` on, a torn last line included.

        Args:
            offset: Where the first forgotten record begins; None forgets only a torn last line.

        Raises:
            CheckpointError: If the file is shorter than that, or no record begins there.
        """
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1 if offset is None else offset
        if end > len(data):
            raise CheckpointError(
                f"{self._path.name} has {len(data)} bytes where the checkpoint counted {end}: "
                "records are lost, so the run cannot go on from there; start it anew"
            )
        if end and data[end - 1 : end] != b"\n":
            raise CheckpointError(
                f"{self._path.name}: no record begins at byte {end}, where the checkpoint says so: "
                "the file was changed since; start the run anew"
            )
        self._file.truncate(end)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return a file's records; a torn last line is left out.

        Raises:
            RunError: If a whole line is not JSON; the message names the line.
        """
        records = []
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                records.append(JsonLines.record(line))
            except ValueError as error:
                raise RunError(f"{path}: line {number} is not JSON: {error}") from None
        return records

    @staticmethod
    def record(line: bytes) -> Any:
        """Return what a whole line holds, floats in place of what JSON cannot write.

        Raises:
            ValueError: If it is not JSON.
        """
        return _decode(json.loads(line))


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole, or the old one still is, whatever happens.

    Non-finite floats are written as `JsonLines` writes them.
    """
    write_text_atomic(path, _encode(value, indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file so that it is there whole, or the old one still is, whatever happens."""
    making = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with making.open("xb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        making.replace(path)
    finally:
        making.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Read a file that `write_json_atomic` wrote.

    Raises:
        RunError: If it is missing or not JSON.
    """
    return _decode(read_plain(path))


def read_plain(path: Path) -> Any:
    """Read a JSON file as it stands.

    Raises:
        RunError: If it is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path}: is not JSON: {error}") from None


def to_json(value: Any) -> str:
    """Return a value as readable JSON, non-finite floats as strings."""
    return _encode(value, indent=2)


def _encode(value: Any, *, indent: int | None) -> str:
    try:  # almost everything is plain as it is
        return json.dumps(
            value, indent=indent, allow_nan=False, ensure_ascii=False, default=_not_plain
        )
    except (TypeError, ValueError):
        return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _not_plain(value: Any) -> Any:
    """Refuse what only `_plain` makes JSON of."""
    raise TypeError(type(value).__name__)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numpy's scalars as Python's, non-finite floats as strings."""
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def sync_folder(path: Path) -> None:
    """Let the disk have what was made, renamed or removed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
