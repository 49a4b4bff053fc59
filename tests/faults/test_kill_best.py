"""A run that keeps its best model is killed and resumed: same model, same words."""

import signal
from pathlib import Path

import pytest

from fedsim.basics.json_files import JsonLines, read_json
from fedsim.runs.best_model import best_of
from tests.faults.test_kill_resume import SCENARIO

KEEPING = (
    "--set", "evaluation={every=1, keep_best='test/loss'}",
    "--set", "checkpoint.every=3",
)  # fmt: skip
RUN = ("run", "kill.toml", "--out", "run", "--quiet", *KEEPING)


def _outcome(run: Path) -> tuple[object, bytes, list[str]]:
    kept = sorted(file.name for file in (run / "checkpoints").iterdir())
    best = read_json(run / "summary.json")["best"]
    return best, (run / "params-best.safetensors").read_bytes(), kept


@pytest.fixture(scope="module")
def undisturbed(killer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "kill.toml").write_text(SCENARIO)
    code, output = killer.run(folder, *RUN)
    assert code == 0, output
    history = JsonLines.read(folder / "run" / "metrics.jsonl")
    best = [best_of(history[: last + 1], "test/loss").round for last in range(len(history))]
    assert best[5] > 3, "a new best between two checkpoints"
    return _outcome(folder / "run")


@pytest.mark.parametrize(
    ("point", "turn"),
    [
        ("metrics are written", 6),  # round 5: its checkpoint, of round 6, is not there yet
        ("a checkpoint is written and not renamed", 3),  # the model is renamed, then a checkpoint
        ("a checkpoint is written and not renamed", 4),
        ("a checkpoint is renamed", 3),
        ("a checkpoint is renamed", 5),
        ("an old checkpoint is removed", 1),
        ("the summary is written", 1),
    ],
)
def test_a_run_killed_when(killer, tmp_path, undisturbed, point, turn):
    (tmp_path / "kill.toml").write_text(SCENARIO)
    code, output = killer.run(tmp_path, *RUN, point=point, turn=turn)
    assert code == -signal.SIGKILL, output
    code, output = killer.run(tmp_path, "resume", "run", "--quiet")
    assert code == 0, output
    assert _outcome(tmp_path / "run") == undisturbed
