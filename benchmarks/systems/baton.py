"""How a system under test takes turns: it runs rounds when it is told to, and says how long.

A system is a script that is given one workload as JSON. It sets itself up, makes a `Baton` (which
waits for the first turn) and calls `ended` after every round. A turn is a line of JSON on standard
input, `{"rounds": 10}`, with `"save": path` to have the aggregated model afterwards; the answer is
a line on the original standard output. Whatever the system itself prints goes to standard error.
Needs NumPy alone, for it runs in every system's own environment.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Named = Mapping[str, np.ndarray]


def workload() -> dict[str, Any]:
    """Return the workload that the script was started with."""
    return json.loads(sys.argv[1])


def pool(work: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pool: features `[n, 1, 28, 28]`, targets `[n]`, offsets `[shares + 1]`.

    Client c holds the rows from offsets[c mod shares] to offsets[c mod shares + 1]. All of it is
    read into memory.
    """
    folder = Path(work["pool"])
    return tuple(np.load(folder / f"{name}.npy") for name in ("x", "y", "offsets"))


def initial(work: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the model that every system starts from, named and laid out as torch does."""
    with np.load(work["initial"]) as file:
        return {name: file[name] for name in file.files}


class Baton:
    """Whose turn it is.

    Args:
        **facts: What the report shall say of the system: versions, threads.

    Attributes:
        turn: What the harness asked for.
    """

    def __init__(self, **facts: Any) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what the system prints must not come between
        self._facts = facts
        self.turn: dict[str, Any] = {}

    def wait(self) -> bool:
        """Say that the system is ready; wait for the first turn. False when there is none."""
        self._say({"ready": self._facts, "memory": memory()})
        return self._take()

    def ended(
        self, parameters: Callable[[], Named], finished: Callable[[], object] = lambda: None
    ) -> bool:
        """Count a round; at the end of a turn report and wait for the next.

        Args:
            parameters: Gives the aggregated model, in torch's names and layout.
            finished: Returns when all work is really done; called at the end of a turn, inside its
                time.

        Returns:
            False when there is no further turn.
        """
        self._left -= 1
        if self._left:
            return True
        finished()
        seconds = time.perf_counter() - self._begun
        if path := self.turn.get("save"):
            np.savez(path, **{k: np.asarray(v) for k, v in parameters().items()})
        self._say({"seconds": seconds, "rounds": self.turn["rounds"], "memory": memory()})
        return self._take()

    def _take(self) -> bool:
        line = sys.stdin.readline()
        if not line.strip():
            return False
        self.turn = json.loads(line)
        self._left: int = self.turn["rounds"]
        self._begun = time.perf_counter()
        return True

    def _say(self, answer: dict[str, Any]) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


def memory() -> dict[str, int]:
    """Return bytes of this process and its descendants: peak and resident, own and all together.

    Pages that processes share are counted in each of them, except in `all_pss`.
    """
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    family, found = [os.getpid()], [os.getpid()]
    while found:
        found = [child for parent in found for child in parents.get(parent, [])]
        family += found
    own = _status(os.getpid())
    return {
        "own_peak": own.get("VmHWM", 0),
        "own": own.get("VmRSS", 0),
        "all_peak": sum(_status(pid).get("VmHWM", 0) for pid in family),
        "all_pss": sum(_pss(pid) for pid in family),
    }


def _status(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.startswith("Vm"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs}


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
