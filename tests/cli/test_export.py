"""`fedsim export` on the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from fedsim.cli import app

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--set", "rounds=1", "--set", "engine.kind=inline", "--set", "expect={}", "--quiet",
    "--set", "evaluation.keep_best=test/accuracy",
)  # fmt: skip


def fedsim(*arguments):
    return CliRunner().invoke(app, arguments)


def in_a_process(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "fedsim", *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip


def test_a_finished_run_is_exported_and_a_wrong_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fedsim("run", "quickstart", *SMALL, "--out", "run").exit_code == 0
    done = in_a_process(tmp_path, "export", "run", "--best", "--to", "out/model", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["folder"], document["round"]) == (0, "out/model", 1)
    assert document["files"] == sorted(each.name for each in (tmp_path / "out/model").iterdir())
    again = fedsim("export", "run", "--to", "out/model")
    assert again.exit_code == 2
    assert again.stderr.startswith("fedsim: --to out/model: is not empty")
    lost = fedsim("export", "runs", "--to", "model")
    assert (lost.exit_code, lost.stdout) == (2, "")
    assert "runs: there is no such run folder; did you mean 'run'?" in lost.stderr
