"""Tiny scenarios for studies, and runs that nobody trained."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from fedsim.data.sets.user import DataSet
from fedsim.runs.start import start
from fedsim.studies.cells.cell import Cell

TINY = """
seed = 3
rounds = {rounds}
[task]
model = "logistic"
[data]
name = "synthetic"
max_samples = 40
dimension = 6
classes = 3
[partition]
kind = "natural"
clients = 4
test_fraction = 0.25
[participation]
kind = "uniform"
cohort_size = 2
[client]
local_lr = 0.05
local_steps = 2
[evaluation]
clients = 4
[checkpoint]
every = 5
"""


def write(folder: Path, *, rounds: int = 5, name: str = "tiny") -> Path:
    """Write a scenario that takes milliseconds per round."""
    file = folder / f"{name}.toml"
    file.write_text(TINY.format(rounds=rounds), encoding="utf-8")
    return file


def large() -> DataSet:
    """32 MiB of features."""
    return DataSet(np.ones((8192, 1024), dtype=np.float32), np.arange(8192) % 2)


class InThisProcess:
    """Stands for a pool: runs cells here, one after another, where another process is no matter."""

    def __init__(self, study: Path, **asked: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, cells: Sequence[Cell], then: object = None) -> dict[Path, str]:
        """Run cells; none may fail."""
        for cell in cells:
            start(cell.scenario, out=cell.folder)
        return {}


class MadeUpRuns:
    """Stands for a pool whose runs record what a function of the scenario says.

    Args:
        record: A resolved scenario -> the metrics of its last round; None breaks the run off.

    Attributes:
        ran: The folders of the runs that were asked for.
    """

    def __init__(self, record: Callable[[dict[str, Any]], Mapping[str, float] | None]) -> None:
        self._record = record
        self.ran: list[Path] = []

    def run(self, cells: Sequence[Cell], then: object = None) -> dict[Path, str]:
        """Write the runs' folders; return why some broke off."""
        failed = {}
        for cell in cells:
            self.ran.append(cell.folder)
            made = cell.scenario.resolved()
            found = self._record(made)
            if found is None:
                failed[cell.folder] = "it broke off"
                continue
            cell.folder.mkdir(parents=True)
            line = json.dumps({"round": made["rounds"], **found})
            (cell.folder / "metrics.jsonl").write_text(line + "\n", encoding="utf-8")
            summary = json.dumps({"scenario_sha256": cell.sha256})
            (cell.folder / "summary.json").write_text(summary, encoding="utf-8")
        return failed
