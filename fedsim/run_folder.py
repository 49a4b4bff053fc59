"""The run folder: where a run writes down what it was, what it did and what came out.

A folder appears whole or not at all: it is made under a temporary name and renamed. Files that grow
(`JsonLines`) know their length in bytes, which a checkpoint stores and a resumed run cuts back to.
A run folder says which kind of processor computed; nothing in it names the machine or its user.
"""

import contextlib
import errno
import functools
import json
import logging
import math
import os
import platform
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import fedsim
from fedsim.basics.home import home
from fedsim.errors import CheckpointError, RunError, ScenarioError, nearest

if TYPE_CHECKING:
    from fedsim.scenario import Scenario

SCENARIO_FILE = "scenario.json"
VERSIONS_FILE = "versions.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LOG_FILE = "log.txt"

_FOLDER = "fedsim_run_folder"  # the attribute of an exception that says which run it ended
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_logger = logging.getLogger("fedsim")


class RunFolder(NamedTuple):
    """A run's folder.

    Attributes:
        path: Where it is.
    """

    path: Path

    def file(self, name: str) -> Path:
        """Return the path of a file inside."""
        return self.path / name

    def scenario(self) -> "Scenario":
        """Return the scenario that the run was started with, overrides included."""
        from fedsim.scenario import Scenario

        return Scenario.from_resolved(self.document(), origin=str(self.file(SCENARIO_FILE)))

    def document(self) -> dict[str, Any]:
        """Return the tables of that scenario as they were written.

        Raises:
            ScenarioError: If the file holds no table.
        """
        file = self.file(SCENARIO_FILE)
        # Read as it stands: a scenario has no non-finite numbers, and a title may well be "nan".
        found = _read(file)
        if not isinstance(found, dict):
            raise ScenarioError(f"{file}: is not a scenario: it must be a table")
        return found

    @contextlib.contextmanager
    def named_when_interrupted(self) -> Iterator[None]:
        """Mark an interrupt on its way out with the folder, before and after it is recorded."""
        try:
            yield
        except KeyboardInterrupt as error:
            vars(error)[_FOLDER] = self.path
            raise

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Write what is logged under "fedsim" to the run's log file, a failure with its traceback.

        An exception on its way out is marked with the folder, so that whoever reports it can name
        the log and the command that resumes the run (`folder_of`).
        """
        with taking(self.file(LOG_FILE)):
            handler = _LogFile(self.file(LOG_FILE), encoding="utf-8")
        formatter = _NamelessFormatter(
            "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        handler.setLevel(logging.INFO)
        before = _logger.level
        # The log must hold INFO even where nobody has asked the root logger for it.
        if not _logger.isEnabledFor(logging.INFO):
            _logger.setLevel(logging.INFO)
        _logger.addHandler(handler)
        try:
            yield
        except BaseException as error:
            vars(error)[_FOLDER] = self.path
            cause = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            _log_to(handler, cause, error)
            raise
        finally:
            _logger.removeHandler(handler)
            _logger.setLevel(before)
            handler.close()


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


class _LogFile(logging.FileHandler):
    """A log that says in one line that the disk does not take it, and lets the run fail or not."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once what the disk refused."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"fedsim: {LOG_FILE} cannot be written: {error.strerror}", file=sys.stderr)

    def close(self) -> None:
        """Close the file; what it still holds may find no room."""
        with contextlib.suppress(OSError):
            super().close()


class _NamelessFormatter(logging.Formatter):
    """Writes `~` for the home folder, which tracebacks are full of and which names a user."""

    def format(self, record: logging.LogRecord) -> str:
        text, place = super().format(record), home()
        return text if place is None or len(str(place)) <= 1 else text.replace(str(place), "~")


def folder_of(error: BaseException) -> Path | None:
    """Return the folder of the run that an exception ended, or None when there was none yet."""
    return vars(error).get(_FOLDER)


def create(out: Path | None, scenario: "Scenario") -> RunFolder:
    """Make the folder of a new run, with its scenario and the versions that it runs under.

    Args:
        out: Where; None makes `runs/<scenario>-<UTC time>-<four hex digits>`.
        scenario: What is run.

    Returns:
        The folder, which holds `scenario.json` and `versions.json`.

    Raises:
        ScenarioError: If `out` is a file or a folder that is not empty, or cannot be written.
    """
    if out is None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        out = Path("runs") / f"{scenario.stem}-{stamp}-{secrets.token_hex(2)}"
    _refuse_taken(out)
    making = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    try:
        making.mkdir(parents=True)
        write_json_atomic(making / SCENARIO_FILE, scenario.resolved())
        write_json_atomic(making / VERSIONS_FILE, versions())
        # Renaming onto an empty folder replaces it; onto any other it fails.
        making.rename(out)
        with RunFolder(out).named_when_interrupted():
            _sync_folder(out.parent)
    except OSError as error:
        _refuse_taken(out)
        raise ScenarioError(f"--out {out}: cannot make the run folder: {error.strerror}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return RunFolder(out)


def resuming(folder: Path) -> str:
    """Return the command that goes on with a run, wherever it is given.

    Example:
        >>> resuming(Path("/tmp/my run"))
        "fedsim resume '/tmp/my run'"
    """
    return f"fedsim resume {shlex.quote(str(folder.absolute()))}"


def open_existing(path: Path) -> RunFolder:
    """Open the folder of a run that was started before.

    Raises:
        ScenarioError: If there is no such folder or it is not a run's.
    """
    if not path.exists():
        parent = path.parent
        siblings = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
        guess = nearest(path.name, siblings)
        hint = f"; did you mean '{parent / guess}'?" if guess else ""
        raise ScenarioError(f"{path}: there is no such run folder{hint}")
    if not path.is_dir():
        raise ScenarioError(f"{path}: is a file; a run is a folder with {SCENARIO_FILE}")
    if not (path / SCENARIO_FILE).is_file():
        raise ScenarioError(f"{path}: is not the folder of a run: it has no {SCENARIO_FILE}")
    return RunFolder(path)


def versions() -> dict[str, Any]:
    """Return what a run's bits depend on besides its scenario: versions and kernels in use.

    The machine's kind is among it (`kernels_in_use.in_use`), its name is not.
    """
    from fedsim.basics.kernels_in_use import in_use

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "fedsim": fedsim.__version__,
    }
    found |= {package: _version(package) for package in ("flwr", "torch", "ray", "numpy")}
    found["system"] = platform.system()
    found["machine"] = platform.machine()
    return found | in_use()


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
                records.append(_decode(json.loads(line)))
            except ValueError as error:
                raise RunError(f"{path}: line {number} is not JSON: {error}") from None
        return records


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
    _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Read a file that `write_json_atomic` wrote.

    Raises:
        RunError: If it is missing or not JSON.
    """
    return _decode(_read(path))


def _read(path: Path) -> Any:
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


def _refuse_taken(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ScenarioError(f"--out {out}: is a file; name a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        if (out / SCENARIO_FILE).is_file():
            raise ScenarioError(
                f"--out {out}: holds a run already; `{resuming(out)}` goes on with it, "
                "another --out starts a new one"
            )
        raise ScenarioError(f"--out {out}: is not empty; name a folder that does not exist yet")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _log_to(handler: logging.Handler, message: str, error: BaseException) -> None:
    """Log to one handler alone: the terminal gets its one readable line from the command line."""
    record = _logger.makeRecord(
        _logger.name,
        logging.ERROR,
        "",
        0,
        message,
        (),
        (type(error), error, error.__traceback__),
    )
    handler.handle(record)
