"""Where a run's time went: that the parts add up, and what is said of them."""

import json
import time
from dataclasses import replace

import pytest
import torch
import typer

from clients.local_sgd import LocalSGD
from fedsim import cli
from fedsim.client.job import ChunkJob, ChunkResult
from fedsim.client.plan import ExecutionPlan
from fedsim.engine.inline import InlineGrid
from fedsim.engine.work import ChunkWork, WorkOutcome
from fedsim.messages.layout import Payload
from fedsim.runs.advice import advice
from fedsim.runs.profile import Profile, screen
from fedsim.runs.round_report import RoundReport
from fedsim.runs.start import start
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed

SCENARIO = {
    "rounds": 3,
    "task": {"model": "logistic"},
    "data": {"name": "synthetic"},
    "partition": {"kind": "natural", "clients": 6},
    "participation": {"kind": "uniform", "cohort_size": 4},
    "engine": {"kind": "inline"},
}
LOOP_TIMES = {"configure": 0.5, "train": 6.0, "aggregate": 1.0, "evaluate": 2.0, "round": 10.0}


class Engine(InlineGrid):
    """An engine that says it has two workers."""

    num_workers = 2

    def __init__(self):
        super().__init__(lambda message, context: None, 9)


def profile(executor="vmap", chunk_size=4):
    found = Profile()
    found.watch(Engine(), ExecutionPlan(executor, "because", chunk_size))
    return found


def chunk(worker, seconds):
    job = ChunkJob("train", 1, (0, 1), (False, False), "", Payload())
    result = ChunkResult(None, {}, {}, {}, torch.tensor((10, 10)), {}, seconds=seconds)
    return ChunkWork(0, job, (0,), False, None), WorkOutcome(result, None, "", worker)


def end(found, server_round, times=LOOP_TIMES, writing=0.0):
    metrics = {f"time/{name}_s": seconds for name, seconds in times.items()}
    found.ended(RoundReport(server_round, None, metrics, (0, 1)), writing)


def test_training_is_told_apart_into_what_workers_did():
    found = profile()
    found._performed(5.0, [chunk(0, 3.0), chunk(1, 0.5), chunk(1, 0.5)])
    end(found, 1, writing=2.0)
    phases = {name: row["total_s"] for name, row in found.report()["phases"].items()}
    assert phases == {
        "training": 6.0,
        "computing": 2.0,  # 4 seconds of two workers
        "waiting": 1.0,  # the busiest had 3
        "transfer": 2.0,  # and nobody had anything to do for so long
        "checking": 1.0,
        "aggregation": 1.0,
        "evaluation": 2.0,
        "broadcast": 0.5,
        "writing": 2.0,
        "other": 0.5,
    }
    report = found.report()
    assert report["rounds_s"] == 12.0
    assert report["idle_share"] == pytest.approx(1 - 4 / 24)
    assert report["phases"]["training"]["share"] == 0.5
    assert report["chunks_per_round"] == 3


def test_the_first_round_and_round_0_stand_apart():
    found = profile()
    end(found, 0)
    end(found, 1, {**LOOP_TIMES, "round": 100.0})
    end(found, 2)
    end(found, 3, {**LOOP_TIMES, "train": 8.0, "round": 12.0})
    report = found.report()
    assert (report["first_round_s"], report["rounds"], report["rounds_s"]) == (100.0, 2, 22.0)
    training = report["phases"]["training"]
    assert (training["total_s"], training["median_s"]) == (14.0, 7.0)


@pytest.mark.parametrize(
    ("kind", "model", "options", "examples", "shares", "expected"),
    [
        # steps of 10: 4, 1, 2 and none; who has finished leaves, until two are left
        ("loop", "mlp", {}, (35, 4, 20, 0), (), (59, 59)),
        ("vmap", "mlp", {}, (35, 4, 20, 0), (), (160, 59)),
        ("batched", "mlp", {}, (35, 4, 20, 0), (), (90, 59)),
        ("batched", "mlp", {"momentum": 0.9}, (35, 4, 20, 0), (), (90, 59)),
        ("batched", "mlp", {"clip_norm": 1.0}, (35, 4, 20, 0), (), (160, 59)),
        ("batched", "cnn", {}, (35, 4, 20, 0), (), (59, 59)),
        ("vmap", "mlp", {}, (35, 4, 20, 0), (0.5, 1.0, 0.5, 1.0), (80, 34)),
        ("batched", "mlp", {}, (35, 4, 20, 0), (0.5, 1.0, 0.5, 1.0), (50, 34)),
        ("vmap", "mlp", {}, (20,), (), (40, 20)),
        ("batched", "mlp", {}, (20,), (), (40, 20)),
    ],
)
def test_padding_is_what_the_executor_computes_besides(
    kind, model, options, examples, shares, expected
):
    procedure = LocalSGD(batch_size=10, **options)
    executor = fed.make_executor(model, procedure, fed.InMemoryData(examples), kind=kind)
    given = replace(fed.job(executor, range(len(examples))), work=shares)
    result = executor.train(given)
    assert (result.computed, result.samples) == expected
    found = profile()
    found._performed(
        1.0, [(ChunkWork(0, given, (0,), False, None), WorkOutcome(result, None, "", 0))]
    )
    computed, samples = expected
    assert found.report()["padding_share"] == pytest.approx(1 - samples / computed)


def test_a_profiled_run_says_where_the_time_went_and_has_the_same_bits(tmp_path):
    scenario = Scenario.from_resolved(SCENARIO, "here")
    plain = start(scenario, out=tmp_path / "plain")
    begun = time.perf_counter()
    found = Profile(begun)
    profiled = start(scenario, out=tmp_path / "profiled", profile=found)
    took = time.perf_counter() - begun
    assert profiled.summary["params_sha256"] == plain.summary["params_sha256"]
    assert not (tmp_path / "plain" / "profile.json").exists()
    report = json.loads((tmp_path / "profiled" / "profile.json").read_text())
    assert report == json.loads(json.dumps(found.report()))
    phases = report["phases"]
    inside = ("computing", "waiting", "transfer", "checking")
    outside = sum(row["total_s"] for name, row in phases.items() if name not in inside)
    assert outside == pytest.approx(report["rounds_s"])
    assert sum(phases[n]["total_s"] for n in inside) == pytest.approx(phases["training"]["total_s"])
    assert phases["computing"]["total_s"] > 0
    whole = sum(report["starting_s"].values()) + report["first_round_s"] + report["rounds_s"]
    assert 0.3 * took < whole < took
    assert set(report["starting_s"]) == {"imports and scenario", "data, model and plan", "engine"}
    assert report["chunks_per_round"] == 2
    assert max(map(len, found.lines())) <= 80


# What is said.


def report_with(shares, **more):
    """A profile's report in which phases have these shares of a second."""
    found = profile(more.pop("executor", "vmap"), chunk_size=more.pop("chunk_size", 4))
    found._performed(1.0, [chunk(0, 1.0), chunk(1, 1.0)])
    end(found, 1)
    report = found.report()
    rows = {
        name: {"total_s": shares.get(name, 0.0), "median_s": 0.0, "share": shares.get(name, 0.0)}
        for name in report["phases"]
    }
    return {**report, "phases": rows, "starts_workers": False, **more}


@pytest.mark.parametrize(
    ("shares", "more", "words"),
    [
        ({"training": 0.9, "computing": 0.8}, {}, "nothing stands out: 80% of a round is"),
        ({"evaluation": 0.5}, {}, "evaluation takes 50%: [evaluation] every = 9 takes"),
        ({"writing": 0.3}, {}, "metrics and checkpoints take 30%: a larger [checkpoint] every"),
        ({"aggregation": 0.4}, {}, "aggregation takes 40%, on the server alone"),
        ({"waiting": 0.3}, {}, "workers wait 30% for the slowest: a smaller [engine] chunk_size"),
        ({"transfer": 0.4}, {}, "handing work out takes 40%: there is little to do per chunk"),
        (
            {"training": 0.9},
            {"chunks_per_round": 1, "clients_per_round": 20, "chunk_size": 32},
            "1 chunk per round for 2 workers: [engine] chunk_size = 10 lets more of them work",
        ),
        (
            {"training": 0.9},
            {"chunks_per_round": 1, "clients_per_round": 2},
            "1 chunk per round for 2 workers: there are too few clients",
        ),
        ({"computing": 0.9}, {"executor": "loop"}, "clients train one after another: because"),
        ({"computing": 0.9}, {"padding_share": 0.6}, "60% of the samples computed are padding"),
        (
            {"computing": 0.9},
            {"starts_workers": True, "starting_s": {"engine": 9.0}, "rounds_s": 1.0},
            "the start takes 9.00 s, all other rounds 1.00 s: for so short a run [engine] kind =",
        ),
    ],
)
def test_what_would_help_follows_from_the_numbers(shares, more, words):
    said = advice(report_with(shares, **more))
    assert said[0].startswith(words)
    assert len(said) == 1


def test_the_largest_gain_is_said_first():
    said = advice(report_with({"evaluation": 0.3, "aggregation": 0.4, "writing": 0.2}))
    assert [line.split()[0] for line in said] == ["aggregation", "evaluation", "metrics"]


def test_a_profile_without_rounds_or_engine_can_be_read():
    report = Profile().report()
    assert {row["share"] for row in report["phases"].values()} == {0.0}
    assert screen(report)[0].startswith("0 rounds: where the time went")


def test_what_failed_is_not_counted():
    found = profile()
    work, outcome = chunk(0, 3.0)
    found._performed(5.0, [(work, replace_fault(outcome)), chunk(1, 1.0)])
    end(found, 1)
    assert found.report()["phases"]["computing"]["total_s"] == 0.5


def replace_fault(outcome):
    return outcome._replace(value=None, fault="died")


def test_the_command_prints_the_profile_below_the_results(tmp_path, capsys):
    file = tmp_path / "tiny.toml"
    file.write_text(
        'rounds = 2\n[data]\nname = "synthetic"\n[partition]\nkind = "natural"\nclients = 3\n'
        '[engine]\nkind = "inline"\n'
    )
    command = typer.main.get_command(cli.app)
    arguments = ["run", str(file), "-q", "--profile"]
    for more in (["--out", str(tmp_path / "a")], ["--out", str(tmp_path / "b"), "--json"]):
        with pytest.raises(SystemExit) as ended:
            command.main([*arguments, *more], prog_name="fedsim")
        assert ended.value.code == 0
    text, document = capsys.readouterr().out.split("\n{", 1)
    assert "1 round after the first: where the time went" in text
    assert json.loads("{" + document)["profile"]["rounds"] == 1
