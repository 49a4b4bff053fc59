"""The run folder: where a run writes down what it was, what it did and what came out.

A folder appears whole or not at all: it is made under a temporary name and renamed. Files that grow
(`JsonLines`) know their length in bytes, which a checkpoint stores and a resumed run cuts back to.
A run folder says which kind of processor computed; nothing in it names the machine or its user.
"""

import contextlib
import logging
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.basics.errors import ScenarioError, nearest
from fedsim.basics.home import nameless
from fedsim.basics.json_files import read_plain, sync_folder, taking, write_json_atomic
from fedsim.basics.versions import versions
from fedsim.runs.on_nodes import is_on_nodes, resuming_on_nodes

if TYPE_CHECKING:
    from fedsim.scenario.scenario import Scenario

SCENARIO_FILE = "scenario.json"
VERSIONS_FILE = "versions.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LOG_FILE = "log.txt"

_FOLDER = "fedsim_run_folder"  # the attribute of an exception that says which run it ended
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
        from fedsim.scenario.scenario import Scenario

        return Scenario.from_resolved(self.document(), origin=str(self.file(SCENARIO_FILE)))

    def document(self) -> dict[str, Any]:
        """Return the tables of that scenario as they were written.

        Raises:
            ScenarioError: If the file holds no table.
        """
        file = self.file(SCENARIO_FILE)
        # Read as it stands: a scenario has no non-finite numbers, and a title may well be "nan".
        found = read_plain(file)
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

        An exception on its way out is marked with the folder, so that its report can name
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


class _LogFile(logging.FileHandler):
    """A log file that reports a full disk once, in one line, and does not itself stop the run."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once what the disk refused."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            with contextlib.suppress(OSError, ValueError):
                print(f"fedsim: {LOG_FILE} cannot be written: {error.strerror}", file=sys.stderr)

    def close(self) -> None:
        """Close the file; what it still holds may find no room."""
        with contextlib.suppress(OSError):
            super().close()


class _NamelessFormatter(logging.Formatter):
    """Writes `~` for the home folder, which tracebacks are full of and which names a user."""

    def format(self, record: logging.LogRecord) -> str:
        return nameless(super().format(record))


def folder_of(error: BaseException) -> Path | None:
    """Return the folder of the run that an exception ended, or None when there was none yet."""
    return vars(error).get(_FOLDER)


def create(
    out: Path | None, scenario: "Scenario", beside: Mapping[str, Any] | None = None
) -> RunFolder:
    """Make the folder of a new run, with its scenario and the versions that it runs under.

    Args:
        out: Where; None makes `runs/<scenario>-<UTC time>-<four hex digits>`.
        scenario: What is run.
        beside: What else the folder says from the beginning, as JSON by the name of the file.

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
        for name, content in (beside or {}).items():
            write_json_atomic(making / name, content)
        # Renaming onto an empty folder replaces it; onto any other it fails.
        making.rename(out)
        with RunFolder(out).named_when_interrupted():
            sync_folder(out.parent)
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
    if is_on_nodes(folder):
        return resuming_on_nodes(folder)
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
