"""Laws 1 and 2 on a virtual clock: every strategy under every trigger, with late replies."""

import json
import shutil

import pytest

import fedsim
from fedsim.basics.json_files import JsonLines
from fedsim.engine.ahead import Ahead
from fedsim.runs import checkpoint as checkpoints
from fedsim.runs import clocked as clocked_grids
from fedsim.runs import execute
from fedsim.runs import start as runs
from fedsim.runs.checkpoint import Checkpoint
from fedsim.runs.clocked import outermost
from fedsim.scenario.choice import Choice
from tests.laws import federations as fed
from tests.laws.test_law_02_resume import SCENARIOS, scenario
from tests.laws.test_law_02_resume import outcome as whole_outcome

ROUNDS = 8
CLOCKS = {
    "all": {"trigger": "all", "job": {"law": "linear", "spread": 0.8}},
    "arrival": {"trigger": "arrival", "job": {"law": "linear", "spread": 0.8}},
    "count": {
        "trigger": "count",
        "count": 2,
        "restart": "at_once",
        "concurrency": 3,
        "job": {"law": "exponential"},
    },
    "window": {
        "trigger": "window",
        "window_s": 0.35,
        "job": {"law": "log_normal", "sigma": 0.6, "jitter": 0.2},
    },
}
WITH_DROP_OUT = {"drop_out": 0.3, "partial": 0.4, "speed_sigma": 0.5}


def serverless(tables):
    """Whether nodes average with their neighbours, which no clock serves."""
    if "topology" in tables:
        return True
    return Choice("strategies", tables.get("strategy", {"name": "fedavg"})).takes("topology")


# what clients, parts and strategies remember, under one trigger each; the others are slow
CASES = [
    pytest.param(
        name, trigger, id=f"{name}-{trigger}",
        marks=[] if place % len(CLOCKS) == number else [pytest.mark.slow],
    )
    for place, name in enumerate(n for n, tables in SCENARIOS.items() if not serverless(tables))
    for number, trigger in enumerate(CLOCKS)
]  # fmt: skip


def outcome(folder):
    """All that a run leaves behind but for its chunks: jobs under way are trained again."""
    found = whole_outcome(folder)
    found.pop("chunks")
    return found


def clocked(name, trigger, **more):
    tables = {**SCENARIOS[name], "clock": CLOCKS[trigger], **more}
    if trigger == "count":  # more clients than jobs, so that it matters who begins
        tables["participation"] = {"kind": "full"}
    return scenario(**tables).with_overrides([f"rounds={ROUNDS}"])


def cut_back(folder, to, server_round):
    """A copy of a run as it was killed some time after a round's checkpoint."""
    shutil.copytree(folder, to)
    (to / "summary.json").unlink()
    for file in (to / "checkpoints").iterdir():
        if int(file.stem.removeprefix("round_")) > server_round:
            file.unlink()


@pytest.mark.parametrize(("name", "trigger"), CASES)
def test_a_clocked_run_is_resumed_with_its_jobs_under_way(name, trigger, tmp_path):
    runs.start(clocked(name, trigger), out=tmp_path / "run")
    expected = outcome(tmp_path / "run")
    places = sorted({min(place, expected["summary"]["rounds"] - 1) for place in (1, 5)})
    for server_round in places:
        cut_back(tmp_path / "run", tmp_path / f"{server_round}", server_round)
        fedsim.resume(tmp_path / f"{server_round}")
        assert outcome(tmp_path / f"{server_round}") == expected, server_round
    if trigger != "all" and expected["summary"]["rounds"] == ROUNDS:
        assert under_way(tmp_path / "run", places[-1])["jobs"]
        assert any(r.get("clock/staleness_max") for r in expected["metrics"])


def under_way(folder, server_round):
    """The clock of a checkpoint."""
    found: Checkpoint = checkpoints.load(
        folder / "checkpoints" / f"round_{server_round:06d}.safetensors"
    )
    return found.clock


def test_a_run_whose_jobs_are_lost_is_another_run(tmp_path):
    """The control: were jobs under way not in the checkpoint, the test above would notice."""
    runs.start(clocked("sgd", "arrival"), out=tmp_path / "run")
    cut_back(tmp_path / "run", tmp_path / "cut", 5)
    place = checkpoints.latest(tmp_path / "cut" / "checkpoints")
    saved = checkpoints.load(place)
    assert saved.clock["jobs"]
    saved.clock["jobs"].clear()
    checkpoints.save(place.parent, saved, keep=100)
    fedsim.resume(tmp_path / "cut")
    assert outcome(tmp_path / "cut")["params"] != outcome(tmp_path / "run")["params"]


@pytest.mark.parametrize("trigger", CLOCKS)
def test_clients_that_drop_out_or_do_a_part_are_resumed_too(trigger, tmp_path):
    devices = WITH_DROP_OUT | ({"deadline": 2.0} if trigger == "all" else {})
    runs.start(clocked("sgd", trigger, devices=devices), out=tmp_path / "run")
    expected = outcome(tmp_path / "run")
    assert any(r.get("clients/absent") for r in expected["metrics"])
    cut_back(tmp_path / "run", tmp_path / "cut", 4)
    fedsim.resume(tmp_path / "cut")
    assert outcome(tmp_path / "cut") == expected


def test_every_strategy_is_resumed_on_a_clock():
    of_strategies = {name for name in SCENARIOS if name.startswith("strategy ")}
    served = {case.values[0] for case in CASES}
    left = {name.removeprefix("strategy ") for name in of_strategies - served}
    assert left == {"gossip", "variance_corrected_gossip"}
    assert len(of_strategies) == len(fed.strategies())


@pytest.mark.usefixtures("lent_workers")
@pytest.mark.parametrize(
    "name",
    ["sgd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dropout", "strategy scaffold"))],
)
def test_workers_of_ray_give_the_bits_of_one_process(name, tmp_path):
    for trigger in ("arrival", "count", "window"):
        alone = tmp_path / f"{trigger} alone"
        runs.start(clocked(name, trigger), out=alone)
        beside = clocked(name, trigger).with_overrides(["engine.kind=ray"])
        runs.start(beside, out=tmp_path / trigger, workers=2)
        one, other = outcome(alone), outcome(tmp_path / trigger)
        assert one["metrics"] == other["metrics"]
        assert one["params"] == other["params"]
        assert one["participation"] == other["participation"]


# one model for each way of training, and one with a procedure that follows rounds
TOGETHER = {
    "batched": {},
    "batched, one by one": {"task": {"model": "cnn"}},
    "vmap": {"task": {"model": "cnn_batchnorm"}},
    "dropout": {"task": {"model": "mlp_dropout", "hidden": [8]}},
    "loop": {"task": {"model": "mlp", "hidden": [8]}, "engine": {"executor": "loop"}},
    "decay": {"client": {"lr_decay": 0.8}},
    "states": {"strategy": {"name": "scaffold"}},
    "adam": {"client": {"optimizer": "adam", "local_lr": 0.01, "keep_optimizer": True}},
    "compressed": {"strategy": {"name": "ef21"}},
    "poisoned": {"attack": {"kind": "label_flip", "num_byzantine": 2}},
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_trained_ahead_has_the_bits_of_one_at_a_time(name, tmp_path, monkeypatch):
    """All jobs under way in one batch, or each when it is due."""

    def ran(place):
        tables = {**TOGETHER[name], "clock": CLOCKS["count"], "participation": {"kind": "full"}}
        tables["engine"] = {"chunk_size": 4, **tables.get("engine", {})}
        runs.start(scenario(**tables).with_overrides([f"rounds={ROUNDS}"]), out=tmp_path / place)
        found = whole_outcome(tmp_path / place)
        return found, found.pop("chunks")

    together, chunks = ran("together")
    monkeypatch.setattr(
        execute, "outermost", lambda grid, world, engine: outermost(grid, world, None)
    )
    alone, apart = ran("alone")
    assert together == alone
    if name != "decay":  # whose rounds are trained apart
        assert chunks.count("\n") < apart.count("\n")


def test_no_more_is_kept_than_jobs_are_under_way(tmp_path, monkeypatch):
    kept = []

    class Counted(Ahead):
        def answered(self, cohort, train, store):
            found = super().answered(cohort, train, store)
            kept.append(len(self._finished))
            return found

    monkeypatch.setattr(clocked_grids, "Ahead", Counted)
    runs.start(clocked("sgd", "arrival"), out=tmp_path / "run")
    assert len(kept) == ROUNDS
    assert 0 < max(kept) <= 6


def test_who_is_late_is_written_down(tmp_path):
    runs.start(clocked("sgd", "arrival"), out=tmp_path / "run")
    rounds = JsonLines.read(tmp_path / "run" / "participation.jsonl")
    at_work = {}
    for record in rounds:
        at_work |= dict.fromkeys(record["started"], record["round"])
        for client in record["selected"]:
            begun = at_work.pop(client)
            assert record["staleness"].get(str(client), 0) == record["round"] - begun
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"]["time/virtual_s"]
