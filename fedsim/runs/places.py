"""Files and folders that arguments of a user's own code name, under whatever key.

A run remembers where each lay when it began, and its content. It is resumed from any working
folder, and a place that was moved is given anew: the scenario's hash stays that of the first one.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsim.basics.errors import ScenarioError, show
from fedsim.basics.home import expanded
from fedsim.basics.import_paths import is_import_path
from fedsim.basics.json_files import read_json, taking, write_json_atomic
from fedsim.runs.folder import RunFolder
from fedsim.scenario.overrides import apply, at_key, key_of, with_key
from fedsim.scenario.scenario import Scenario, without_user
from fedsim.scenario.tables import FACTORY_TABLES, OPTIONAL_TABLES, WITH_PATHS
from fedsim.strategy.foreign import nested

_PLACES_FILE = "places.json"
_MOST_FILES, _MOST_BYTES = 1000, 2**30  # of a folder whose content is remembered


def write_places(scenario: Scenario, folder: RunFolder) -> None:
    """Remember which arguments of a run's own code name a file or folder; nothing without any."""
    file = folder.file(_PLACES_FILE)
    found = {}
    for key, value in _texts(scenario.resolved()):
        path = os.path.abspath(expanded(value))
        if value and "\0" not in value and os.path.exists(path):
            # what a loader makes of its files is in the manifest
            content = None if key.startswith("data.") else _content(Path(path))
            found[key] = {"value": value, "lies": [without_user(path)], "sha256": content}
    if found and not file.exists():
        with taking(file):
            write_json_atomic(file, found)


def placed(
    document: dict[str, Any], folder: RunFolder, overrides: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Let a run's document say where its code's files and folders lie now.

    Args:
        document: The run's scenario, changed in place.
        folder: The run's folder.
        overrides: Assignments.

    Returns:
        The assignments that are no such places, and what the run began with by key.

    Raises:
        ScenarioError: If one is no longer there, or has another content by now.
    """
    known, others, lines = places_of(folder), [], []
    for override in overrides:
        key = ".".join(key_of(override))
        new: dict[str, Any] = {}
        apply(new, [override])
        value = at_key(new, key)
        if key not in known or not (isinstance(value, str) and expanded(value).exists()):
            others.append(override)
            continue
        path = os.path.abspath(expanded(value))
        _require_same(key, value, known[key], Path(path))
        document.update(with_key(document, key, path))
    for key, place in known.items():
        now, lies = at_key(document, key), os.path.abspath(expanded(place["lies"][0]))
        if now == place["value"] and os.path.abspath(expanded(now)) != lies:
            document.update(with_key(document, key, lies))  # the run was begun in another folder
            now = lies
        if _is_path(now) and not expanded(now).exists():
            table, _, name = key.rpartition(".")
            lines.append(
                f"{folder.path}: [{table}] {name} = {show(now)}: is no longer there; say where it "
                f"lies now: --set {key}=PATH"
            )
    if lines:
        raise ScenarioError("\n".join(lines))
    changed = {".".join(key_of(override)) for override in others}  # by what is no place
    return others, {key: each["value"] for key, each in known.items() if key not in changed}


def moved(document: dict[str, Any], now: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Remember where such files lie by now.

    Args:
        document: The run's scenario as it was written.
        now: The one that was taken up.
        folder: The run's folder.

    Returns:
        The document to be written.
    """
    known, document = places_of(folder), deepcopy(document)
    before = deepcopy(known)
    for key, place in known.items():
        if isinstance(value := at_key(now, key), str) and value != at_key(document, key):
            document.update(with_key(document, key, value))
            if without_user(value) not in place["lies"]:
                place["lies"].append(without_user(value))
    if known != before:
        file = folder.file(_PLACES_FILE)
        with taking(file):
            write_json_atomic(file, known)
    return document


def moves(document: Mapping[str, Any], folder: RunFolder) -> list[tuple[str, str]]:
    """Return where such files have lain, and where a run's document says that they lie now."""
    found = []
    for key, place in places_of(folder).items():
        if isinstance(now := at_key(document, key), str):
            new = os.path.abspath(expanded(now))
            olds = (os.path.abspath(expanded(lies)) for lies in place["lies"])
            found += [(old, new) for old in olds if old != new]
    return found


@contextlib.contextmanager
def paths_kept(strategy: Strategy, scenario: Scenario, folder: RunFolder) -> Iterator[None]:
    """Let a strategy that is given back what it remembered keep the paths that it has now.

    Args:
        strategy: As the scenario makes it now.
        scenario: The run's.
        folder: The run's folder.
    """
    now, pairs = scenario.resolved(), list[tuple[str, str]]()
    for key, place in places_of(folder).items():
        if isinstance(new := at_key(now, key), str):
            olds = {place["value"], *(str(expanded(lies)) for lies in place["lies"])} - {new}
            pairs += [(old, new) for old in olds]
    inside = list(nested(strategy)) if pairs else []
    fresh = [(each, {n: v for n, v in vars(each).items() if _path_like(v)}) for each in inside]
    yield
    for each, values in fresh:
        for name, value in values.items():
            saved = vars(each).get(name)
            for old, new in pairs if _path_like(saved) else ():
                if _below(str(value), new) is not None:
                    rest = _below(str(saved), old)
                    if rest is not None:
                        setattr(each, name, type(value)(new + rest))
                        break


def _path_like(value: object) -> bool:
    return isinstance(value, str | Path)


def _below(path: str, place: str) -> str | None:
    """What of a path comes after a place, None where it does not begin there."""
    rest = path[len(place) :]
    return rest if path.startswith(place) and rest[:1] in ("", os.sep) else None


def places_of(folder: RunFolder) -> dict[str, Any]:
    """Return what a run remembers of such places, by key."""
    file = folder.file(_PLACES_FILE)
    return dict(read_json(file)) if file.is_file() else {}


def _require_same(key: str, value: str, place: Mapping[str, Any], path: Path) -> None:
    """Refuse a file or folder whose content is not what a run began with.

    Raises:
        ScenarioError: Naming the key.
    """
    if key.startswith("data."):
        return
    began = place["lies"][0]
    if place["sha256"] is None:
        raise ScenarioError(
            f"--set {key}={value}: {began} was too large for its content to be remembered, "
            "so nothing tells whether this is the same; bring it back there, or start a new run"
        )
    if _content(path) != place["sha256"]:
        raise ScenarioError(
            f"--set {key}={value}: its content is not what the run began with in {began}; "
            "give the same file or folder, or start a new run with `fedsim run`"
        )


def _texts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text that code of the user's own is given as an argument, by key."""
    for name in (*FACTORY_TABLES, *OPTIONAL_TABLES):
        leaves = [*_leaves(name, document.get(name))]
        if any(is_import_path(value) for _, value in leaves):
            for key, value in leaves:
                if not is_import_path(value) and key != f"{name}.{WITH_PATHS.get(name)}":
                    yield key, value


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inside in value.items():
            yield from _leaves(f"{key}.{name}", inside)
    elif isinstance(value, str):
        yield key, value


def _is_path(value: object) -> bool:
    """Whether a text is a path for certain: words may be names of folders by chance."""
    return isinstance(value, str) and (os.sep in value or "." in value)


def _content(path: Path) -> str | None:
    """A hash of a file, or of the names and files of a folder; None where that would be long."""
    files = [path] if path.is_file() else []
    if not files:
        for where, folders, names in os.walk(path):
            folders.sort()
            files += [Path(where) / name for name in sorted(names)]
            if len(files) > _MOST_FILES:
                return None
    digest, read = hashlib.sha256(), 0
    try:
        for file in files:
            read += file.stat().st_size
            if read > _MOST_BYTES or not file.is_file():
                return None
            inside = "" if file == path else str(file.relative_to(path))
            with file.open("rb") as content:
                part = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{inside}:{part};".encode(errors="surrogateescape"))
    except OSError:
        return None
    return digest.hexdigest()
