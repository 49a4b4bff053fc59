"""Gossip with a robust rule, and Byzantine peers in it."""

import numpy as np
import pytest
import torch

from fedsim.basics.json_files import JsonLines
from fedsim.federation.topology.kinds import complete, ring, small_world
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from fedsim.runs import start as run
from fedsim.scenario.scenario import Scenario
from strategies.gossip import GossipAveraging
from tests.laws import federations as fed
from tests.oracles import robust_oracle as oracle

NODES, DIM = 7, 6
LAYOUT = Layout.from_named({"w": torch.zeros(2, 3, dtype=torch.float64)})
FOUR = small_world(degree=4, rewiring=0.0)  # two to either side
START = torch.linspace(-1, 1, DIM, dtype=torch.float64)


def trained(models, server_round=1):
    draw = np.random.default_rng(server_round)
    updates = torch.from_numpy(draw.normal(size=models.shape))
    return Replies(
        server_round=server_round, layout=LAYOUT, client_ids=np.arange(len(models)),
        params=models + updates, reference=models, buffers={}, extra={},
        num_examples=torch.ones(len(models), dtype=torch.int64), metrics={},
        staleness=torch.zeros(len(models), dtype=torch.int64),
    )  # fmt: skip


def made(**options):
    strategy = GossipAveraging(**options)
    strategy.declare_layout(LAYOUT)
    return strategy, strategy.init(START, NODES)


RULES = {
    "coordinate_median": lambda rows: oracle.coordinate_median(rows),
    "trimmed_mean": lambda rows: oracle.trimmed_mean(rows, 1),
    "meamed": lambda rows: oracle.meamed(rows, 1),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("topology", [FOUR, complete()])
def test_a_node_mixes_its_model_with_the_rules_of_its_own_and_the_received(rule, topology):
    strategy, state = made(topology=topology, rule=rule, num_byzantine=1, self_weight=0.3)
    models = state.models.numpy()
    neighbours = topology.neighbours(NODES, server_round=1, seed=0)
    for server_round in (1, 2):
        sent = trained(torch.from_numpy(models), server_round)
        _, state, metrics = strategy.server_update(state, START, sent)
        before = sent.params.numpy()
        expected = [
            0.3 * before[node] + 0.7 * RULES[rule](before[sorted([node, *neighbours[node]])])
            for node in range(NODES)
        ]
        models = np.array(expected)
        np.testing.assert_allclose(state.models.numpy(), models, rtol=0, atol=1e-13)
        assert metrics["averaged"] == NODES
        assert metrics["nodes_beyond_f"] == 0


@pytest.mark.parametrize("rule", ["bulyan", "multi_krum", "geometric_median", "phocas"])
def test_among_all_and_without_self_weight_it_is_the_servers_rule(rule):
    options = {"topology": complete(), "self_weight": 0.0, "start": "shared"}
    strategy, state = made(rule=rule, num_byzantine=1, **options)
    sent = trained(state.models)
    _, after, _ = strategy.server_update(state, START, sent)
    server = fed.make_strategy("robust", rule=rule, num_byzantine=1)
    shared = Replies(**{**vars(sent), "reference": START})
    expected, _, _ = server.server_update(server.init(START, NODES), START, shared)
    for model in after.models:
        np.testing.assert_allclose(model, expected, rtol=0, atol=1e-12)


def test_centred_clipping_begins_from_the_nodes_own_model():
    strategy, state = made(
        topology=complete(), rule="centred_clipping", clip_radius=0.5, self_weight=0.0
    )
    sent = trained(state.models)
    _, after, _ = strategy.server_update(state, START, sent)
    rows = sent.params.numpy()
    for node in range(NODES):
        expected = oracle.centred_clipping(rows, 0.5, 1, rows[node])
        np.testing.assert_allclose(after.models[node].numpy(), expected, rtol=0, atol=1e-13)


def test_a_node_that_hears_too_few_keeps_its_model():
    strategy, state = made(topology=FOUR, rule="trimmed_mean", num_byzantine=2)
    everybody = trained(state.models)
    rows = [0, 1, 2, 3]  # with themselves nodes 0 and 3 have three models, 1 and 2 four; of 5
    fields = {**vars(everybody), "client_ids": np.array(rows)}
    for name in ("params", "reference", "num_examples", "staleness"):
        fields[name] = fields[name][rows]
    _, after, metrics = strategy.server_update(state, START, Replies(**fields))
    assert metrics["averaged"] == 0
    assert torch.equal(after.models[rows], everybody.params[rows])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "phocas", "protocol": "buffered"}, "protocol = 'buffered' with rule = 'phocas'"),
        ({"rule": "phocas", "mixing": "metropolis"}, "mixing = 'metropolis' with rule = 'phocas'"),
        ({"rule": "krum", "variant": "flower"}, "weighs by examples, which nodes do not send"),
        ({"num_byzantine": 1}, "a mean bears none"),
    ],
)
def test_what_a_node_cannot_do_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GossipAveraging(**options)


def test_an_f_that_a_nodes_neighbours_do_not_bear_is_refused_with_the_bound():
    strategy, _ = made(topology=ring(), rule="krum", num_byzantine=1)
    words = r"2 num_byzantine \+ 3 = 5; use at most 0; node 0 has 2 neighbours and itself"
    with pytest.raises(ValueError, match=words):
        strategy.check(NODES, NODES)
    made(topology=FOUR, rule="krum", num_byzantine=1)[0].check(NODES, NODES)


def test_the_honest_are_measured_and_nodes_that_hear_too_many_attackers_are_counted():
    strategy, state = made(topology=FOUR, rule="trimmed_mean", num_byzantine=1)
    strategy.declare_byzantine(lambda server_round: {0, 1} if server_round != 2 else {0})
    sent = trained(state.models)
    sent.params[[0, 1]] = 1e6
    for beyond in (2, 0):  # 2 and 6 have both of them as neighbours; in round 2 one attacks
        mean, state, metrics = strategy.server_update(state, START, sent)
        assert metrics["nodes_beyond_f"] == beyond
        np.testing.assert_allclose(mean, state.models[2:].mean(dim=0), rtol=1e-12)


def scenario(**strategy):
    return Scenario.from_resolved({
        "title": "peers", "rounds": 6, "data": {"name": "digits"},
        "partition": {"kind": "iid", "clients": 9},
        "task": {"model": "logistic"},
        "client": {"batch_size": 16, "local_lr": 0.3},
        "strategy": {"name": "gossip", "start": "shared", **strategy},
        "topology": {"kind": "small_world", "degree": 6, "rewiring": 0.0},
        "attack": {"kind": "scaled_reverse", "clients": [1, 5], "factor": 20.0},
        "engine": {"kind": "inline"},
    }, "peers.toml")  # fmt: skip


def test_byzantine_peers_spoil_the_mean_and_not_a_robust_rule(tmp_path):
    found = {}
    for name, strategy in {
        "mean": {}, "robust": {"rule": "trimmed_mean", "num_byzantine": 2}
    }.items():  # fmt: skip
        folder = run.start(scenario(**strategy), out=tmp_path / name).folder
        found[name] = JsonLines.read(folder / "metrics.jsonl")[-1]
        assert found[name]["clients/byzantine"] == 2
    assert found["robust"]["nodes/accuracy_min"] > 0.7
    assert found["robust"]["server/nodes_beyond_f"] == 0
    assert found["mean"]["nodes/accuracy"] < 0.5
