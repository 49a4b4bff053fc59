"""What becomes of BatchNorm's statistics and integer buffers, against computation by hand.

The model normalises its input, so that a client's statistics are those of its own samples whatever
is trained: after a step on all of them, mean' = 0.9 mean + 0.1 (samples' mean), and so with the
unbiased variance.
"""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from torch import nn

import fedsim
from fedsim.client.executor import CohortExecutor
from fedsim.client.plan import ExecutionPlan
from fedsim.engine.client_app import CohortApp
from fedsim.engine.inline import InlineGrid
from fedsim.messages import flower_internals as internals
from fedsim.messages.records import model_record, named_tensors
from fedsim.runs.checkpoint import FOLDER, latest, load
from fedsim.runs.world import build
from fedsim.scenario.scenario import Scenario
from fedsim.tasks.classification import Classification
from tests.laws import federations as fed
from tests.laws.federations import SEED, SPEC, InMemoryData, initial_payload, job

SIZES = (5, 9, 20)
POLICIES = ["average", "local", "reset"]
MEAN, VAR, COUNT = "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"


class Normalised(nn.Module):
    def __init__(self, feature_shape=(1, 4, 4), num_classes=3):
        super().__init__()
        width = int(np.prod(feature_shape))
        self.norm = nn.BatchNorm1d(width)
        self.output = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.output(self.norm(x.flatten(1)))


def executor_of(buffers, data=None):
    return CohortExecutor(
        Classification(Normalised, SPEC, torch.float64),
        fed.make_procedure(batch_size=256),
        data or InMemoryData(SIZES, test_sizes=(6, 7, 8)),
        seed=SEED,
        kind="loop",
        buffers=buffers,
    )


def moved(client, before=None, data=None):
    """The statistics after a step on all of a client's samples."""
    mean, var, count = before or (np.zeros(16), np.ones(16), 0)
    found = (data or InMemoryData(SIZES)).clients([client])
    samples = found.features[found.rows[0]].reshape(-1, 16).astype(np.float64)
    return (
        0.9 * mean + 0.1 * samples.mean(axis=0),
        0.9 * var + 0.1 * samples.var(axis=0, ddof=1),
        count + 1,
    )


def assert_statistics(named, expected, prefix="", place=()):
    found = {name: named[prefix + name][place] for name in (MEAN, VAR, COUNT)}
    np.testing.assert_allclose(found[MEAN].numpy(), expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[VAR].numpy(), expected[1], rtol=0, atol=1e-12)
    assert found[COUNT].dtype == torch.int64
    assert int(found[COUNT]) == expected[2]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_reply_holds_what_the_policy_lets_out_and_the_memory_what_it_keeps(policy):
    executor = executor_of(policy)
    result = executor.train(job(executor, (0, 1, 2)))
    untouched = np.zeros(16), np.ones(16), 0
    for place in range(3):
        sent = moved(place) if policy == "average" else untouched
        assert_statistics(result.buffers, sent, place=place)
        if policy == "local":
            assert_statistics(result.state, moved(place), "buffers.", place)
    assert bool(result.state) == (policy == "local")
    assert not torch.equal(result.params[0], initial_payload(executor).params)


def test_a_client_goes_on_from_the_statistics_that_it_keeps():
    executor = executor_of("local")
    first = executor.train(job(executor, (0, 1, 2)))
    again = executor.train(
        job(executor, (0, 1, 2), server_round=2, state=first.state, has_state=(True, False, True))
    )
    for place, before in ((0, moved(0)), (1, None), (2, moved(2))):
        assert_statistics(again.state, moved(place, before), "buffers.", place)


def test_a_client_evaluates_with_the_statistics_that_it_keeps():
    executor = executor_of("local")
    trained = executor.train(job(executor, (0, 1, 2)))
    found = executor.evaluate(
        job(
            executor, (0, 1, 2), action="evaluate", state=trained.state,
            has_state=(True, False, True),
        )
    )  # fmt: skip
    drawn = executor.data.clients((0, 1, 2), split="test")
    for place, rows in enumerate(drawn.rows):
        model = executor.task.build_model(SEED).eval().requires_grad_(False)
        if place != 1:
            mean, var, _ = moved(place)
            model.norm.running_mean.copy_(torch.from_numpy(mean))
            model.norm.running_var.copy_(torch.from_numpy(var))
        outputs = model(torch.from_numpy(drawn.features[rows]).double())
        loss = nn.functional.cross_entropy(outputs, torch.from_numpy(drawn.targets[rows]))
        assert float(found.metrics["loss"][place]) == pytest.approx(float(loss), abs=1e-12)
    assert not found.state


def test_a_frozen_parameter_is_no_statistic():
    """It is a buffer of the layout, and the client's state does not hold it."""

    def build():
        model = Normalised()
        model.norm.weight.requires_grad_(False)
        return model

    executor = CohortExecutor(
        Classification(build, SPEC, torch.float32), fed.make_procedure(), InMemoryData(SIZES),
        seed=SEED, kind="loop", buffers="local",
    )  # fmt: skip
    result = executor.train(job(executor, (0, 1)))
    assert set(result.state) == {f"buffers.{name}" for name in (MEAN, VAR, COUNT)}
    assert result.buffers["norm.weight"].eq(1).all()


# --- in the engine and on a node ------------------------------------------------------------------


def test_the_engine_gives_a_client_its_statistics_to_train_and_to_evaluate():
    executor = executor_of("local")
    app = CohortApp(lambda: executor, ExecutionPlan("loop", "a test", 2))
    grid = InlineGrid(app, 3)
    strategy = fed.make_strategy("fedavg")
    strategy.declare_buffers([spec.name for spec in executor.layout.buffers])
    start = initial_payload(executor)
    arrays = model_record(executor.layout, start.params, start.buffers)
    for server_round in (1, 2):
        sent = strategy.configure_train(server_round, arrays, ConfigRecord({}), grid)
        replies = grid.send_and_receive(sent)
    clients, memories = grid.store.export()
    assert clients == [0, 1, 2]
    for place in range(3):
        assert_statistics(memories, moved(place, moved(place)), "buffers.", place)
        assert_statistics(replies.buffers, (np.zeros(16), np.ones(16), 0), place=place)
    asked = strategy.configure_evaluate(2, arrays, ConfigRecord({}), grid)
    found = grid.send_and_receive(asked).metrics["loss"]
    expected = executor.evaluate(
        job(executor, (0, 1, 2), action="evaluate", state=memories, has_state=(True,) * 3)
    )
    assert found.tolist() == expected.metrics["loss"].tolist()
    plain = executor.evaluate(job(executor, (0, 1, 2), action="evaluate"))
    assert found.tolist() != plain.metrics["loss"].tolist()


def test_a_node_keeps_its_statistics_in_its_own_context_and_never_sends_them():
    executor = executor_of("local")
    app = CohortApp(lambda: executor, ExecutionPlan("loop", "a test", 2))
    start = initial_payload(executor)
    arrays = model_record(executor.layout, start.params, start.buffers)
    internals.ensure_identity()
    context = Context(1, 3, {"partition-id": 1, "num-partitions": 3}, RecordDict(), {})

    def ask(kind):
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
        message = Message(content, dst_node_id=3, message_type=kind)
        return app(message, context).content

    before = ask(MessageType.EVALUATE)["metrics"]["loss"]
    reply = ask(MessageType.TRAIN)
    sent = named_tensors(reply["arrays"])
    assert_statistics(sent, (np.zeros(16), np.ones(16), 0))
    assert_statistics(named_tensors(context.state["client-state"]), moved(1), "buffers.")
    after = ask(MessageType.EVALUATE)["metrics"]["loss"]
    expected = executor.evaluate(
        job(
            executor, (1,), action="evaluate", has_state=(True,),
            state={f"buffers.{n}": torch.as_tensor(v)[None] for n, v in zip(
                (MEAN, VAR, COUNT), moved(1), strict=True)},
        )
    )  # fmt: skip
    assert after == pytest.approx(float(expected.metrics["loss"][0]), abs=1e-12)
    assert after != before


# --- over rounds ----------------------------------------------------------------------------------


def finished(tmp_path, policy):
    scenario = Scenario.from_resolved(
        {
            "seed": 1, "rounds": 2,
            "task": {"model": f"{__name__}:Normalised", "dtype": "float64", "buffers": policy},
            "data": {"name": "digits", "test_fraction": 0.9},
            "partition": {"kind": "iid", "clients": 3},
            "client": {"batch_size": 256},
            "engine": {"kind": "inline", "chunk_size": 2},
            "checkpoint": {"every": 1},
        },
        origin="tests/buffers.toml",
    )  # fmt: skip
    result = fedsim.start(scenario, out=tmp_path / "run")
    return scenario, load(latest(result.folder / FOLDER))


@pytest.mark.parametrize("policy", POLICIES)
def test_two_rounds_of_a_run_equal_the_computation_by_hand(tmp_path, policy):
    scenario, saved = finished(tmp_path, policy)
    data = build(scenario).data
    drawn = data.clients(range(3))
    samples = [
        drawn.features[rows].reshape(len(rows), -1).astype(np.float64) for rows in drawn.rows
    ]
    mean, var, count = np.zeros(64), np.ones(64), 0
    own = [(mean, var, count)] * 3
    for _ in range(2):
        starts = own if policy == "local" else [(mean, var, count)] * 3
        own = [
            (0.9 * m + 0.1 * x.mean(axis=0), 0.9 * v + 0.1 * x.var(axis=0, ddof=1), c + 1)
            for x, (m, v, c) in zip(samples, starts, strict=True)
        ]
        if policy == "average":
            shares = np.array([len(x) for x in samples]) / sum(len(x) for x in samples)
            mean, var = (sum(p * s[k] for p, s in zip(shares, own, strict=True)) for k in (0, 1))
            count = max(s[2] for s in own)
    assert saved.model[COUNT].dtype == torch.int64
    expectations = {MEAN: mean, VAR: var, COUNT: np.array(count)}
    for name, expected in expectations.items():
        np.testing.assert_allclose(saved.model[name].numpy(), expected, rtol=0, atol=1e-12)
    if policy == "local":
        for place in range(3):
            memory = {n: saved.client_state[f"buffers.{n}"][place] for n in (MEAN, VAR, COUNT)}
            np.testing.assert_allclose(memory[MEAN].numpy(), own[place][0], rtol=0, atol=1e-12)
            assert memory[COUNT].dtype == torch.int64
            assert int(memory[COUNT]) == 2
    else:
        assert not saved.client_state


@pytest.mark.parametrize("strategy", ["fedavg", "flower:FedAdam", "flower:FedAvg"])
def test_frozen_parameters_are_bit_for_bit_what_they_were_under_any_strategy(tmp_path, strategy):
    scenario = Scenario.from_resolved(
        {
            "seed": 1, "rounds": 2,
            "task": {"model": "mlp", "hidden": [6], "freeze": ["hidden1"], "dtype": "float64"},
            "data": {"name": "digits", "test_fraction": 0.9},
            "partition": {"kind": "dirichlet", "alpha": 1.0, "clients": 3},
            "strategy": {"name": strategy},
            "engine": {"kind": "inline", "chunk_size": 2},
        },
        origin="tests/buffers.toml",
    )  # fmt: skip
    result = fedsim.start(scenario, out=tmp_path / "run")
    saved = load(latest(result.folder / FOLDER))
    start = named_tensors(build(scenario).arrays)
    assert torch.equal(saved.model["hidden1.weight"], start["hidden1.weight"])
    assert torch.equal(saved.model["hidden1.bias"], start["hidden1.bias"])
    assert not torch.equal(saved.model["output.weight"], start["output.weight"])
