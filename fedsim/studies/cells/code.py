"""Lines of a study on the user's own code: it has changed, or it cannot be followed."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from fedsim.basics.errors import RunError
from fedsim.basics.json_files import read_json, taking, write_json_atomic
from fedsim.basics.sources import changes
from fedsim.scenario.scenario import Scenario

_FILE = "code.json"


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
    if now != before:
        with taking(place):
            write_json_atomic(place, now)
    return list(lines)
