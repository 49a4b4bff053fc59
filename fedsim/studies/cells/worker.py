"""A process that runs cells one after another: what `pool` starts and talks to.

It reads one JSON document per line from standard input,
`{"folder", "scenario", "origin", "code"}`, and writes what happens to standard output in the same
way. When standard input ends it ends, in the middle of a run too: the process that asked for the
run is gone, and a run can be resumed.
"""

import gc
import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsim.basics.errors import FedsimError, RunError, ScenarioError
from fedsim.basics.loading import loads, spare_what_is_loaded
from fedsim.runs.progress import Progress

Say = Callable[[Mapping[str, Any]], None]

_PAUSE_S = 0.5  # between two words about rounds


class _Told(Progress):
    """Says how far a run is to the process that asked for it."""

    def __init__(self, rounds: int, say: Say) -> None:
        super().__init__(rounds, quiet=True)
        self._say, self._said = say, 0.0

    def update(
        self,
        server_round: int,
        metrics: Mapping[str, float],
        *,
        done: int,
        failed: int,
        absent: int,
    ) -> None:
        """Say which round is done."""
        now = time.monotonic()
        if now - self._said >= _PAUSE_S:
            self._said = now
            self._say({"event": "round", "round": server_round})


def main() -> None:
    """Run cells until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    lock = threading.Lock()
    with loads("a run"):
        import fedsim.runs.start  # noqa: F401
    spare_what_is_loaded()  # it would take longer than a short cell

    def say(document: Mapping[str, Any]) -> None:
        with lock:
            out.write(json.dumps(document) + "\n")

    while True:
        say({**_run(json.loads(jobs.get()), say), "peak": peak_memory()})
        gc.collect()  # of the cell just run; its data stay mapped otherwise until some later cell


def peak_memory() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _listen(jobs: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


def _run(job: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Run or resume one cell; returns what came of it."""
    from fedsim.runs.folder import SCENARIO_FILE
    from fedsim.runs.start import resume, start
    from fedsim.scenario.scenario import Scenario

    folder = Path(job["folder"])
    try:
        scenario = Scenario.from_resolved(job["scenario"], job["origin"])
        if job["code"] and scenario.code.sha256 != job["code"]:
            raise RunError(
                f"{', '.join(scenario.import_paths)}: the code has changed since the command was "
                "given; give it again"
            )
        progress = _Told(scenario.rounds, say)
        if (folder / SCENARIO_FILE).is_file():
            resume(folder, overrides=["engine.kind=inline"], progress=progress)
        else:
            start(scenario, out=folder, progress=progress)
    except FedsimError as error:
        refused = isinstance(error, ScenarioError)
        return {"event": "failed", "reason": str(error), "refused": refused}
    except Exception as error:  # named, and the other cells go on; the run's log has its traceback
        return {"event": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {"event": "done"}
