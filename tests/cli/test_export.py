"""`fedsim export` on the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--set", "rounds=1", "--set", "engine.kind=inline", "--set", "expect={}", "--quiet",
    "--set", "evaluation.keep_best=test/accuracy",
)  # fmt: skip


def fedsim(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "fedsim", *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip


def test_a_finished_run_is_exported_and_a_wrong_one_is_refused(tmp_path):
    assert fedsim(tmp_path, "run", "quickstart", *SMALL, "--out", "run").returncode == 0
    done = fedsim(tmp_path, "export", "run", "--best", "--to", "out/model", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["folder"], document["round"]) == (0, "out/model", 1)
    assert document["files"] == sorted(each.name for each in (tmp_path / "out/model").iterdir())
    again = fedsim(tmp_path, "export", "run", "--to", "out/model")
    assert again.returncode == 2
    assert again.stderr.startswith("fedsim: --to out/model: is not empty")
    lost = fedsim(tmp_path, "export", "runs", "--to", "model")
    assert (lost.returncode, lost.stdout) == (2, "")
    assert "runs: there is no such run folder; did you mean 'run'?" in lost.stderr
