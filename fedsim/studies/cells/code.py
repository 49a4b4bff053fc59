"""Lines of a study on the user's own code: it has changed, or it cannot be followed."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from fedsim.basics.errors import RunError
from fedsim.basics.json_files import read_json, taking, write_json_atomic
from fedsim.basics.reads import by_now
from fedsim.basics.sources import changes
from fedsim.runs.left_behind import reads_of
from fedsim.scenario.scenario import Scenario
from fedsim.studies.cells.cell import CELLS

_FILE = "code.json"
_READ = "(read)"  # behind a scenario: what its code has read


def said_of_code(scenarios: Iterable[Scenario], study: Path) -> list[str]:
    """Return what there is to say, in lines, and remember the code as it is now.

    Args:
        scenarios: What the study is about to run.
        study: Its folder, in which runs of other code stay as they are.

    Raises:
        RunError: If the disk does not take it.
    """
    place = study / _FILE
    before: dict[str, dict[str, str]] = {}
    with contextlib.suppress(RunError):
        before = read_json(place)
    now, lines = dict(before), dict[str, None]()
    for scenario in scenarios:
        code = scenario.code
        if not code.files and not code.unfollowed:
            continue
        then = before.get(scenario.origin)
        if then is not None and (what := changes(then, code.files)):
            lines[f"{what} since this study was run: runs of the old code are not used"] = None
        if code.unfollowed:
            lines[f"code that cannot be followed: {'; '.join(code.unfollowed)}"] = None
        now[scenario.origin] = code.files
        if recorded := _read_by_runs(study, scenario.stem):
            said = f"{scenario.origin} {_READ}"
            then = {**recorded, **before.get(said, {})}
            read = by_now(then, scenario.folders)
            if what := changes(then, read):
                lines[f"{what} since this study was run: runs of before are not used"] = None
            now[said] = read
    if now != before:
        with taking(place):
            write_json_atomic(place, now)
    return list(lines)


def _read_by_runs(study: Path, stem: str) -> dict[str, str]:
    """The hashes of what the code of a scenario's runs in a study has read."""
    found: dict[str, str] = {}
    for cell in (study / CELLS).glob(f"{stem}-*"):
        found |= reads_of(cell)
    return found
