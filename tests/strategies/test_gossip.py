"""Gossip as a protocol: who sends what to whom, and what a node keeps; numbers are in `oracles`."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics.errors import ScenarioError
from fedsim.engine.inline import InlineGrid
from fedsim.federation.topology.kinds import complete, from_edges
from fedsim.federation.topology.mixing import mixing_matrix, spectral_gap
from fedsim.federation.topology.named import TOPOLOGIES
from fedsim.messages.layout import Layout
from fedsim.runs import checkpoint
from fedsim.runs.checkpoint import Checkpoint
from fedsim.scenario import signatures
from fedsim.strategy.session import restore_fields
from strategies.fedavg import FedAvg
from strategies.gossip import GossipAveraging
from strategies.variance_corrected_gossip import VarianceCorrectedGossip
from tests.laws import federations as fed
from tests.oracles.test_gossip_oracle import EDGES, LAYOUT, NODES, SEED, built, play, replies

BOTH = pytest.mark.parametrize("cls", [GossipAveraging, VarianceCorrectedGossip])
PARAMS = torch.linspace(-1, 1, LAYOUT.dim).double()
STAY = np.zeros(LAYOUT.dim)


def one_round(strategy, state, nodes):
    """A round in which these nodes reply and nobody's model changes by training."""
    answers = replies(strategy, state, dict.fromkeys(nodes, STAY))
    _, state, metrics = strategy.server_update(state, PARAMS, answers)
    return state, metrics


# --- what a node keeps and receives ---------------------------------------------------------


@BOTH
def test_every_node_trains_and_evaluates_its_own_model(cls):
    strategy = built(cls)
    state = strategy.init(PARAMS, NODES)
    assert len(torch.unique(state.models, dim=0)) == NODES
    cohort = np.array([1, 4])
    for send in (strategy.broadcast, strategy.evaluated):
        shared, personal = send(state, PARAMS, cohort)
        assert shared.is_empty
        assert torch.equal(personal.params, state.models[[1, 4]])
    assert strategy.personal_models(state) == (state.models, state.buffers)


@BOTH
@pytest.mark.parametrize("protocol", ["synchronous", "buffered"])
def test_batchnorm_statistics_and_integers_stay_with_their_node(cls, protocol):
    app = fed.make_app("cnn_batchnorm")
    grid, strategy = InlineGrid(app, 8), cls(protocol=protocol, interval=(1, 2))
    strategy.declare_buffers([spec.name for spec in app.layout.buffers])
    arrays = fed.initial_arrays("cnn_batchnorm")
    for server_round in (1, 2, 3):
        sent = fed.configure(strategy, grid, arrays, server_round)
        before = {name: stack.clone() for name, stack in strategy.state.buffers.items()}
        assert all(
            torch.equal(stack, before[name][torch.tensor(sent.client_ids)])
            for name, stack in sent.personal.buffers.items()
        )
        answers = grid.send_and_receive(sent)
        arrays, _ = strategy.aggregate_train(server_round, answers)
        for name, stack in answers.buffers.items():
            before[name][torch.tensor(answers.client_ids)] = stack
        assert before.keys() == {spec.name for spec in app.layout.buffers}
        assert fed.named_bits(strategy.state.buffers) == fed.named_bits(before)


@BOTH
def test_an_offline_node_keeps_its_model(cls):
    strategy = built(cls, topology=complete())
    state = strategy.init(PARAMS, NODES)
    after, _ = one_round(strategy, state, [0, 2, 3])
    same = (after.models == state.models).all(dim=1)
    assert same.tolist() == [False, True, False, False, True, True]
    state, metrics = one_round(strategy, after, [])
    assert torch.equal(state.models, after.models)
    assert (state.tick, metrics["messages_lost"]) == (2, 0.0)


@BOTH
def test_the_state_is_not_changed_in_place(cls):
    strategy = built(cls, protocol="buffered")
    state = strategy.init(PARAMS, NODES)
    for _ in range(3):
        before = [t.clone() for t in state if isinstance(t, torch.Tensor)]
        after, _ = one_round(strategy, state, range(NODES))
        assert all(map(torch.equal, before, [t for t in state if isinstance(t, torch.Tensor)]))
        state = after


@BOTH
def test_a_message_that_is_not_finite_reaches_nobody(cls):
    strategy = built(cls, topology=complete())
    state = strategy.init(PARAMS, NODES)
    _, without, _ = strategy.server_update(
        state, PARAMS, replies(strategy, state, dict.fromkeys([0, 1, 2], STAY))
    )
    broken = {**dict.fromkeys([0, 1, 2], STAY), 3: np.full(LAYOUT.dim, math.inf)}
    _, state, metrics = strategy.server_update(state, PARAMS, replies(strategy, state, broken))
    assert torch.equal(state.models[:3], without.models[:3])
    assert metrics["messages_lost"] == 3


# --- starts ---------------------------------------------------------------------------------


def test_nodes_start_from_the_initialisations_that_are_declared():
    strategy = built(GossipAveraging)
    strategy.declare_starts(lambda node: torch.full((LAYOUT.dim,), float(node)))
    state = strategy.init(PARAMS, NODES)
    assert state.models[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert state.models.dtype == PARAMS.dtype


def test_without_initialisations_nodes_start_from_permuted_tensors():
    layout = Layout.from_named({"w": torch.zeros(60, 50), "b": torch.zeros(60)})
    params = torch.cat([torch.randn(3000, generator=torch.Generator().manual_seed(0)) + 2,
                        torch.zeros(60)])  # fmt: skip
    strategy = built(VarianceCorrectedGossip, layout)
    models = strategy.init(params, 4).models
    assert torch.equal(models[:, :3000].sort(dim=1).values, params[:3000].sort()[0].expand(4, -1))
    assert (models[:, 3000:] == 0).all()
    between = np.corrcoef(models[:, :3000].numpy()) - np.eye(4)
    assert np.abs(between).max() < 0.08  # 4 / sqrt(3000)
    again = built(VarianceCorrectedGossip, layout).init(params, 7).models
    assert torch.equal(again[:4], models)
    other = built(VarianceCorrectedGossip, layout)
    other.declare_seed(SEED + 1)
    assert not (other.init(params, 4).models[:, :3000] == models[:, :3000]).all(dim=1).any()


def test_a_shared_start_is_the_common_model():
    state = built(GossipAveraging, start="shared").init(PARAMS, NODES)
    assert torch.equal(state.models, PARAMS.expand(NODES, -1))


# --- messages -------------------------------------------------------------------------------


def test_messages_are_lost_at_the_given_rate_and_in_the_same_way_every_time():
    strategy = built(GossipAveraging, topology=complete(), message_loss=0.3)
    state, lost, models = strategy.init(PARAMS, 40), [], []
    for _ in range(5):
        state, metrics = one_round(strategy, state, range(40))
        lost.append(metrics["messages_lost"])
        models.append(state.models)
    assert np.mean(lost) / (40 * 39) == pytest.approx(0.3, abs=0.02)
    assert len(set(lost)) > 1
    strategy = built(GossipAveraging, topology=complete(), message_loss=0.3)
    state = strategy.init(PARAMS, 40)
    for expected in models:
        state, _ = one_round(strategy, state, range(40))
        assert torch.equal(state.models, expected)


@BOTH
@pytest.mark.parametrize("protocol", ["synchronous", "buffered"])
def test_without_a_message_nobody_averages(cls, protocol):
    strategy = built(cls, message_loss=1.0, protocol=protocol)
    state = strategy.init(PARAMS, NODES)
    after, metrics = one_round(strategy, state, range(NODES))
    assert torch.equal(after.models, state.models)
    assert metrics["messages_lost"] == 2 * NODES
    assert metrics.get("averaged", 0.0) == 0.0


def test_messages_to_nodes_that_are_offline_are_not_counted_as_lost():
    strategy = built(GossipAveraging, topology=complete(), message_loss=1.0)
    _, metrics = one_round(strategy, strategy.init(PARAMS, NODES), [1, 4])
    assert metrics["messages_lost"] == 2


def test_a_node_sends_after_every_third_training():
    strategy = built(GossipAveraging, topology=from_edges([(0, 1)]), send_every=3)
    state, changed = strategy.init(PARAMS, 2), []
    for cohort in ([0, 1], [0], [0, 1], [0, 1], [0, 1], [0, 1]):
        after, _ = one_round(strategy, state, cohort)
        changed.append((after.models != state.models).any(dim=1).tolist())
        state = after
    # 0 trains in every round and sends in 3 and 6; 1 trains from round 3 on: its third is in 4
    assert changed == [
        [False, False], [False, False], [False, True], [True, False], [False, False], [False, True],
    ]  # fmt: skip


def test_metropolis_mixing_keeps_the_mean_whoever_is_online():
    """The weights are symmetric and what an absent neighbour would weigh stays with the node."""
    strategy = built(GossipAveraging, topology=TOPOLOGIES["star"](), mixing="metropolis")
    state = strategy.init(PARAMS, NODES)
    for cohort in ([0, 1, 2], [1, 2], [0, 3, 4, 5], range(NODES)):
        after, _ = one_round(strategy, state, cohort)
        torch.testing.assert_close(after.models.mean(dim=0), state.models.mean(dim=0))
        state = after
    weights = mixing_matrix(TOPOLOGIES["star"]().graph(6, server_round=1, seed=0),
                            mixing="metropolis")  # fmt: skip
    start = strategy.init(PARAMS, NODES)
    all_online, _ = one_round(strategy, start, range(NODES))
    torch.testing.assert_close(all_online.models, torch.from_numpy(weights) @ start.models)


def test_a_graph_that_changes_is_followed():
    strategy = built(GossipAveraging, topology=from_edges([(0, 1)], [(2, 3)], [], every=1))
    state, changed = strategy.init(PARAMS, 4), []
    for _ in range(4):
        after, _ = one_round(strategy, state, range(4))
        changed.append((after.models != state.models).any(dim=1).nonzero().flatten().tolist())
        state = after
    assert changed == [[0, 1], [2, 3], [], []]  # 0 and 1 hold the same model when they meet again


@BOTH
@pytest.mark.parametrize("mixing", ["uniform", "metropolis"])
@given(order=st.permutations(range(NODES)))
def test_renaming_nodes_and_their_graph_changes_nothing_beyond_rounding(cls, mixing, order):
    draw = np.random.default_rng(0)
    starts, moves = draw.normal(size=(2, NODES, LAYOUT.dim))
    models = []
    for names in (list(range(NODES)), order):
        graph = from_edges([(names[a], names[b]) for a, b in EDGES])
        strategy = built(cls, topology=graph, mixing=mixing)
        strategy.declare_starts(lambda name, names=names: torch.tensor(starts[names.index(name)]))
        state = strategy.init(PARAMS, NODES)
        for cohort in (range(NODES), [0, 1, 2, 4], range(NODES)):
            updates = {names[node]: moves[node] for node in cohort}
            _, state, _ = strategy.server_update(state, PARAMS, replies(strategy, state, updates))
        models.append(state.models[names])
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=1e-12)


# --- the buffered protocol ------------------------------------------------------------------


def test_nodes_are_due_at_intervals_of_their_own():
    strategy = built(GossipAveraging, protocol="buffered", interval=(2, 4))
    state, due = strategy.init(PARAMS, NODES), []
    for _ in range(60):
        chosen = strategy.select(state, np.arange(NODES))
        due.append(chosen.tolist())
        state, _ = one_round(strategy, state, due[-1])
    assert due[0] == list(range(NODES))
    ticks = [[tick for tick, nodes in enumerate(due) if node in nodes] for node in range(NODES)]
    assert {gap for mine in ticks for gap in np.diff(mine).tolist()} == {2, 3, 4}
    assert len({tuple(mine) for mine in ticks}) == NODES
    assert state.trainings.tolist() == [len(mine) for mine in ticks]


def test_a_node_that_was_offline_when_due_trains_when_it_is_back():
    strategy = built(GossipAveraging, protocol="buffered", interval=(2, 2))
    state = strategy.init(PARAMS, NODES)
    for online, due in (([0, 1], [0, 1]), ([0, 1, 2], [2]), ([0, 1, 2], [0, 1]), ([2, 5], [2, 5])):
        chosen = strategy.select(state, np.array(online))
        assert chosen.tolist() == due
        state, _ = one_round(strategy, state, due)


def test_only_nodes_that_are_online_receive(monkeypatch):
    """1 is due and does not answer, 3 does not take part: neither gets what 0 and 2 send."""
    monkeypatch.setattr(GossipAveraging, "participants", np.array([0, 1, 2, 4, 5]))
    strategy = built(GossipAveraging, topology=complete(), protocol="buffered")
    state = strategy.init(PARAMS, NODES)._replace(next_tick=torch.tensor([1, 1, 1, 9, 9, 9]))
    assert strategy.select(state, np.array([0, 1, 2, 4, 5])).tolist() == [0, 1, 2]
    state, _ = one_round(strategy, state, [0, 2])
    assert state.waiting.tolist() == [1, 0, 1, 0, 2, 2]


def test_a_buffer_outlasts_the_change_of_its_owners_model():
    """What waits are the senders' models of that time; the own model is the latest."""
    strategy = built(GossipAveraging, topology=from_edges([(0, 1), (0, 2)]), protocol="buffered")
    state = strategy.init(PARAMS, 3)._replace(next_tick=torch.tensor([2, 1, 2]))
    first = state.models.clone()
    state, metrics = one_round(strategy, state, [1])
    assert (state.waiting.tolist(), metrics["averaged"]) == ([1, 0, 0], 0.0)
    move = {0: np.ones(LAYOUT.dim), 2: STAY}
    _, state, metrics = strategy.server_update(state, PARAMS, replies(strategy, state, move))
    assert state.waiting.tolist() == [0, 0, 0]
    assert metrics["averaged"] == 3  # 1 and 2 have one neighbour and its model
    expected = 0.5 * (first[0] + 1) + 0.25 * (first[1] + first[2])
    torch.testing.assert_close(state.models[0], expected)


@BOTH
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(cls, tmp_path):
    options = {"protocol": "buffered", "interval": (1, 3), "message_loss": 0.2}
    strategy = built(cls, topology=from_edges(EDGES), **options)
    state = [after for _, _, after, _, _ in play(strategy, [range(NODES)] * 4)][-1]
    assert state.waiting.any()
    written = Checkpoint(4, "s", {}, {}, model={}, strategy=dict(state._asdict()))
    read = checkpoint.load(checkpoint.save(tmp_path, written, keep=1))
    other = built(cls, topology=from_edges(EDGES), **options)
    restored = restore_fields(other.init(PARAMS, NODES), read.strategy)
    for _ in range(4):
        nodes = strategy.select(state, np.arange(NODES))
        assert other.select(restored, np.arange(NODES)).tolist() == nodes.tolist()
        state, metrics = one_round(strategy, state, nodes.tolist())
        restored, again = one_round(other, restored, nodes.tolist())
        assert metrics == again
        for one, two in zip(state, restored, strict=True):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


# --- metrics --------------------------------------------------------------------------------


def test_the_metrics_say_how_far_apart_the_nodes_are():
    strategy = built(GossipAveraging, topology=from_edges(EDGES))
    for _, _, state, params, metrics in play(strategy, [range(NODES)] * 2):
        away = ((state.models - params) ** 2).sum(dim=1).mean().sqrt()
        assert metrics["consensus_distance"] == pytest.approx(float(away), rel=1e-12)
        now = state.models[:, LAYOUT.slices["w"]].var(dim=1, correction=0)
        ratio = float((now / state.start_variances[:, 0]).mean())
        assert metrics["variance_ratio/w"] == pytest.approx(ratio, rel=1e-12)
        torch.testing.assert_close(params, state.models.mean(dim=0))
    assert {name for name in metrics if name.startswith("variance")} == {
        "variance_ratio/w", "variance_ratio/v",
    }  # fmt: skip


@pytest.mark.parametrize("mixing", ["uniform", "metropolis"])
def test_the_spectral_gap_is_that_of_the_whole_graph(mixing):
    topology = TOPOLOGIES["barabasi_albert"]()
    strategy = built(GossipAveraging, topology=topology, mixing=mixing, self_weight=0.3)
    _, metrics = one_round(strategy, strategy.init(PARAMS, 30), [1, 2])
    graph = topology.graph(30, server_round=1, seed=SEED)
    expected = spectral_gap(mixing_matrix(graph, mixing=mixing, self_weight=0.3))
    assert metrics["spectral_gap"] == pytest.approx(expected, abs=1e-12)


def test_the_spectral_gap_of_very_many_nodes_is_left_out():
    layout = Layout.from_named({"w": torch.zeros(2)})
    strategy = built(GossipAveraging, layout, start="shared")
    state = strategy.init(torch.zeros(2), 2001)
    _, _, metrics = strategy.server_update(
        state, torch.zeros(2), replies(strategy, state, {}, layout)
    )
    nothing = {"messages": 0.0, "messages_lost": 0.0, "message_bytes": 0.0}
    assert metrics == {"consensus_distance": 0.0, **nothing}


def test_a_tensor_that_starts_without_variance_has_no_ratio():
    strategy = built(VarianceCorrectedGossip)
    state = strategy.init(torch.zeros(LAYOUT.dim).double(), NODES)
    state, metrics = one_round(strategy, state, range(NODES))
    assert not state.models.any()
    assert "variance_ratio/w" not in metrics


# --- with other parts -----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_on_a_complete_graph_metropolis_mixing_is_uniform_fedavg(model):
    (declared,) = GossipAveraging.degenerate
    assert declared.becomes == "fedavg"
    found = []
    for strategy in (GossipAveraging(**declared.settings), FedAvg(**declared.with_settings)):
        app = fed.make_app(model, dtype="float64")
        start = fed.initial_arrays(model, dtype="float64")
        found.append(fed.run_rounds(strategy, InlineGrid(app, 8), start, app.layout, rounds=3))
    assert fed.largest_difference(found[0][0], found[1][0]) <= declared.tolerance
    assert found[0][1][3]["server/consensus_distance"] < 1e-12


@BOTH
@pytest.mark.parametrize("protocol", ["synchronous", "buffered"])
def test_a_run_with_partial_participation_goes_through(cls, protocol):
    app = fed.make_app("mlp")
    start = fed.initial_arrays("mlp")
    cohorts = ((0, 1, 4, 5, 6), (0, 2, 3, 6, 7), ())
    strategy = cls(protocol=protocol, interval=(1, 2), message_loss=0.2)
    arrays, records = fed.run_rounds(
        strategy, InlineGrid(app, 8), start, app.layout, rounds=3, cohorts=cohorts
    )
    flat = app.layout.flatten({n: torch.from_numpy(arrays[n].numpy()) for n in start})
    torch.testing.assert_close(flat, strategy.state.models.mean(dim=0))
    assert records[-1]["server/consensus_distance"] > 0
    assert strategy.state.tick == 3


@BOTH
def test_the_arguments_are_a_scenario_schema(cls):
    schema = signatures.keys(cls, skip=("topology",))
    assert all(key.description and not key.required for key in schema.values())
    assert schema["interval"].default == (8, 12)
    checked = signatures.check(cls, {"interval": [1, 4]}, where="[strategy]", skip=("topology",))
    assert checked["interval"] == [1, 4]
    assert isinstance(cls(**checked), cls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_weight": 1.5}, r"self_weight = 1.5: must be in \[0, 1\]"),
        ({"message_loss": -0.1}, r"message_loss = -0.1: must be in \[0, 1\]"),
        ({"mixing": "max"}, "mixing = 'max': must be uniform or metropolis"),
        ({"protocol": "push"}, "protocol = 'push': must be synchronous or buffered"),
        ({"start": "zero"}, "start = 'zero': must be own or shared"),
        ({"interval": (3, 2)}, r"interval = \[3, 2\]: must be \[a, b\] with 1 <= a <= b"),
        ({"interval": (0, 2)}, "interval = .*: must be"),
        ({"send_every": 0}, "send_every = 0: must be >= 1"),
        ({"buffer_ratio": 0.0}, "buffer_ratio = 0.0: must be > 0"),
        ({"target": "self"}, "target = 'self': must be received or all"),
        ({"correct": "biases"}, "correct = 'biases': must be weights or all"),
        ({"target_scale": 0.0}, "target_scale = 0.0: must be > 0"),
        ({"target_scale": math.inf}, "target_scale = inf: must be > 0 and finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VarianceCorrectedGossip(**options)


@BOTH
def test_a_graph_that_cannot_be_is_refused_before_round_1(cls):
    strategy = built(cls, topology=TOPOLOGIES["regular"](degree=8))
    with pytest.raises(ScenarioError, match=r"\[topology\] degree = 8 with 6 nodes: must be at m"):
        strategy.init(PARAMS, NODES)
