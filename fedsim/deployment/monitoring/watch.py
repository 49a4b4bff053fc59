"""Which runs lie below a folder, and what is read of them at each look."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedsim.basics.errors import ScenarioError, nearest
from fedsim.deployment.monitoring.audit import ObservedAudit
from fedsim.runs.folder import LOG_FILE, METRICS_FILE, SCENARIO_FILE
from fedsim.runs.observed import ObservedRun

_DEPTH = 4  # folders between the one that is watched and a run's
_log = logging.getLogger("fedsim")


class Sighting(NamedTuple):
    """What one look found.

    Attributes:
        runs: The newest runs, by the name that they have below the folder.
        found: How many there are in all.
        audit: The site's record of instructions; None where none is watched.
        unreadable: Files and folders that cannot be read, or hold what they should not.
        why_not: Why the folder cannot be read; empty if it can.
    """

    runs: dict[str, ObservedRun]
    found: int
    audit: ObservedAudit | None
    unreadable: tuple[Path, ...]
    why_not: str


class Watch:
    """Looks at the runs below a folder; nothing is written.

    Args:
        folder: The folder, or a run's own.
        most: How many runs are told of: those in which something happened last.
        audit: A site's record of instructions; None for none.

    Raises:
        ScenarioError: If there is no such folder, or the record cannot be one.
    """

    def __init__(self, folder: Path, *, most: int = 20, audit: Path | None = None) -> None:
        if not folder.is_dir():
            what = "is a file; runs lie in a folder" if folder.exists() else "no such folder"
            raise ScenarioError(f"{folder}: {what}{_beside(folder)}")
        if not 1 <= most <= 1000:
            raise ScenarioError(f"--runs {most}: must be from 1 to 1000")
        if audit is not None and audit.is_dir():
            raise ScenarioError(f"--audit {audit}: is a folder; name the file of [site] audit")
        if audit is not None and not audit.absolute().parent.is_dir():
            raise ScenarioError(f"--audit {audit}: there is no folder {audit.absolute().parent}")
        self.folder, self._most = folder, most
        self._audit = None if audit is None else ObservedAudit(audit)
        self._runs: dict[Path, ObservedRun] = {}
        self._told: set[Path] = set()

    def why_not(self) -> str:
        """Say why the folder cannot be read; nothing if it can."""
        try:
            with os.scandir(self.folder) as entries:
                next(entries, None)
        except OSError as error:
            return f"{self.folder}: cannot be read: {error.strerror or error}"
        return ""

    def look(self) -> Sighting:
        """Read what is new."""
        unreadable: list[Path] = []
        found = sorted(_run_folders(self.folder, _DEPTH, unreadable), key=_newness, reverse=True)
        newest = found[: self._most]
        self._runs = {path: self._runs.get(path) or ObservedRun(path) for path in newest}
        for path, run in self._runs.items():
            run.look()
            if path.is_dir():  # else it was removed meanwhile
                unreadable += [path / name for name in sorted(run.unreadable)]
        if self._audit is not None:
            self._audit.look()
            if self._audit.is_unreadable:
                unreadable.append(self._audit.file)
        self._tell(unreadable)
        runs = {self._name(path): run for path, run in sorted(self._runs.items())}
        return Sighting(runs, len(found), self._audit, tuple(unreadable), self.why_not())

    def _name(self, path: Path) -> str:
        """What a run is called: its folder, as it lies below the one that is watched."""
        return path.name if path == self.folder else path.relative_to(self.folder).as_posix()

    def _tell(self, unreadable: list[Path]) -> None:
        """Log what cannot be read, each once until it can."""
        for path in set(unreadable) - self._told:
            _log.warning("%s: cannot be read, or holds what it should not", path)
        self._told = set(unreadable)


def _run_folders(folder: Path, depth: int, unreadable: list[Path]) -> Iterator[Path]:
    """The folders of runs below one, itself included; no link is followed."""
    if (folder / SCENARIO_FILE).is_file():
        yield folder
        return
    try:
        with os.scandir(folder) as entries:
            inner = [each.name for each in entries if each.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    except OSError:
        unreadable.append(folder)
        return
    for name in inner if depth else ():
        if not name.startswith("."):  # one in the making
            yield from _run_folders(folder / name, depth - 1, unreadable)


def _newness(folder: Path) -> float:
    """When something was last written of a run."""
    times = [0.0]
    for name in (SCENARIO_FILE, METRICS_FILE, LOG_FILE):
        with contextlib.suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def _beside(folder: Path) -> str:
    parent = folder.absolute().parent
    names = [each.name for each in parent.iterdir() if each.is_dir()] if parent.is_dir() else []
    guess = nearest(folder.name, names)
    return f"; did you mean '{folder.parent / guess}'?" if guess else ""
