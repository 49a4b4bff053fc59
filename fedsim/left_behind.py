"""What a run needs that lies outside of its folder: its user's code, data, weights, other files.

Code is remembered by the content of its files, everything by the place where it lay. A run that is
resumed finds it there, or is told by `--set` where it lies now; code that is another by now is
refused by the names of its files.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.basics.sources import Code, changes
from fedsim.errors import ScenarioError
from fedsim.factories import show
from fedsim.overrides import apply, key_of
from fedsim.run_folder import RunFolder, read_json, taking, write_json_atomic
from fedsim.scenario import Scenario, code_in
from fedsim.scenario_tables import WITH_PATHS

CODE_FILE = "code.json"


def write_code(code: Code, folder: RunFolder) -> None:
    """Write into a run's folder which code of its user's own it is of; nothing without any."""
    if code.files or code.unfollowed:
        file = folder.file(CODE_FILE)
        document = {"files": code.files, "sha256": code.sha256, "unfollowed": code.unfollowed}
        with taking(file):
            write_json_atomic(file, document)


def code_of(folder: Path) -> Code | None:
    """Return the code that a run was begun with; None where its folder does not say."""
    file = folder / CODE_FILE
    if not file.is_file():
        return None
    found = read_json(file)
    return Code(dict(found["files"]), tuple(found.get("unfollowed", ())))


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
    origin = str(folder.file("scenario.json"))
    moved = [each for each in overrides if _is_place(key_of(each), document)]
    others = [each for each in overrides if each not in moved]
    apply(document, moved)
    _require_there(document, origin)
    _require_same_code(document, folder, origin)
    saved = Scenario.from_resolved(document, origin)
    found = saved.with_overrides(others)
    if found.sha256 != saved.sha256:
        raise ScenarioError(
            f"{folder.path}: --set {' --set '.join(others)} would change the result of a run "
            "that has begun; start a new run with `fedsim run`"
        )
    return found


def _require_same_code(document: Mapping[str, Any], folder: RunFolder, origin: str) -> None:
    """Refuse changed code before it is imported: it may well fail there."""
    before = code_of(folder.path)
    if before is None:
        return
    now = code_in(document, origin)
    if what := changes(before.files, now.files):
        raise ScenarioError(
            f"{folder.path}: {what} since the run began, so going on would not give the "
            "undisturbed run's result; bring the old content back, or start a new run with "
            "`fedsim run`"
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
