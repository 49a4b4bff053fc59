"""`fedsim compare`: killed and started again, failing runs, runs and studies that are there."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsim.basics.json_files import JsonLines, read_json
from fedsim.cli import app
from fedsim.runs import start as run
from fedsim.scenario.load import load
from tests.basics.processes import QUICKLY
from tests.studies.worlds import write

ROOT = Path(__file__).resolve().parents[3]
COMMAND = f"{QUICKLY}from fedsim.cli import main; main()"
ROUNDS = 60


def fedsim(*arguments):
    """The command line in this process; runs are made in processes of their own all the same."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def state(process):
    """The state of a process as the system has it; None when it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def children(process):
    """The processes that a process has started."""
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def without_times(record):
    return {name: value for name, value in record.items() if not name.startswith("time/")}


def until(holds, what):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A study of two strategies, one of which also has a run that diverges."""
    monkeypatch.chdir(tmp_path)
    lr = "client.local_lr=0.05,1e38"
    return [
        "compare", write(tmp_path, rounds=ROUNDS), "--vary", "strategy.name=fedavg,fedau",
        "--vary", lr, "--seeds", "2", "--out", "study", "--workers", "1", "--target",
        "test/accuracy=0.5",
    ]  # fmt: skip


@pytest.fixture
def killed(arguments):
    """The study's folder after a SIGKILL in the middle of its second or third run."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-c", COMMAND, *map(str, arguments), "-q"]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    study = Path("study")
    try:
        until(lambda: list(study.glob("cells/*/summary.json")), "no run has finished")
        begun = {p.parent for p in study.glob("cells/*/summary.json")}

        def in_the_middle():
            return any(
                12 <= file.read_bytes().count(b"\n") < ROUNDS
                for file in study.glob("cells/*/metrics.jsonl")
                if file.parent not in begun
            )

        until(in_the_middle, "no second run has begun")
        workers = children(parent.pid)
        assert workers
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    # nobody goes on with a run that nobody waits for
    until(lambda: all(state(each) in (None, "Z") for each in workers), "a worker goes on")
    return study


def test_killed_and_started_again_it_ends_as_if_undisturbed(arguments, killed):
    finished = {file: file.stat().st_mtime_ns for file in killed.glob("cells/*/summary.json")}
    cut = [f.parent for f in killed.glob("cells/*/metrics.jsonl")
           if f.with_name("summary.json") not in finished]  # fmt: skip
    assert finished
    assert cut

    ended = fedsim(*arguments, "--json")
    document = json.loads(ended.stdout)

    # what had finished was left alone, what was cut was gone on with
    assert finished == {file: file.stat().st_mtime_ns for file in finished}
    assert all("resumed from round" in (folder / "log.txt").read_text() for folder in cut)
    # a run that fails is named with its reason, the others go on, and the exit code says so
    assert ended.exit_code == document["exit_code"] == 1
    assert len(document["failures"]) == 4
    assert all("client.local_lr=1e38" in name for name in document["failures"])
    assert all("not finite" in reason for reason in document["failures"].values())

    # every run is the one that `fedsim run` makes
    ours = {v["strategy.name"]: v for v in document["variants"] if v["client.local_lr"] == "0.05"}
    values = {}
    for name, variant in ours.items():
        for made in variant["runs"]:
            overrides = [f"strategy.name={name}", "client.local_lr=0.05", f"seed={made['seed']}"]
            alone = Path(f"alone-{name}-{made['seed']}")
            run.start(load("tiny.toml", [*overrides, "engine.kind=inline"]), out=alone)
            history = JsonLines.read(alone / "metrics.jsonl")
            there = JsonLines.read(Path(made["folder"]) / "metrics.jsonl")
            assert list(map(without_times, history)) == list(map(without_times, there))
            late = [record["test/accuracy"] for record in history[-ROUNDS // 10 :]]
            values[name, made["seed"]] = math.fsum(late) / len(late)
            assert made["value"] == pytest.approx(values[name, made["seed"]], abs=1e-15)
            worst = [record["local/accuracy_worst_decile"] for record in history[-ROUNDS // 10 :]]
            assert made["worst_decile"] == pytest.approx(math.fsum(worst) / len(worst), abs=1e-15)
    assert [made["seed"] for made in ours["fedavg"]["runs"]] == [3, 4]
    (held,) = [d for d in document["differences"] if "0.05" in d["name"]]
    pairs = [values["fedau", seed] - values["fedavg", seed] for seed in (3, 4)]
    assert held["mean"] == pytest.approx(math.fsum(pairs) / 2, abs=1e-15)
    assert held["n"] == 2

    # the tables and pictures are there
    with Path("study/runs.csv").open() as file:
        assert {row["strategy.name"] for row in csv.DictReader(file)} == {"fedavg", "fedau"}
    for picture in ("curves.png", "differences.png"):
        assert Path("study", picture).read_bytes().startswith(b"\x89PNG")

    # the folder alone is enough to show it again, and nothing that finished runs again
    before = {f: f.stat().st_mtime_ns for f in Path("study").glob("cells/*/summary.json")}
    folders = [made["folder"] for variant in ours.values() for made in variant["runs"]]
    again = fedsim("compare", *folders, "--out", "again")
    assert again.exit_code == 0, again.output
    assert "minus fedavg" in again.output
    assert before == {f: f.stat().st_mtime_ns for f in before}
    shown = read_json(Path("again/compare.json"))
    assert {v["strategy.name"]: v["mean"] for v in shown["variants"]} == {
        name: variant["mean"] for name, variant in ours.items()
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no such scenario file"),
        (["quickstart", "--vary", "partition.alpha=0.1,-1"], "alpha = -1.0"),
        (["quickstart", "--seeds", "x"], "--seeds x: must be"),
        (["quickstart", "--last", "0"], "--last 0: must be in (0, 1]"),
        (["quickstart", "--metric", "tets/accuracy"], "did you mean 'test/accuracy'"),
        (["quickstart", "--metric", "test/acuracy"], "did you mean 'test/accuracy'"),
        (
            ["quickstart", "--target", "pooled/los=0.1"],
            "--target 'pooled/los' is not a metric that pooled records here",
        ),
        (["quickstart", "--target", "0.9"], "must be metric=value"),
        (["quickstart", "--workers", "0"], "--workers 0: must be >= 1"),
        (["quickstart", "--vary", "partition.alpha=0.1,1", "--baseline", "0.2"], "is none of"),
        (["quickstart", "--baseline", "0.2"], "there is one variant alone"),
        (["quickstart", "quickstart"], "quickstart: is there twice"),
        (
            ["quickstart", "--vary", "rounds=1,2", "--set", "rounds=3"],
            "--set rounds=3: is replaced by --vary rounds; leave one out",
        ),
    ],
)
def test_what_is_impossible_is_refused_before_anything_runs(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = fedsim("compare", *arguments)
    assert ended.exit_code == 2, ended.output
    assert said in ended.output
    assert not list(tmp_path.glob("studies/*/cells/*"))


def test_runs_and_scenarios_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenario = load(write(tmp_path, rounds=1), ["engine.kind=inline"])
    run.start(scenario, out=tmp_path / "one")
    assert "must be scenarios, or folders of runs" in fedsim("compare", "one", "tiny.toml").output
    assert "--set: changes scenarios" in fedsim("compare", "one", "--set", "rounds=2").output
    (tmp_path / "one/summary.json").unlink()
    command = f"`fedsim resume {Path('one').absolute()}` goes on with it"
    assert command in fedsim("compare", "one").output
