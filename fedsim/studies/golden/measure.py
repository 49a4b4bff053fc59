"""Running a scenario for its recording, or to be held against it."""

import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.json_files import JsonLines, read_json
from fedsim.basics.kernels_in_use import decisive, why_not_portable
from fedsim.runs.folder import METRICS_FILE, SUMMARY_FILE, VERSIONS_FILE
from fedsim.scenario.expectations import VIRTUAL_TIME
from fedsim.scenario.scenario import Scenario
from fedsim.studies.cells.cell import Cell
from fedsim.studies.cells.pool import Pool
from fedsim.studies.golden.recording import MetricTrace, Recording

TRACED_ROUNDS = 10

# metrics that differ in every run, and metrics that later versions may count otherwise
_UNTRACED = ("time/", "comm/")
# versions that say nothing of bits
_UNDECIDED = ("python", "fedsim", "flwr", "ray", "system")


class Measured(NamedTuple):
    """What a scenario did now.

    Attributes:
        recording: As it would be recorded.
        claims: What its metrics make of `[expect]`, see `expectations.check_expectations`.
        seconds: How long its runs took together.
    """

    recording: Recording
    claims: list[dict[str, Any]]
    seconds: float


class _Unwatched:
    """Nobody is told how far runs are."""

    def begun(self, cell: Cell) -> None:
        """A run begins."""

    def at_round(self, cell: Cell, server_round: int) -> None:
        """A round is done."""

    def ended(self, cell: Cell, reason: str | None) -> None:
        """A run has ended."""


class Measurer:
    """Measures scenarios in processes of its own, whose kernels are pinned before anything loads.

    So a recording has portable bits, even if this process has imported torch before. Used as a
    context; the processes start with the first scenario.

    Args:
        workers: Processes at a time; None takes one for each of a scenario's two runs, as far as
            the machine has room.
    """

    def __init__(self, *, workers: int | None = None) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="fedsim-check-")
        self._place = Path(self._scratch.name)
        self._pool = Pool(self._place, workers=workers, watch=_Unwatched())
        self._measured = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and remove what they wrote."""
        self._pool.__exit__(None, None, None)
        self._scratch.cleanup()

    def measure(self, scenario: Scenario) -> Measured:
        """Run a scenario as it stands and its first rounds in float64.

        One run serves for both where they are the same.

        Raises:
            ScenarioError: If it cannot be built.
            RunError: If one of the runs fails.
        """
        here, code = _portable(scenario), scenario.code
        first = _first_rounds(here)
        self._measured += 1
        folder = self._place / str(self._measured)
        whole = Cell(0, scenario.stem, here, folder / "whole", code=code.sha256)
        # a short scenario in float64 is its own first rounds
        same = first.sha256 == here.sha256
        traced = whole if same else replace(whole, scenario=first, folder=folder / "traced")
        cells = [whole] if same else [whole, traced]
        failed = self._pool.run(cells)
        for cell in cells:
            if cell.folder in failed:
                refused = cell.folder in self._pool.refused
                raise (ScenarioError if refused else RunError)(failed[cell.folder])
        summary, trace = (read_json(each.folder / SUMMARY_FILE) for each in (whole, traced))
        recording = Recording(
            scenario_sha256=scenario.sha256,
            rounds=summary["rounds"],
            params_sha256=summary["params_sha256"],
            participation_sha256=summary["participation_sha256"],
            partition_sha256=summary["partition_sha256"],
            trace=_trace(traced.folder, trace["params_sha256"]),
            environment=_environment(whole),
            code=code.files,
        )
        seconds = summary["wall_time_s"] + (0.0 if same else trace["wall_time_s"])
        return Measured(recording, summary["expect"], seconds)


def _portable(scenario: Scenario) -> Scenario:
    """The scenario but for what decides nothing, with portable bits where they can be had."""
    portable = scenario.engine.device == "cpu" and why_not_portable() is None
    return scenario.with_overrides(
        [
            "engine.kind=inline",
            f"checkpoint.every={10**6}",
            f"engine.bits={'portable' if portable else 'fast'}",
        ]
    )


def _first_rounds(scenario: Scenario) -> Scenario:
    # a run that stops early would be shorter than what was recorded, by a hair's breadth
    evaluation = {**scenario.evaluation.model_dump(mode="json"), "every": 1, "stop": None}
    return scenario.changed(
        task={**scenario.task, "dtype": "float64"},
        rounds=min(scenario.rounds, TRACED_ROUNDS),
        evaluation=evaluation,
        expect={},
    )


def _trace(folder: Path, params_sha256: str) -> MetricTrace:
    records = JsonLines.read(folder / METRICS_FILE)
    names = sorted({name for record in records for name in record} - {"round"})
    return MetricTrace(
        rounds=[record["round"] for record in records],
        metrics={
            name: [None if (v := r.get(name)) is None else float(v) for r in records]
            for name in names
            if name == VIRTUAL_TIME or not name.startswith(_UNTRACED)
        },
        params_sha256=params_sha256,
    )


def _environment(cell: Cell) -> dict[str, Any]:
    """What the bits of a run depend on besides its scenario."""
    versions = decisive(read_json(cell.folder / VERSIONS_FILE), cell.scenario.promise)
    plan = read_json(cell.folder / "plan.json")
    return {
        "bits": cell.scenario.promise,
        **{key: value for key, value in versions.items() if key not in _UNDECIDED},
        **{key: plan[key] for key in ("threads", "executor", "chunk_size")},
    }
