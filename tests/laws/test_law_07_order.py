"""Law 7: the order of arrival changes no bit; clients' names change nothing beyond rounding."""

import functools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Error
from hypothesis import given
from hypothesis import strategies as st

from fedsim.aggregators.sums import average_buffers, mean_metrics, weighted_sum
from fedsim.engine.inline import InlineGrid
from fedsim.federation.topology.kinds import from_edges
from fedsim.messages import flower_internals as internals
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from fedsim.scenario import discovery
from fedsim.scenario.choice import Choice
from fedsim.strategy.base import FederatedStrategy
from tests.laws import federations as fed

COHORTS = ((0, 1, 4, 5, 6), (0, 2, 3, 6, 7), (1, 3, 5, 6, 7))
EDGES = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 0), (0, 4), (1, 6), (2, 5))
STARTS = torch.from_numpy(np.random.default_rng(5).normal(size=(8, 12)))
LAYOUT = Layout.from_named(
    {"w": torch.zeros(4, 3).double(), "n.running_mean": torch.zeros(2).double()}
)


def shuffled_rounds(name, model, seed):
    """Two rounds whose replies, an error among them, arrive shuffled; bits of each aggregate."""
    app = fed.make_app_for(name, model)
    grid = InlineGrid(app, 8)
    strategy = fed.make_strategy(name)
    strategy.declare_buffers([spec.name for spec in app.layout.buffers])
    arrays, found = fed.initial_arrays(model), []
    for server_round in (1, 2):
        sent = fed.configure(strategy, grid, arrays, server_round)
        messages = list(grid.send_and_receive(sent))
        metadata = messages[3].metadata
        messages[3] = internals.message_with(metadata, error=Error(2, "no battery"))
        random.Random(seed).shuffle(messages)
        arrays, metrics = strategy.aggregate_train(server_round, messages)
        found.append((fed.record_bits(arrays), dict(metrics)))
    return found, fed.state_bits(strategy.state)


# every strategy on one of the models in turn, on the other one among the slow tests
TURNS = [
    pytest.param(name, model, marks=[pytest.mark.slow] if (number + place) % 2 else [])
    for number, name in enumerate(fed.strategies())
    for place, model in enumerate(("mlp", "cnn_batchnorm"))
]


@pytest.mark.parametrize(("name", "model"), TURNS)
def test_the_order_of_arrival_changes_no_bit(name, model):
    assert shuffled_rounds(name, model, 1) == shuffled_rounds(name, model, 2)


def synthetic_replies(server_round, params, names, seed=0):
    """A round's replies of made-up updates; `names` maps a client to what it is called."""
    draw = np.random.default_rng((seed, server_round))
    rows = {}
    for client in range(8):
        update, buffer = draw.normal(size=12), draw.normal(size=2)
        rows[client] = (update, buffer, int(draw.integers(1, 300)), float(draw.normal()))
    members = sorted(COHORTS[server_round - 1], key=lambda client: names[client])
    params = params.clone()
    return Replies(
        server_round=server_round,
        layout=LAYOUT,
        client_ids=np.array([names[c] for c in members]),
        params=torch.stack([params + torch.from_numpy(rows[c][0]) for c in members]),
        reference=params,
        buffers={"n.running_mean": torch.stack([torch.from_numpy(rows[c][1]) for c in members])},
        extra={},
        num_examples=torch.tensor([rows[c][2] for c in members]),
        metrics={"loss": torch.tensor([rows[c][3] for c in members], dtype=torch.float64)},
        staleness=torch.zeros(len(members), dtype=torch.int64),
    )


def renamed_strategy(name, names) -> FederatedStrategy:
    """The strategy; where clients have places in a graph and starts, these go by their names."""
    made = discovery.strategy_factory(name)
    if Choice("strategies", {"name": name}).takes(discovery.TOPOLOGY):
        strategy = made(topology=from_edges([(names[a], names[b]) for a, b in EDGES]))
        client = {new: old for old, new in enumerate(names)}
        strategy.declare_starts(lambda new: STARTS[client[new]])
    else:
        strategy = made()
    strategy.declare_layout(LAYOUT, {"n.running_mean": torch.zeros(2, dtype=torch.float64)})
    return strategy


@functools.cache
def three_rounds(name, names):
    """The model after three rounds of made-up updates; `names[client]` is what it is called."""
    strategy = renamed_strategy(name, names)
    params = torch.linspace(-1, 1, 12, dtype=torch.float64)
    state, memories = strategy.init(params, 8), {}
    for server_round in (1, 2, 3):
        replies = synthetic_replies(server_round, params, names)
        sent, own = strategy.broadcast(state, params, replies.client_ids)
        extra = fed.returned_by_parts(name, LAYOUT, params, replies.params, sent.extra)
        encoded = fed.encoded_by_parts(name, params, replies, own, memories)
        replies = replace(replies, extra=extra, encoded=encoded)
        params, state, _ = strategy.server_update(state, params, replies)
    return params


@pytest.mark.parametrize("name", fed.strategies())
@given(order=st.permutations(range(8)))
def test_renaming_clients_changes_nothing_beyond_rounding(name, order):
    as_they_were, renamed = (three_rounds(name, tuple(names)) for names in (range(8), order))
    torch.testing.assert_close(as_they_were, renamed, rtol=0, atol=1e-12)


@given(order=st.permutations(range(8)))
def test_renaming_clients_changes_buffers_and_metrics_only_by_rounding(order):
    params = torch.zeros(12, dtype=torch.float64)
    before = {"n.running_mean": torch.zeros(2, dtype=torch.float64)}
    one, other = (synthetic_replies(1, params, names) for names in (list(range(8)), order))
    mean, renamed = (average_buffers(before, r)["n.running_mean"] for r in (one, other))
    torch.testing.assert_close(mean, renamed, rtol=0, atol=1e-12)
    assert mean_metrics(one) == pytest.approx(mean_metrics(other), abs=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), st.integers(0, 2**32))
def test_the_weighted_sum_is_exact_to_the_last_digits(weights, seed):
    """Against exact rational arithmetic."""
    from fractions import Fraction

    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(len(weights), 3)).astype(np.float32)
    reference = draw.normal(size=3).astype(np.float32)
    total = weighted_sum(
        torch.tensor(weights, dtype=torch.float64),
        torch.from_numpy(rows),
        torch.from_numpy(reference),
    )
    for column in range(3):
        exact = sum(
            Fraction(w) * (Fraction(float(row[column])) - Fraction(float(reference[column])))
            for w, row in zip(weights, rows, strict=True)
        )
        assert float(total[column]) == pytest.approx(float(exact), rel=1e-12, abs=1e-10)


def test_every_client_may_start_from_its_own_reference():
    rows = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    own = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    assert weighted_sum(torch.tensor([1.0, 10.0]).double(), rows, own).tolist() == [32.0, 43.0]
