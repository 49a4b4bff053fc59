"""Flower's privacy wrappers in a scenario: clipping, noise, what may stand inside, and resuming."""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.nodes import PartitionGrid
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages import flower_internals as internals
from fedsim.messages.records import model_tensors
from fedsim.runs import start as run
from fedsim.runs.world import build
from fedsim.scenario import discovery
from tests.laws.dropping import DropOutGrid
from tests.strategy.flower_world.worlds import (
    WRAPPERS,
    clipped,
    flower,
    ours,
    records,
    scenario,
    train,
)

SERVER, CLIENT = (f"DifferentialPrivacy{side}SideFixedClipping" for side in ("Server", "Client"))
ADAPTIVE = [name for name in WRAPPERS if "Adaptive" in name]
BOUND = 0.3
EXACT = {"noise_multiplier": 0.0, "clipping_norm": BOUND}
WIDE = {"noise_multiplier": 0.0, "clipping_norm": 1e6}
# Strategies of ours that hold more with the clients than one model, and say so.
APART = {"fedlex": "before round 1", "gossip": "a model per node"}
# what needs more of clients than their models, or sends them more
APART |= {
    name: "sends clients" if factory.sends else "needs of clients"
    for name in discovery.names("strategies")
    if ((factory := discovery.strategy_factory(name)).sends or factory.returns)
    and name not in APART
}
APART["variance_corrected_gossip"] = APART["gossip"]


class Watching(GridWrapper):
    """Keeps the replies that pass."""

    def send_and_receive(self, messages, *, timeout=None):
        self.replies = self.inner.send_and_receive(messages, timeout=timeout)
        return self.replies


def engine(world):
    return InlineGrid(world.app, world.data.num_clients)


class Kept:
    """Makes an engine whose replies are kept."""

    def __call__(self, world):
        self.grid = Watching(engine(world))
        return self.grid


def updates(**tables):
    """Every client's update in round 1 and its examples, from a run without any wrapper."""
    kept = Kept()
    _, world = train({"name": "fedavg"}, 1, inner=kept, **tables)
    replies = kept.grid.replies
    start = model_tensors(world.layout, world.arrays)[0].double().numpy()
    return start, replies.update.double().numpy(), replies.num_examples.double().numpy()


# --- clipping


@pytest.mark.parametrize("name", [SERVER, CLIENT])
@pytest.mark.parametrize("inside", ["flower:FedAvg", "fedavg"])
def test_clipped_averaging_is_the_mean_of_clipped_updates(name, inside):
    found, _ = train(flower(name, **EXACT, strategy={"name": inside}), 1)
    start, moved, examples = updates()
    lengths = np.linalg.norm(moved, axis=1)
    assert (lengths > BOUND).any()
    assert (lengths < BOUND).any()
    weights = examples / examples.sum()
    expected = start + weights @ np.stack([clipped(update, BOUND) for update in moved])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("mod", "bit"), [(fixedclipping_mod, False), (adaptiveclipping_mod, True)])
def test_a_client_clips_as_flowers_mod_does(mod, bit):
    world = build(scenario({"name": "fedavg"}, task={"model": "mlp", "hidden": [8]}))
    internals.ensure_identity()
    for client in range(world.data.num_clients):

        def instruction(client=client, **config):
            record = ConfigRecord({"server-round": 1, **config})
            content = RecordDict({"arrays": world.arrays, "config": record})
            return Message(content, client + 2, "train")

        def context(client=client):
            config = {"partition-id": client, "num-partitions": 8}
            return Context(1, client + 2, config, RecordDict(), {})

        asked = instruction(clipping_norm=BOUND)
        mine = world.app(asked, context())
        plain = mod(asked, context(), lambda *_: world.app(instruction(), context()))
        assert plain.has_content()
        for name, array in mine.content["arrays"].items():
            np.testing.assert_allclose(
                array.numpy(), plain.content["arrays"][name].numpy(), rtol=1e-6, atol=1e-7
            )
        if bit:
            assert mine.content["metrics"]["norm_bit"] == plain.content["metrics"]["norm_bit"]


def test_a_node_and_the_engine_clip_to_the_same_bits():
    engines = [engine, lambda world: InlineGrid(Plainly(world.app), world.data.num_clients)]
    table = flower(CLIENT, **EXACT)
    tables = {"engine": {"kind": "inline", "chunk_size": 2}}
    cohort, message = (train(table, 2, inner=made, **tables)[0] for made in engines)
    assert cohort.tobytes() == message.tobytes()


def test_workers_clip_to_the_bits_of_the_engine_in_this_process(lender):
    grids = []

    def on_ray(world):
        grids.append(lender.grid(world.app, world.data.num_clients, workers=1))
        return grids[0]

    table = flower(CLIENT, strategy={"name": "fedau"})
    try:
        workers, _ = train(table, 2, inner=on_ray)
    finally:
        grids[0].close()
    assert workers.tobytes() == train(table, 2)[0].tobytes()


class Plainly:
    """A ClientApp that answers one message at a time, as on a node."""

    def __init__(self, app):
        self.app = app

    def __call__(self, message, context):
        return self.app(message, context)


def test_a_client_that_moved_nothing_is_not_clipped():
    still = {"name": "tests.strategy.flower_world.procedure:Still"}
    kept = Kept()
    train(flower(CLIENT, **EXACT), 1, client=still, inner=kept)
    replies = kept.grid.replies
    for row in replies.params:
        np.testing.assert_array_equal(row.numpy(), replies.reference.numpy())
    assert not replies.metrics["norm_bit"].any()


def test_flowers_division_by_the_length_of_nothing_is_named_with_the_clients():
    still = {"name": "tests.strategy.flower_world.procedure:Still"}
    with pytest.raises(RunError) as failed:
        train(flower(SERVER, **EXACT), 1, client=still)
    assert str(failed.value) == (
        "round 1: DifferentialPrivacyServerSideFixedClipping raised ZeroDivisionError while it "
        "aggregated: float division by zero; clients [0, 1, 2, 3, 4, 5, 6, 7] sent back the model "
        "they received"
    )


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan, "1"])
def test_a_bound_that_is_none_is_refused_by_the_client(bound):
    world = build(scenario({"name": "fedavg"}))
    internals.ensure_identity()
    config = ConfigRecord({"server-round": 1, "clipping_norm": bound})
    message = Message(RecordDict({"arrays": world.arrays, "config": config}), 2, "train")
    context = Context(1, 2, {"partition-id": 0, "num-partitions": 8}, RecordDict(), {})
    with pytest.raises(ValueError, match=r"config clipping_norm = .*: must be > 0 and finite"):
        world.app(message, context)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize(("first", "share"), [(1e-3, 1.0), (1e3, 0.0)])
def test_the_bound_moves_as_flower_moves_it(name, first, share):
    """By exp(-lr (share clipped - target)): everybody's update is clipped, or nobody's."""
    table = flower(name, noise_multiplier=0.0, initial_clipping_norm=first, clip_norm_lr=0.2)
    _, world = train(table, 2)
    expected = first * math.exp(-0.2 * (share - 0.5)) ** 2
    assert world.strategy.clipping_norm == pytest.approx(expected, rel=1e-12)


# --- noise


def test_noise_has_the_size_that_the_cohort_and_the_bound_give():
    """Standard deviation multiplier * bound / clients, over the model's 650 coordinates."""
    noisy, world = train(flower(SERVER, noise_multiplier=2.0, clipping_norm=BOUND), 1)
    exact, _ = train(flower(SERVER, **EXACT), 1)
    assert world.strategy.num_sampled_clients == 8
    noise, expected = noisy - exact, 2.0 * BOUND / 8
    assert noise.size == 650
    assert abs(noise.std() - expected) < 4 * expected / math.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 4 * expected / math.sqrt(noise.size)


@pytest.mark.parametrize(
    ("participation", "given", "expected"),
    [
        ({"kind": "full"}, {}, 8),
        ({"kind": "uniform", "cohort_size": 3}, {}, 3),
        ({"kind": "bernoulli", "rate": 0.5}, {}, 4),
        ({"kind": "uniform", "cohort_size": 3}, {"num_sampled_clients": 2}, 2),
    ],
)
def test_noise_counts_on_the_expected_cohort_unless_told_otherwise(participation, given, expected):
    table = flower(SERVER, **given)
    world = build(scenario(table, participation=participation))
    assert world.strategy.num_sampled_clients == expected


def test_noise_is_the_seeds_in_a_simulation_and_the_systems_in_a_deployment():
    table = flower(SERVER, noise_multiplier=1.0)
    with_seed = [train(table, 2, seed=seed)[0].tobytes() for seed in (5, 5, 6)]
    assert with_seed[0] == with_seed[1] != with_seed[2]
    without = [train(table, 2, seed=None)[0].tobytes() for _ in range(2)]
    assert without[0] != without[1]


# --- what may stand inside


# every strategy in one of them in turn, in the other one among the slow tests
TURNS = [
    pytest.param(name, inside, marks=[pytest.mark.slow] if (number + place) % 2 else [])
    for number, inside in enumerate(ours())
    for place, name in enumerate((SERVER, CLIENT))
]


@pytest.mark.parametrize(("name", "inside"), TURNS)
def test_a_wrapper_that_does_nothing_leaves_our_strategies_as_they_are(name, inside):
    table = flower(name, **WIDE, strategy={"name": inside})
    if inside in APART:
        with pytest.raises(ScenarioError, match=rf"\[strategy.strategy\] name .* {APART[inside]}"):
            scenario(table)
        return
    participation = {"kind": "uniform", "cohort_size": 7}
    wrapped, _ = train(table, 3, participation=participation)
    alone, _ = train({"name": inside}, 3, participation=participation)
    np.testing.assert_allclose(wrapped, alone, atol=2e-6)
    assert np.abs(alone).max() > 0


@pytest.mark.parametrize(
    "inside",
    [
        {"name": "fedvarp"},
        {"name": "fedau"},
        {"name": "flower:FedAdam", "eta": 0.05},
        {"name": "flower:QFedAvg", "client_learning_rate": 0.1},
    ],
)
def test_a_run_of_a_strategy_in_a_wrapper_resumes_to_the_undisturbed_bits(tmp_path, inside):
    name = ADAPTIVE[0]
    participation = {"kind": "uniform", "cohort_size": 7}
    tables = {"participation": participation, "rounds": 4}
    whole = run.start(scenario(flower(name, strategy=inside), **tables), out=tmp_path / "run")
    expected = records(whole)
    for place in sorted((whole.folder / "checkpoints").iterdir())[3:]:
        place.unlink()
    (whole.folder / "summary.json").unlink()
    again = run.resume(whole.folder)
    assert again.summary["params_sha256"] == whole.summary["params_sha256"]
    assert records(again) == expected


def test_a_users_own_wrapper_takes_a_table_too(tmp_path):
    table = {
        "name": "tests.strategy.flower_world.own_wrapper:Shrinking",
        "factor": 0.25,
        "base": {"name": "flower:FedAdam", "eta": 0.05},
    }
    shrunk, _ = train(table, 1)
    whole, _ = train(table["base"], 1)
    np.testing.assert_allclose(shrunk, 0.25 * whole, rtol=1e-6)
    with pytest.raises(ScenarioError, match=r"\[strategy.base\] 'et' is not a hyperparameter of "):
        scenario({**table, "base": {"name": "flower:FedAdam", "et": 1}})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"strategy": {"name": "flower:FedAdm"}}, "did you mean 'flower:FedAdam'?"),
        ({"strategy": {"name": "flower:FedAdam", "et": 1}}, "did you mean 'eta'?"),
        ({"strategy": "fedavg"}, '[strategy] strategy = "fedavg": must be a table'),
        ({"strategy": flower(SERVER)}, "wraps a strategy itself"),
        ({"strategy": {"name": "flower:FedXgbCyclic"}}, "aggregates boosted trees"),
        ({"noise_multiplier": -1}, "[strategy] noise_multiplier = -1.0: must be >= 0 and finite"),
        ({"clipping_norm": 0}, "[strategy] clipping_norm = 0.0: must be > 0 and finite"),
        ({"num_sampled_clients": 0}, "[strategy] num_sampled_clients = 0: must be >= 1"),
        (
            {"num_sampled_clients": 9},
            "[strategy] num_sampled_clients = 9 with 8 clients per round: must be at most 8; noise "
            "for more clients than there are promises less privacy than it says",
        ),
        ({"accountant": 1}, "'accountant' is not a hyperparameter of flower:Differential"),
    ],
)
def test_what_a_wrapper_cannot_take_is_refused(table, message):
    with pytest.raises(ScenarioError) as refused:
        scenario(flower(SERVER, **table))
    assert message in str(refused.value)


def test_noise_that_so_few_clients_cannot_hide_is_refused():
    with pytest.raises(ScenarioError) as refused:
        scenario(flower(ADAPTIVE[0], noise_multiplier=1.0))
    assert str(refused.value).endswith(
        "[strategy] noise_multiplier = 1.0: must be < 0.8, twice clipped_count_stddev (by default "
        "num_sampled_clients / 20, here 8 / 20)"
    )


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_model_with_integers_is_refused_because_they_cannot_be_clipped(name):
    with pytest.raises(
        ScenarioError, match=r"'.*num_batches_tracked' holds integers; use a \[task"
    ):
        build(scenario(flower(name), task={"model": "cnn_batchnorm"}))


# --- faults and grids


def test_a_round_without_any_reply_leaves_the_model_as_it_was():
    def nobody_answers(world):
        return DropOutGrid(engine(world), lambda server_round: range(8))

    for name in WRAPPERS:
        found, world = train(flower(name), 1, inner=nobody_answers)
        np.testing.assert_array_equal(found, model_tensors(world.layout, world.arrays)[0].numpy())


def test_a_round_in_which_a_client_fails_is_skipped_by_the_wrapper_and_said(caplog):
    class Failing(GridWrapper):
        """One client's app raises in round 1."""

        def send_and_receive(self, messages, *, timeout=None):
            broken = InlineGrid(Raising(self.inner.client_app, 4), 8)
            return broken.send_and_receive(messages, timeout=timeout)

    found, world = train(flower(SERVER), 1, inner=lambda world: Failing(engine(world)))
    np.testing.assert_array_equal(found, model_tensors(world.layout, world.arrays)[0].numpy())
    assert "client 4, round 1: raised: " in caplog.text
    assert f"round 1: {SERVER} kept the model as it was" in caplog.text


class Raising(Plainly):
    """A ClientApp that raises on one partition."""

    def __init__(self, app, partition):
        super().__init__(app)
        self.partition = partition

    def __call__(self, message, context):
        if context.node_config["partition-id"] == self.partition:
            raise ValueError("the battery is empty")
        return self.app(message, context)


class OddNodes(GridWrapper):
    """Stands for a grid of Flower's: its node ids say nothing about partitions."""

    num_clients = None
    _ODD = 10**15

    def get_node_ids(self):
        return {self._ODD - 7 * node for node in self.inner.get_node_ids()}

    def send_and_receive(self, messages, *, timeout=None):
        sent = [
            Message(m.content, (self._ODD - m.metadata.dst_node_id) // 7, m.metadata.message_type)
            for m in messages
        ]
        for number, (given, made) in enumerate(zip(messages, sent, strict=True)):
            for message in (given, made):  # as Flower does when it sends them
                internals.set_message_id(message, f"odd-{number}")
        replies = list(self.inner.send_and_receive(sent, timeout=timeout))
        for reply in replies:
            internals.set_source(reply, self._ODD - 7 * reply.metadata.src_node_id)
        return replies


@pytest.mark.parametrize("name", [SERVER, CLIENT])
@pytest.mark.parametrize("inside", ["flower:FedAvg", "fedavg"])
def test_a_wrapper_works_over_nodes_with_ids_of_their_own(name, inside):
    def on_nodes(world):
        return PartitionGrid(OddNodes(InlineGrid(Plainly(world.app), 8)), 8)

    table = flower(name, noise_multiplier=1.0, strategy={"name": inside})
    tables = {"engine": {"kind": "inline", "chunk_size": 2}}
    nodes, _ = train(table, 2, inner=on_nodes, **tables)
    alone, _ = train(table, 2, **tables)
    assert nodes.tobytes() == alone.tobytes()
