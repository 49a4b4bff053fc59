"""Running a scenario for its recording, or to be held against it."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from fedsim import run_folder
from fedsim.checking.recording import Recording, Trace
from fedsim.run import RunResult, start
from fedsim.run_folder import METRICS_FILE, JsonLines, read_json
from fedsim.scenario import Scenario

TRACED_ROUNDS = 10

# what is measured differently every time, and what later versions may count otherwise
_UNTRACED = ("time/", "comm/")


class Measured(NamedTuple):
    """What a scenario did now.

    Attributes:
        recording: As it would be recorded.
        claims: What its metrics make of `[expect]`, see `expectations.check_expectations`.
        seconds: How long both runs took.
    """

    recording: Recording
    claims: list[dict[str, Any]]
    seconds: float


def measure(scenario: Scenario) -> Measured:
    """Run a scenario as it stands and its first rounds in float64, in this process.

    One run serves for both where they are the same.

    Raises:
        ScenarioError: If it cannot be built.
        RunError: If one of the runs fails.
    """
    # as it stands but for what decides no bit: where it is computed and how often it is saved
    here = scenario.with_overrides(["engine.kind=inline", f"checkpoint.every={10**6}"])
    with tempfile.TemporaryDirectory(prefix="fedsim-check-") as scratch:
        whole = start(here, out=Path(scratch) / "whole")
        first = _first_rounds(here)
        # a short scenario in float64 is its own first rounds
        same = first.sha256 == here.sha256
        traced = whole if same else start(first, out=Path(scratch) / "traced")
        summary = whole.summary
        recording = Recording(
            scenario_sha256=scenario.sha256,
            rounds=summary["rounds"],
            params_sha256=summary["params_sha256"],
            participation_sha256=summary["participation_sha256"],
            partition_sha256=summary["partition_sha256"],
            trace=_trace(traced),
            environment=_environment(whole.folder),
        )
        seconds = summary["wall_time_s"] + (0.0 if same else traced.summary["wall_time_s"])
        return Measured(recording, summary["expect"], seconds)


def _first_rounds(scenario: Scenario) -> Scenario:
    # a run that stops early would be shorter than what was recorded, by a hair's breadth
    evaluation = {**scenario.evaluation.model_dump(mode="json"), "every": 1, "stop": None}
    return scenario.changed(
        task={**scenario.task, "dtype": "float64"},
        rounds=min(scenario.rounds, TRACED_ROUNDS),
        evaluation=evaluation,
        expect={},
    )


def _trace(result: RunResult) -> Trace:
    records = JsonLines.read(result.folder / METRICS_FILE)
    names = sorted({name for record in records for name in record} - {"round"})
    return Trace(
        rounds=[record["round"] for record in records],
        metrics={
            name: [None if (v := r.get(name)) is None else float(v) for r in records]
            for name in names
            if not name.startswith(_UNTRACED)
        },
        params_sha256=result.summary["params_sha256"],
    )


def _environment(folder: Path) -> dict[str, Any]:
    versions = run_folder.versions()
    plan = read_json(folder / "plan.json")
    return {
        "instruction_set": f"{versions['machine']} {versions['instruction_set']}",
        "torch": versions["torch"],
        **{key: plan[key] for key in ("threads", "executor", "chunk_size")},
    }
