"""`fedsim tune`: what is tried follows from the outcomes, and the test set is never looked at."""

import json
import math

import pytest
from typer.testing import CliRunner

from fedsim.basics.json_files import JsonLines, read_json
from fedsim.cli import app
from fedsim.studies.tuning.tune import Candidate, best_first
from tests.studies.worlds import write

SEEDS = [1003, 1004]


def tune(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def late(values, share=0.1):
    kept = values[-max(1, int(len(values) * share)) :]
    return math.fsum(kept) / len(kept)


@pytest.mark.slow
def test_the_best_is_found_on_validation_data_and_the_grid_widens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenario = write(tmp_path, rounds=10)
    asked = [
        scenario, "--vary", "strategy.name=fedavg,fedau", "--grid",
        "client.local_lr=0.0001,0.001,0.01,0.1", "--seeds", "2", "--workers", "1", "--out", "study",
        "--widen", "1", "--keep", "0.5", "--json",
    ]  # fmt: skip
    ended = tune(*asked)
    assert ended.exit_code == 0, ended.output
    document = json.loads(ended.stdout)
    assert document["seeds"] == SEEDS

    # every value is that of the run's own record, of the split that clients kept for themselves
    found = {}
    for folder in (tmp_path / "study/cells").iterdir():
        made = read_json(folder / "scenario.json")
        assert made["partition"]["test_fraction"] == 0.25  # the scenario's own
        assert made["evaluation"]["pooled"]
        history = JsonLines.read(folder / "metrics.jsonl")[1:]
        key = made["strategy"]["name"], made["client"]["local_lr"], made["seed"]
        found[key] = late([record["pooled/accuracy"] for record in history])
    shown = {
        (c["method"].partition("=")[2], float(c["point"]["client.local_lr"]), int(seed)): value
        for c in document["candidates"]
        for seed, value in c["values"].items()
    }
    # (what a narrower grid let go on further is made and not counted)
    assert shown == pytest.approx({key: found[key] for key in shown})

    # the same grid for all: where the best of one lies on the edge, all try what is beyond
    grid = [float(value) for value in document["grid"]["client.local_lr"]]
    tried = {name: {lr for n, lr, _ in found if n == name} for name in ("fedavg", "fedau")}
    assert tried["fedavg"] == tried["fedau"] == set(grid)
    assert grid == [0.0001, 0.001, 0.01, 0.1, 1.0]

    # of five, three go on after the first seed: the best three
    for place, name in enumerate(("fedavg", "fedau")):
        first = {lr: value for (n, lr, seed), value in found.items() if n == name and seed == 1003}
        going = sorted(first, key=lambda lr: (-first[lr], grid.index(lr)))[:3]
        candidates = [c for c in document["candidates"] if c["method"].endswith(name)]
        stopped = {float(c["point"]["client.local_lr"]) for c in candidates if c["stopped"]}
        assert stopped == set(grid) - set(going)
        means = {lr: (first[lr] + found[name, lr, 1004]) / 2 for lr in going}
        best = max(going, key=lambda lr: (means[lr], -grid.index(lr)))
        assert document["best"][place]["set"] == [f"client.local_lr={best:g}"]

    # the same command again runs nothing and says the same
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "study").glob("cells/*/summary.json")}
    assert json.loads(tune(*asked).stdout) == document
    assert before == {f: f.stat().st_mtime_ns for f in before}
    assert (tmp_path / "study/tune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metric", "test/accuracy"], "tuning must not see; choose by pooled/accuracy"),
        (["--grid", "client.local_lrr=1,2"], "did you mean 'local_lr'?"),
        (["--grid", "client.local_lr"], "--grid client.local_lr: must be"),
        (["--random", "0"], "--random 0: must be >= 1"),
        (["--random", "3", "--grid", "client.local_lr=0,1"], "all must be > 0"),
        (["--vary", "client.local_lr=1,2"], "is replaced by --grid client.local_lr"),
        (
            ["--vary", "strategy.name=fedavg,fedau", "--grid", 'strategy={name="fedavg"}'],
            "--vary strategy.name: is replaced by --grid strategy",
        ),
        (
            ["--set", "client.local_epochs=3", "--grid", "client.local_epochs=1,2"],
            "--set client.local_epochs=3: is replaced by --grid client.local_epochs",
        ),
        (["--set", "evaluation.pooled=false"], "which takes evaluation.pooled=true; leave it out"),
        (["--keep", "0"], "--keep 0: must be in (0, 1]"),
        (["--widen", "-1"], "--widen -1: must be >= 0"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_runs(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = tune("quickstart", *arguments)
    assert ended.exit_code == 2, ended.output
    assert said in ended.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sign", [1, -1])
def test_means_that_are_equal_but_for_rounding_go_in_the_order_of_the_grid(sign):
    """0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1 in floats, as means over seeds are."""
    orders = ((0.3, 0.2, 0.1), (0.1, 0.2, 0.3), (0.2, 0.3, 0.1))
    found = [
        Candidate(0, (str(place),), dict(enumerate(values)), None, True)
        for place, values in enumerate([*orders, (0.3 + sign * 0.1, 0.2, 0.1)])
    ]
    assert [c.point[0] for c in best_first(found, sign)] == ["3", "0", "1", "2"]
    assert best_first([], sign) == []


def test_a_metric_that_is_never_recorded_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = tune("quickstart", "--metric", "pooled/acuracy", "--out", "study")
    assert ended.exit_code == 2, ended.output
    assert "did you mean 'pooled/accuracy'" in ended.output
    assert not list(tmp_path.glob("study/cells/*"))
