"""Runs on a virtual clock: what they become where nobody is late, foreign strategies, refusals."""

import json

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.runs import start as runs
from fedsim.scenario.scenario import Scenario

CLIENTS = 6
LINEAR = {"law": "linear", "spread": 0.8}
SIX = [2.0, 1.0, 0.5, 3.0, 0.25, 1.5]


def scenario(**tables):
    document = {
        "seed": 5,
        "rounds": 6,
        "data": {"name": "digits", "test_fraction": 0.8},
        "partition": {"kind": "dirichlet", "clients": CLIENTS, "alpha": 0.5},
        "client": {"local_lr": 0.1, "batch_size": 16},
        "engine": {"kind": "inline", "chunk_size": 2},
    }
    for name, table in tables.items():
        document[name] = table if name not in document else {**document[name], **table}
    return Scenario.from_resolved(document, origin="tests/clocked.toml")


def ran(folder, **tables):
    """What a run recorded, and its model."""
    rounds = tables.pop("rounds", 6)
    runs.start(scenario(**tables).with_overrides([f"rounds={rounds}"]), out=folder)
    return {
        "metrics": JsonLines.read(folder / "metrics.jsonl"),
        "participation": JsonLines.read(folder / "participation.jsonl"),
        "summary": json.loads((folder / "summary.json").read_text()),
        "params": (folder / "params.safetensors").read_bytes(),
    }


def measures(found):
    return [
        {k: v for k, v in record.items() if k.partition("/")[0] in ("test", "train", "comm")}
        for record in found["metrics"]
    ]


# --- where nobody is late -------------------------------------------------------------------------

NOBODY_LATE = {
    "all": ({"trigger": "all"}, {"name": "fedavg", "weighted": False}),
    "fedfix": ({"trigger": "window", "window_s": 1.0}, {"name": "fedfix"}),
    "fedfix, samples": (
        {"trigger": "window", "window_s": 1.5},
        {"name": "fedfix", "importance": "samples"},
    ),
    "fedbuff": ({"trigger": "count", "count": CLIENTS}, {"name": "fedbuff"}),
}


@pytest.mark.parametrize("name", NOBODY_LATE)
@pytest.mark.parametrize("task", [{}, {"model": "cnn_batchnorm"}], ids=["logistic", "batchnorm"])
def test_where_all_are_waited_for_a_clock_changes_no_bit(name, task, tmp_path):
    clock, strategy = NOBODY_LATE[name]
    weighted = strategy.get("importance") == "samples"
    plain = ran(tmp_path / "plain", task=task, strategy={"name": "fedavg", "weighted": weighted})
    late = ran(tmp_path / "late", task=task, strategy=strategy, clock={**clock, "job": LINEAR})
    assert late["params"] == plain["params"]
    for mine, theirs in zip(late["metrics"], plain["metrics"], strict=True):
        for key in theirs:
            if key.startswith(("test/", "train/", "comm/", "clients/")):
                assert mine[key] == theirs[key], key
    assert max(r.get("clock/staleness_max", 0) for r in late["metrics"]) == 0
    per_round = clock.get("window_s", 1.0)
    assert late["summary"]["final"]["time/virtual_s"] == pytest.approx(6 * per_round)


def test_one_client_is_sequential_sgd_under_every_trigger(tmp_path):
    alone = {"partition": {"clients": 1}, "strategy": {"name": "fedavg"}}
    plain = ran(tmp_path / "plain", **alone)
    for trigger in ({"trigger": "arrival"}, {"trigger": "count", "count": 1}):
        found = ran(tmp_path / trigger["trigger"], **alone, clock={**trigger, "job": LINEAR})
        assert found["params"] == plain["params"]


def test_late_replies_give_another_model(tmp_path):
    """The control: a clock that does not wait is not the federation that does."""
    plain = ran(tmp_path / "plain", strategy={"name": "fedavg"})
    late = ran(
        tmp_path / "late",
        strategy={"name": "fedavg"},
        clock={"trigger": "count", "count": 3, "job": LINEAR},
    )
    assert late["params"] != plain["params"]
    assert max(r.get("clock/staleness_max", 0) for r in late["metrics"]) > 0


# --- time -----------------------------------------------------------------------------------------


def test_a_list_of_times_is_followed(tmp_path):
    clock = {"trigger": "arrival", "job": {"law": "list", "seconds": SIX}}
    found = ran(tmp_path / "run", clock=clock, rounds=8)
    # 0.25 0.5 0.5 0.75 1.0 1.0 1.0 1.25: client 4, then 2 and 4, 4, then 1, 2 and 4, 4
    assert [r["selected"] for r in found["participation"]] == [
        [4], [2], [4], [4], [1], [2], [4], [4],
    ]  # fmt: skip
    moments = [r["time/virtual_s"] for r in found["metrics"][1:]]
    assert moments == pytest.approx([0.25, 0.5, 0.5, 0.75, 1.0, 1.0, 1.0, 1.25])


def test_download_and_upload_are_part_of_a_job(tmp_path):
    job = {"law": "list", "seconds": SIX, "download_s": 0.5, "upload_s": 0.25}
    found = ran(tmp_path / "run", clock={"trigger": "all", "job": job}, rounds=2)
    assert [r["time/virtual_s"] for r in found["metrics"][1:]] == pytest.approx([3.75, 7.5])


def test_steps_take_time(tmp_path):
    clock = {"trigger": "all", "job": {"step_s": 0.5}}
    found = ran(tmp_path / "run", clock=clock, client={"local_steps": 7}, rounds=1)
    assert found["metrics"][1]["time/virtual_s"] == pytest.approx(3.5)


def test_a_run_ends_before_its_first_aggregation_after_the_end(tmp_path):
    clock = {"trigger": "window", "window_s": 0.5, "stop_s": 2.2, "job": LINEAR}
    found = ran(tmp_path / "run", clock=clock, rounds=50, evaluation={"every": 100})
    assert found["summary"]["rounds"] == 4
    assert found["metrics"][-1]["time/virtual_s"] == pytest.approx(2.0)
    assert "test/accuracy" in found["metrics"][-1]  # the last round is evaluated
    assert "stop_s" in found["summary"]["stopped"]


def test_a_deadline_bounds_a_round_that_waits_for_all(tmp_path):
    devices = {"speed_sigma": 1.0, "deadline": 1.25}
    clock = {"trigger": "all", "job": {"job_s": 2.0}}
    found = ran(tmp_path / "run", devices=devices, clock=clock, rounds=3)
    late = [r["clients/late"] for r in found["metrics"][1:]]
    assert all(late)
    # to one tick
    assert [r["time/virtual_s"] for r in found["metrics"][1:]] == pytest.approx([2.5, 5, 7.5])


def test_a_slow_device_takes_longer(tmp_path):
    clock = {"trigger": "all", "job": {"job_s": 2.0}}
    steady = ran(tmp_path / "steady", clock=clock, rounds=1)
    spread = ran(tmp_path / "spread", clock=clock, rounds=1, devices={"speed_sigma": 1.0})
    times = [each["metrics"][1]["time/virtual_s"] for each in (steady, spread)]
    assert times[0] == 2.0 < times[1]
    assert steady["params"] == spread["params"]  # nobody is left out


def test_what_drops_out_counts_for_no_trigger(tmp_path):
    clock = {"trigger": "count", "count": 2, "job": LINEAR}
    found = ran(tmp_path / "run", clock=clock, rounds=20, devices={"drop_out": 0.3})
    assert {r["clients/replied"] for r in found["metrics"][1:]} == {2}
    assert sum(r["clients/absent"] for r in found["metrics"][1:]) > 5


def test_an_empty_window_is_an_aggregation_that_leaves_the_model(tmp_path):
    clock = {"trigger": "window", "window_s": 0.1, "job": {"law": "constant"}}
    found = ran(tmp_path / "run", clock=clock, rounds=11)
    replied = [r["clients/replied"] for r in found["metrics"][1:]]
    assert replied == [0] * 9 + [CLIENTS] + [0]
    losses = [r["test/loss"] for r in found["metrics"]]
    assert len(set(losses[:10])) == 1
    assert losses[10] != losses[0]
    assert found["metrics"][10]["clock/staleness_mean"] == 9


def test_who_is_busy_begins_nothing_and_room_is_filled_at_once(tmp_path):
    for restart in ("on_aggregation", "at_once"):
        clock = {
            "trigger": "count", "count": 3, "concurrency": 3, "restart": restart, "job": LINEAR,
        }  # fmt: skip
        found = ran(tmp_path / restart, clock=clock, rounds=12)
        at_work: set[int] = set()
        for record in found["participation"]:
            begun = set(record["started"])
            assert not at_work & begun
            at_work = (at_work | begun) - set(record["selected"])
            assert len(at_work) <= 3
        staleness = max(r.get("clock/staleness_max", 0) for r in found["metrics"])
        assert (staleness > 0) == (restart == "at_once")


# --- foreign strategies ---------------------------------------------------------------------------

FLOWERS = (
    "FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedMedian", "FedTrimmedAvg", "Krum",
    "MultiKrum", "Bulyan", "QFedAvg", "FedProx",
)  # fmt: skip


@pytest.mark.parametrize("trigger", ["count", "window"])
@pytest.mark.parametrize("name", FLOWERS)
def test_strategies_of_flower_run_on_a_clock(name, trigger, tmp_path):
    keys = {"count": {"count": 4}, "window": {"window_s": 0.7}}[trigger]
    parts = {"FedProx": {"proximal_mu": 0.1}, "QFedAvg": {"client_learning_rate": 0.1}}
    found = ran(
        tmp_path / "run",
        strategy={"name": f"flower:{name}", **parts.get(name, {})},
        clock={"trigger": trigger, **keys, "job": LINEAR},
        rounds=12,
    )
    assert max(r.get("clock/staleness_max", 0) for r in found["metrics"]) > 0
    assert found["metrics"][-1]["test/loss"] < found["metrics"][0]["test/loss"]


def test_a_foreign_average_moves_the_model_of_now_as_ours_does(tmp_path):
    """Flower's FedAvg averages models; a late one is handed to it moved to the model of now."""
    clock = {"trigger": "count", "count": 3, "job": LINEAR}
    ours = ran(tmp_path / "ours", strategy={"name": "fedavg"}, clock=clock, rounds=10)
    theirs = ran(tmp_path / "theirs", strategy={"name": "flower:FedAvg"}, clock=clock, rounds=10)
    for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert mine["test/loss"] == pytest.approx(other["test/loss"], rel=1e-5)


def test_a_foreign_strategy_hears_of_every_round(tmp_path):
    clock = {"trigger": "window", "window_s": 0.15, "job": LINEAR}
    found = ran(tmp_path / "run", strategy={"name": "flower:FedAdam"}, clock=clock, rounds=12)
    begun = [r["started"] for r in found["participation"]]
    assert any(not started for started in begun)
    assert found["summary"]["rounds"] == 12


# --- refusals -------------------------------------------------------------------------------------

REFUSED = [
    ({"trigger": "sometimes"}, r"\[clock\] trigger = \"sometimes\": must be 'all', 'arrival'"),
    ({"trigger": "count"}, r"trigger = .count. needs the key 'count'"),
    ({"trigger": "window"}, r"trigger = .window. needs the key 'window_s'"),
    ({"trigger": "arrival", "count": 3}, r"count changes nothing with trigger = .arrival."),
    ({"count": 3}, r"count changes nothing with trigger = .all."),
    ({"restart": "at_once"}, r"restart = 'at_once' changes nothing where the trigger is 'all'"),
    ({"trigger": "count", "count": 7}, r"count = 7 replies never come: 6 jobs are under way"),
    (
        {"trigger": "count", "count": 3, "concurrency": 2},
        r"count = 3 replies never come: only concurrency = 2",
    ),
    ({"trigger": "arrival", "concurrency": 9}, r"concurrency = 9: .* at most 6"),
    ({"trigger": "arrival", "speed": 3}, r"'speed' is not a key of \[clock\]"),
    ({"job": {"laws": "list"}}, r"'laws' is not a key of \[clock.job\].*law"),
    ({"job": {"law": "list"}}, r"law = .list. needs the key 'seconds'"),
    ({"job": {"law": "list", "seconds": [1.0]}}, r"job.seconds has 1 numbers, and there are 6"),
    ({"job": {"law": "list", "seconds": SIX, "job_s": 2.0}}, r"job_s changes nothing"),
    ({"job": {"spread": 0.5}}, r"spread changes nothing with law = .constant."),
    ({"job": {"law": "linear", "spread": 1.0}}, r"spread = 1.0: must be < 1"),
    ({"job": {"law": "log_normal"}}, r"needs 'sigma', 'jitter' or both"),
    ({"job": {"job_s": 1.0, "step_s": 1.0}}, r"job_s and step_s: give one of them"),
    ({"trigger": "window", "window_s": 1e-9}, r"window_s = 1e-09 is shorter than tick_s"),
]


@pytest.mark.parametrize(("clock", "message"), REFUSED)
def test_what_cannot_be_is_refused(clock, message):
    with pytest.raises(ScenarioError, match=message):
        scenario(clock=clock)


def test_a_clock_that_waits_for_nobody_takes_no_deadline_and_no_graph():
    clock = {"trigger": "arrival"}
    with pytest.raises(ScenarioError, match=r"\[devices\] deadline = 2 with \[clock\] trigger"):
        scenario(clock=clock, devices={"deadline": 2.0})
    with pytest.raises(ScenarioError, match=r"\[clock\] trigger = .arrival. with \[topology\]"):
        scenario(clock=clock, strategy={"name": "gossip"}, topology={"kind": "ring"})


def test_speeds_need_a_clock_or_a_deadline():
    with pytest.raises(ScenarioError, match=r"speed_sigma = 0.5 changes nothing .* \[clock\]"):
        scenario(devices={"speed_sigma": 0.5})
    scenario(devices={"speed_sigma": 0.5}, clock={"trigger": "arrival"})


def test_metrics_of_a_clock_can_be_claimed_where_there_is_one():
    claim = {"time/virtual_s": {"max": 9.0}, "clock/staleness_max": {"max": 5}}
    scenario(clock={"trigger": "arrival"}, expect=claim)
