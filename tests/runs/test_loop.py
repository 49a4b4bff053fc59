"""The round loop: evaluation, early stop, policies, hooks, foreign strategies, set-up, personal."""

import fcntl
import itertools
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from fedsim.basics.errors import CheckpointError, RunError, ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.federation.grids.participation import ParticipationGrid
from fedsim.messages.failures import Failure
from fedsim.messages.layout import Payload
from fedsim.messages.records import model_tensors, named_tensors
from fedsim.runs import folder as run_folder
from fedsim.runs import start as run
from fedsim.runs.checkpoint import tensors_sha256
from fedsim.runs.client_metrics import spread
from fedsim.runs.loop import RoundLoop
from fedsim.runs.policy import EarlyStop, Policy
from fedsim.runs.world import build
from fedsim.scenario.load import load
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.declarations import Setup

SMALL = [
    "partition.clients=8",
    "participation.cohort_size=4",
    "engine.kind=inline",
    "rounds=3",
    "task.hidden=[8]",
    "client.local_epochs=1",
]


def small(*overrides):
    return load("quickstart", [*SMALL, *overrides])


def grids(world):
    engine = InlineGrid(world.app, world.data.num_clients)
    admitted = AdmissionGrid(ByteCountingGrid(engine), world.layout)
    return ParticipationGrid(admitted, world.participation, seed=world.scenario.seed)


class Recorder:
    def __init__(self):
        self.reports = []

    def round_ended(self, report):
        self.reports.append(report)


def history(result):
    return JsonLines.read(result.folder / "metrics.jsonl")


# --- evaluation and early stop


def test_model_is_evaluated_every_k_rounds_and_at_the_end(tmp_path):
    result = run.start(small("rounds=5", "evaluation.every=2"), out=tmp_path / "run")
    measured = [r["round"] for r in history(result) if "test/accuracy" in r]
    assert measured == [0, 2, 4, 5]


def test_clients_evaluate_on_their_own_test_split(tmp_path):
    scenario = small("evaluation.clients=5", "partition.test_fraction=0.25", "partition.alpha=10.0")
    final = run.start(scenario, out=tmp_path / "run").summary["final"]
    assert 0 <= final["local/accuracy_worst_decile"] <= final["local/accuracy_mean"] <= 1
    assert final["local/accuracy_variance"] >= 0
    assert final["comm/evaluate_downlink_bytes"] > final["comm/evaluate_uplink_bytes"] > 0


def test_local_evaluation_equals_evaluating_each_client_by_itself():
    world = build(small("partition.test_fraction=0.3", "partition.alpha=10.0"))
    executor, data = world.app.executor, world.data
    grid = grids(world)
    messages = world.strategy.configure_evaluate(1, world.arrays, ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    params, buffers = model_tensors(world.layout, world.arrays)
    for place, client in enumerate(replies.client_ids.tolist()):
        drawn = data.clients([client], split="test")
        rows = drawn.rows[0]
        alone = executor.evaluate_arrays(params, buffers, drawn.features[rows], drawn.targets[rows])
        assert int(replies.num_examples[place]) == len(rows)
        for name, value in alone.items():
            assert float(replies.metrics[name][place]) == pytest.approx(value, abs=1e-6)


def test_spread_takes_the_worst_tenth_by_the_metric_s_own_direction():
    from flwr.app import Message, MetricRecord, RecordDict

    from fedsim.messages import flower_internals as internals

    def message(accuracy, loss, examples=1):
        metadata = internals.instruction_metadata(
            run_id=1, message_id="1", node_id=2, message_type="evaluate", group_id="", ttl=1.0,
            created_at=1.0,
        )  # fmt: skip
        numbers = MetricRecord({"num-examples": examples, "accuracy": accuracy, "loss": loss})
        content = RecordDict({"metrics": numbers})
        return internals.message_with(metadata, content=content)

    replies: list[Message] = [message(a / 20, a / 10) for a in range(20)]
    found = spread([*replies, message(-5.0, 99.0, examples=0)])
    assert found["local/accuracy_worst_decile"] == pytest.approx((0 + 1) / 2 / 20)
    assert found["local/loss_worst_decile"] == pytest.approx((18 + 19) / 2 / 10)
    assert found["local/accuracy_variance"] == pytest.approx(np.var(np.arange(20) / 20))


@pytest.mark.parametrize(
    ("stop", "values", "reason"),
    [
        (EarlyStop("m", target=0.5), [0.1, 0.4], None),
        (EarlyStop("m", target=0.5), [0.1, 0.6], "reached the target"),
        (EarlyStop("m", target=0.5, mode="min"), [0.9, 0.4], "reached the target"),
        (EarlyStop("m", patience=2), [0.1, 0.3, 0.2], None),
        (EarlyStop("m", patience=2), [0.1, 0.3, 0.2, 0.3], "not improved for 2"),
        (EarlyStop("m", patience=2, mode="min"), [0.3, 0.1, 0.2, 0.2], "not improved for 2"),
        (EarlyStop("m", patience=1), [], None),
        # what rounding alone makes better is not better, and what it alone keeps below is there
        (EarlyStop("m", patience=2), [0.3, 0.1 + 0.2, 0.3], "not improved for 2"),
        (EarlyStop("m", patience=2, mode="min"), [0.1 + 0.2, 0.3, 0.3], "not improved for 2"),
        (EarlyStop("m", patience=2), [math.nan, math.nan, 0.1], None),
        (EarlyStop("m", target=0.1 + 0.2), [0.3], "reached the target"),
        (EarlyStop("m", target=0.3, mode="min"), [0.1 + 0.2], "reached the target"),
        (EarlyStop("m", target=0.3), [math.nan], None),
    ],
)
def test_early_stop_decides_from_the_record(stop, values, reason):
    found = stop.reason([{"m": value} for value in values] + [{"other": 1.0}])
    assert (found is None) if reason is None else (reason in found)


def test_a_run_that_reaches_its_target_stops_and_resuming_does_not_go_on(tmp_path):
    scenario = small('evaluation.stop={metric="test/loss", target=10.0, mode="min"}', "rounds=9")
    first = run.start(scenario, out=tmp_path / "run")
    assert "reached the target" in first.summary["stopped"]
    assert first.summary["rounds"] == 1  # round 0 is recorded within the first round
    again = run.resume(first.folder)
    assert again.summary["rounds"] == first.summary["rounds"]
    assert again.summary["params_sha256"] == first.summary["params_sha256"]


# --- policies


def failure(client, cause):
    return Failure(client, 3, cause, "a reason")


def test_policy_skip_lets_a_round_with_enough_replies_stand():
    Policy("skip", min_replies=2).judge(3, 4, [failure(1, "raised"), failure(2, "hung")])


@pytest.mark.parametrize(
    ("policy", "failures", "message"),
    [
        (Policy("stop"), [failure(7, "raised")], "client 7, round 3: raised"),
        (
            Policy(required=frozenset([2])),
            [failure(1, "raised"), failure(2, "died")],
            r"client 2, round 3: died.*client 2 is among \[deployment\] required",
        ),
        (Policy(min_replies=3), [failure(1, "hung"), failure(2, "died")], "2 of 4 clients replied"),
    ],
)
def test_policy_ends_the_run_with_the_client_named(policy, failures, message):
    with pytest.raises(RunError, match=message):
        policy.judge(3, 4, failures)


def test_drop_out_is_no_failure_and_a_second_reply_takes_nothing_away():
    Policy("stop").judge(3, 2, [failure(1, "absent"), failure(2, "absent")])
    required = Policy(required=frozenset([2]))
    required.judge(3, 4, [failure(2, "absent"), failure(1, "died"), failure(2, "twice")])
    Policy("skip", min_replies=4).judge(3, 4, [failure(1, "twice"), failure(9, "stranger")])


# --- hooks, participation, files


def test_hooks_hear_of_every_round_in_order_with_its_model():
    world, recorder = build(small()), Recorder()
    last = RoundLoop(world.strategy, grids(world), 3, hooks=[recorder]).run(world.arrays)
    assert [report.server_round for report in recorder.reports] == [0, 1, 2, 3]
    assert tensors_sha256(named_tensors(recorder.reports[-1].arrays)) == tensors_sha256(
        named_tensors(last)
    )
    assert all(len(report.selected) == 4 for report in recorder.reports[1:])


def test_a_round_in_which_nobody_takes_part_is_recorded(tmp_path):
    nobody = 'participation={kind="bernoulli", rate=0.0000001}'
    for strategy in ("fedavg", "flower:FedAvg"):
        scenario = small(nobody, f'strategy.name="{strategy}"')
        result = run.start(scenario, out=tmp_path / strategy.replace(":", "-"))
        records = history(result)
        assert [r["clients/selected"] for r in records if r["round"]] == [0, 0, 0]
        assert len({r["test/loss"] for r in records}) == 1  # the model stays


def test_run_folder_names_neither_machine_nor_user(tmp_path, monkeypatch):
    import getpass
    import socket

    monkeypatch.setenv("FEDSIM_SECRET_TOKEN", "hunter2-hunter2")
    folder = run.start(small(), out=tmp_path / "run").folder
    words = {"hunter2-hunter2", socket.gethostname(), str(tmp_path)}
    if getpass.getuser() not in ("root", "app"):
        words.add(getpass.getuser())
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for word in words:
                found = re.search(rb"\b" + re.escape(word.encode()) + rb"\b", content)
                assert found is None, f"{file.name} holds {word}"


def test_a_traceback_in_the_log_does_not_name_the_user(tmp_path, monkeypatch):
    import fedsim

    home = str(Path(fedsim.__file__).parents[1])
    monkeypatch.setenv("HOME", home)

    class Broken:
        def round_ended(self, report):
            raise RunError(f"a hook failed beside {home}")

    world = build(small())
    folder = run_folder.create(tmp_path / "run", world.scenario)
    with pytest.raises(RunError), folder.recording():
        RoundLoop(world.strategy, grids(world), 1, hooks=[Broken()]).run(world.arrays)
    log = (folder.path / "log.txt").read_text()
    assert "RunError: a hook failed beside ~" in log
    assert "~/fedsim/runs/loop.py" in log
    assert home not in log


def test_run_folder_says_which_worker_trained_which_clients(tmp_path):
    result = run.start(small("engine.chunk_size=3"), out=tmp_path / "run")
    chunks = JsonLines.read(result.folder / "chunks.jsonl")
    selected = JsonLines.read(result.folder / "participation.jsonl")
    for record in selected:
        mine = [c for c in chunks if c["round"] == record["round"]]
        assert [c["chunk"] for c in mine] == [0, 1]
        assert list(itertools.chain(*(c["clients"] for c in mine))) == record["selected"]
        assert {c["worker"] for c in mine} == {0}
    final = json.loads((result.folder / "summary.json").read_text())
    assert final == json.loads(json.dumps(result.summary))


def test_tensorboard_shows_every_numeric_metric(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run.start(small("output.tensorboard=true"), out=tmp_path / "run")
    events = EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    shown = {e.step: e.value for e in events.Scalars("test/accuracy")}
    for record in history(result):
        assert shown[record["round"]] == pytest.approx(record["test/accuracy"])


# --- foreign strategies


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedMedian", "Krum"])
def test_flowers_strategies_resume_to_the_bits_of_an_undisturbed_run(tmp_path, name):
    extra = {
        "FedAvgM": ["strategy.server_momentum=0.9"],
    }
    scenario = small(
        f'strategy={{name="flower:{name}"}}', "rounds=4", "checkpoint.every=1", "checkpoint.keep=9",
        *extra.get(name, []),
    )  # fmt: skip
    whole = run.start(scenario, out=tmp_path / "whole")
    half = run.start(scenario, out=tmp_path / "half")
    for place in sorted((half.folder / "checkpoints").iterdir())[3:]:
        place.unlink()
    again = run.resume(half.folder)
    assert again.summary["params_sha256"] == whole.summary["params_sha256"]
    assert _untimed(history(again)) == _untimed(history(whole))
    assert again.summary["final"]["train/loss"] > 0


def _untimed(records):
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def test_flower_fedavg_in_a_scenario_equals_ours_within_rounding(tmp_path):
    ours = build(small())
    theirs = build(small('strategy={name="flower:FedAvg"}'))
    models = []
    for world in (ours, theirs):
        last = RoundLoop(world.strategy, grids(world), 3).run(world.arrays)
        models.append(model_tensors(world.layout, last)[0])
    assert torch.allclose(models[0], models[1], atol=1e-6)
    assert not torch.equal(models[0], model_tensors(ours.layout, ours.arrays)[0])


# --- set-up exchange and personal payloads


class Explored(NamedTuple):
    seen: torch.Tensor
    rounds: int


class Explorer(FederatedStrategy):
    """Learns in a set-up exchange which clients move most, and sends each its own model."""

    def init(self, params, clients):
        return Explored(torch.zeros(clients), 0)

    def setup(self, state, params, clients):
        return Setup(np.array([1, 3, 6]), Payload(extra={"hint": torch.ones(2)}))

    def finish_setup(self, state, params, replies):
        seen = state.seen.clone()
        seen[torch.from_numpy(replies.client_ids)] = replies.update.norm(dim=1)
        return state._replace(seen=seen)

    def broadcast(self, state, params, cohort):
        scale = 1 + torch.from_numpy(cohort).to(params.dtype) / 100
        return Payload(), Payload(params * scale[:, None])

    def server_update(self, state, params, replies):
        state = state._replace(rounds=state.rounds + 1)
        return params + replies.update.mean(dim=0), state, {"moved": float(replies.update.norm())}


def test_set_up_exchange_runs_once_and_is_recorded_as_round_0():
    world, recorder = build(small()), Recorder()
    strategy = Explorer()
    RoundLoop(strategy, grids(world), 2, hooks=[recorder]).run(world.arrays)
    start = recorder.reports[0]
    assert start.server_round == 0
    assert start.selected == (1, 3, 6)
    assert start.metrics["clients/replied"] == 3
    assert start.metrics["comm/downlink_bytes"] > start.metrics["comm/uplink_bytes"] > 0
    assert torch.nonzero(strategy.state.seen).flatten().tolist() == [1, 3, 6]
    assert strategy.state.rounds == 2
    assert recorder.reports[1].metrics["server/moved"] > 0


def test_personal_models_are_the_reference_of_each_client_s_update():
    world = build(small("client.local_lr=0.0"))
    strategy, grid = Explorer(), grids(world)
    cohort = strategy.configure_train(1, world.arrays, ConfigRecord(), grid)
    replies = grid.send_and_receive(cohort)
    assert replies.reference.shape == replies.params.shape
    assert torch.equal(replies.params, cohort.personal.params)  # a step of 0 moves nobody
    assert not torch.equal(replies.params[0], replies.params[1])
    assert torch.count_nonzero(replies.update) == 0


def test_personal_cohort_gives_the_same_replies_as_its_messages():
    world = build(small())
    strategy = Explorer()
    grid = InlineGrid(world.app, 8)
    cohort = strategy.configure_train(1, world.arrays, ConfigRecord(), grid)
    stacked = grid.send_and_receive(cohort)
    one_by_one = grid.send_and_receive(list(cohort))
    for place, message in enumerate(one_by_one):
        params, _ = model_tensors(world.layout, message.content["arrays"])
        assert torch.allclose(params, stacked.params[place], atol=1e-6)


def test_resume_refuses_data_that_have_changed(tmp_path):
    folder = run.start(small(), out=tmp_path / "run").folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="the run began with data 000000000000"):
        run.resume(folder)


def test_resume_refuses_an_override_that_changes_the_result(tmp_path):
    folder = run.start(small(), out=tmp_path / "run").folder
    with pytest.raises(ScenarioError, match="would change the result"):
        run.resume(folder, overrides=["client.local_lr=0.5"])


def test_an_unfinished_folder_without_checkpoint_starts_from_the_beginning(tmp_path):
    scenario = small()
    whole = run.start(scenario, out=tmp_path / "whole")
    folder = run_folder.create(tmp_path / "bare", scenario)
    again = run.resume(folder.path)
    assert again.summary["params_sha256"] == whole.summary["params_sha256"]


# --- what a sceptical user tried


def test_a_run_that_is_going_on_is_not_resumed_by_a_second_process(tmp_path):
    scenario = small()
    folder = run.start(scenario, out=tmp_path / "run").folder
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="still going on in another process"):
            run.resume(folder)
    assert run.resume(folder).summary["rounds"] == 3


def test_a_run_whose_checkpoints_are_gone_is_refused_and_keeps_its_record(tmp_path):
    folder = run.start(small(), out=tmp_path / "run").folder
    before = (folder / "metrics.jsonl").read_bytes()
    for place in (folder / "checkpoints").iterdir():
        place.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is left"):
        run.resume(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_local_evaluation_without_a_local_test_split_is_refused():
    with pytest.raises(ScenarioError, match="test_fraction = 0 leaves them none"):
        build(small("evaluation.clients=3"))


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.output = torch.nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.output(x - x.mean(dim=0))


def test_a_model_that_mixes_the_samples_of_a_batch_trains_in_a_loop():
    plan = build(small(f'task={{model="{__name__}:Mean"}}')).plan
    assert plan.executor == "loop"
    assert "depends on the other samples" in plan.reason


def test_batch_statistics_without_memory_train_in_a_loop():
    plan = build(small(f'task={{model="{__name__}:Statistics"}}', "client.last_batch=drop")).plan
    assert plan.executor == "loop"


class Statistics(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(64, 8)
        self.norm = torch.nn.BatchNorm1d(8, track_running_stats=False)
        self.output = torch.nn.Linear(8, 10)

    def forward(self, x):
        return self.output(self.norm(self.hidden(x.flatten(1))))


def test_a_clients_traceback_is_logged_once(tmp_path, caplog):
    world = build(small())
    grid = grids(world)

    def broken(job, out=None):
        raise KeyError("column 'pixels'")

    world.app.run_chunk = broken
    with caplog.at_level("WARNING", "fedsim"), pytest.raises(RunError, match="0 of 4 clients"):
        RoundLoop(world.strategy, grid, 2).run(world.arrays)
    details = [r.message for r in caplog.records if "Traceback" in r.message]
    assert len(details) == 1
    assert "in broken" in details[0]


def test_strategy_start_ends_when_every_reply_is_refused(caplog):
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from fedsim.messages.records import ArrayRecord
    from strategies import FedAvg

    app = ClientApp()

    @app.train()
    def train(message, context):
        doubles = [a.astype(np.float64) for a in message.content["arrays"].to_numpy_ndarrays()]
        names = list(message.content["arrays"])
        arrays = ArrayRecord(dict(zip(names, ArrayRecord(doubles).values(), strict=True)))
        metrics = MetricRecord({"num-examples": 3})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    initial = ArrayRecord([np.zeros((2, 3), np.float32)])
    with pytest.raises(
        RunError, match="every reply was refused; the first: client 0, round 1: dtype"
    ):
        FedAvg().start(grid=InlineGrid(app, 3), initial_arrays=initial, num_rounds=2)


def test_a_server_may_send_from_several_threads():
    world = build(small())
    grid = InlineGrid(world.app, 8)
    cohort = world.strategy.configure_train(1, world.arrays, ConfigRecord(), grid)
    expected = grid.send_and_receive(cohort)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda message: grid.send_and_receive([message])[0], list(cohort)))
    assert [m.metadata.src_node_id for m in answers] == (expected.client_ids + 2).tolist()
    assert all(m.has_content() for m in answers)
