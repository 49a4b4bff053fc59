"""What a run needs that lies outside of its folder: its user's code, data, weights, other files.

Code is remembered by the content of its files, everything by the place where it lay. A run that is
resumed finds it there, or is told by `--set` where it lies now; code that is another by now is
refused by the names of its files.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.basics.errors import ScenarioError, show
from fedsim.basics.import_paths import import_paths
from fedsim.basics.json_files import read_json, taking, write_json_atomic
from fedsim.basics.reads import Reads, by_now
from fedsim.basics.sources import NO_CODE, Code, changes
from fedsim.runs.folder import SCENARIO_FILE, RunFolder
from fedsim.runs.places import moved, moves, placed
from fedsim.scenario.overrides import apply, key_of
from fedsim.scenario.scenario import Scenario, code_in, without_user
from fedsim.scenario.tables import WITH_PATHS

CODE_FILE = "code.json"


def write_code(code: Code, reads: Reads, folder: RunFolder) -> None:
    """Write into a run's folder which code of its user's own it is of; nothing without any."""
    if code.files or code.unfollowed or reads.found:
        file = folder.file(CODE_FILE)
        document = {
            "files": code.files,
            "sha256": code.sha256,
            "unfollowed": code.unfollowed,
            "begun_in": without_user(os.getcwd()),
        }
        if reads.found:
            document["read"] = {without_user(name): of for name, of in reads.found.items()}
        with taking(file):
            write_json_atomic(file, document)


def code_of(folder: Path) -> Code | None:
    """Return the code that a run was begun with; None where its folder does not say."""
    file = folder / CODE_FILE
    if not file.is_file():
        return None
    found = read_json(file)
    return Code(dict(found["files"]), tuple(found.get("unfollowed", ())))


def reads_of(folder: Path) -> dict[str, str]:
    """Return what a run's code has read, see `Reads`; nothing where its folder does not say."""
    file = folder / CODE_FILE
    return dict(read_json(file).get("read", {})) if file.is_file() else {}


def code_sha256_of(folder: Path) -> str:
    """Return the hash of the code that a run was begun with, and of what that has read."""
    code = code_of(folder) or NO_CODE
    return code._replace(files={**code.files, **reads_of(folder)}).sha256


def take_up(folder: RunFolder, overrides: Sequence[str] = ()) -> Scenario:
    """Return the scenario of a run that is to be gone on with.

    Args:
        folder: The run's folder.
        overrides: Assignments that do not change results: how it is computed, and where things lie
            that have been moved.

    Raises:
        ScenarioError: If an override would change the result, something is no longer where it was,
            or the user's code has changed.
    """
    document = folder.document()
    origin = str(folder.file(SCENARIO_FILE))
    given = [each for each in overrides if _is_place(key_of(each), document)]
    others = [each for each in overrides if each not in given]
    apply(document, given)
    others, first = placed(document, folder, others)
    _require_there(document, origin)
    _require_same_code(document, folder, origin)
    saved = Scenario.from_resolved(document, origin).begun_with(first)
    found = saved.with_overrides(others)
    if found.sha256 != saved.sha256:
        raise ScenarioError(
            f"{folder.path}: --set {' --set '.join(others)} would change the result of a run "
            "that has begun; start a new run with `fedsim run`"
        )
    return found


def keep_places(scenario: Scenario, folder: RunFolder) -> None:
    """Remember where things lie now, so that the run's folder is all that it takes the next time.

    Args:
        scenario: What was taken up, and has turned out to have the data that the run began with.
        folder: The run's folder.
    """
    document, now = folder.document(), scenario.resolved()
    kept = {**document}
    if "modules" in now:
        kept["modules"] = now["modules"]
    for table, key in WITH_PATHS.items():
        if _is_place((table, key), document):
            kept[table] = {**document[table], key: now[table][key]}
    kept = moved(kept, now, folder)
    if kept != document:
        file = folder.file(SCENARIO_FILE)
        with taking(file):
            write_json_atomic(file, kept)


@contextlib.contextmanager
def where_it_was_run(folder: RunFolder) -> Iterator[None]:
    """Say in which folder a run was started when a loader does not find a relative path inside."""
    try:
        yield
    except ScenarioError as error:
        missing = getattr(error.__cause__, "filename", None)
        file = folder.file(CODE_FILE)
        if not isinstance(missing, str) or os.path.isabs(missing) or not file.is_file():
            raise
        begun_in = read_json(file).get("begun_in")
        raise ScenarioError(f"{error}; the run was begun in {begun_in}: resume it there") from error


def _require_same_code(document: Mapping[str, Any], folder: RunFolder, origin: str) -> None:
    """Refuse changed code before it is imported: it may well fail there."""
    before = code_of(folder.path)
    if before is None:
        return
    _require_same_script(document, before, folder)
    now = code_in(document, origin)
    read, folders = reads_of(folder.path), document.get("modules", "").split(os.pathsep)
    paths = [os.path.expanduser(each) for each in folders if each]
    found = by_now(read, paths, moves(document, folder))
    if what := changes({**before.files, **read}, {**now.files, **found}):
        raise ScenarioError(
            f"{folder.path}: {what} since the run began, so going on would not give the "
            "undisturbed run's result; bring the old content back, or start a new run with "
            "`fedsim run`"
        )


def _require_same_script(document: Mapping[str, Any], before: Code, folder: RunFolder) -> None:
    """Refuse to look for what a script or notebook defined in a process that runs another one."""
    tables = {name: table for name, table in document.items() if isinstance(table, Mapping)}
    for where, path in import_paths(tables).items():
        module, _, name = path.partition(":")
        if module == "__main__" and name.partition(".")[0] not in vars(sys.modules["__main__"]):
            script = next((file for file in before.files if "/" not in file), "its notebook")
            raise ScenarioError(
                f"{folder.path}: {where} = '{path}' is what the script that began the run defines "
                f"({script}): call `fedsim.resume('{folder.path.absolute()}')` there; what is in a "
                "module is found from anywhere"
            )


def _is_place(key: Sequence[str], document: Mapping[str, Any]) -> bool:
    """Whether a key says where something lies that the run has had from its beginning."""
    if tuple(key) == ("modules",):
        return True
    if len(key) != 2 or WITH_PATHS.get(key[0]) != key[1]:
        return False
    return isinstance((document.get(key[0]) or {}).get(key[1]), str)


def _require_there(document: Mapping[str, Any], origin: str) -> None:
    """Refuse to go on without a file or folder of the run's, naming what says where it is now."""
    lines = []
    for table, key in WITH_PATHS.items():
        path = (document.get(table) or {}).get(key)
        if isinstance(path, str) and not os.path.exists(os.path.expanduser(path)):
            lines.append(
                f"{origin}: [{table}] {key} = {show(path)}: is no longer there; say where it lies "
                f"now: --set {table}.{key}=PATH"
            )
    if lines:
        raise ScenarioError("\n".join(lines))
