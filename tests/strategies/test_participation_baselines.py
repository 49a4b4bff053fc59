"""Average all, known participation, MIFA and FedVARP against NumPy."""

import logging

import numpy as np
import pytest
import torch

from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from strategies.average_all import AverageAll
from strategies.fedau import FedAU
from strategies.fedavg import FedAvg
from strategies.fedvarp import FedVARP
from strategies.known_participation import KnownParticipation
from strategies.mifa import MIFA
from tests.oracles import fedau_oracle as oracle

DIM, CLIENTS = 4, 5
LAYOUT = Layout.from_named({"w": torch.zeros(DIM, dtype=torch.float64)})
START = torch.linspace(-1, 1, DIM, dtype=torch.float64)
RATES = [0.9, 0.5, 0.25, 1.0, 0.02]
COHORTS = [(0, 1, 3), (0, 2), (), (0, 1, 2, 3, 4), (3,), (1, 2)]


def replies(params, updates):
    rows = [params + torch.as_tensor(update).to(params.dtype) for update in updates.values()]
    return Replies(
        server_round=1,
        layout=LAYOUT,
        client_ids=np.array(list(updates), dtype=np.int64),
        params=torch.stack(rows) if rows else params.new_zeros((0, len(params))),
        reference=params,
        buffers={},
        extra={},
        num_examples=torch.arange(1, len(rows) + 1),
        metrics={},
        staleness=torch.zeros(len(rows), dtype=torch.int64),
    )


def made_up(server_round, clients):
    draw = np.random.default_rng((5, server_round)).normal(size=(20, DIM))
    return {n: draw[n] for n in clients}


def run(strategy, cohorts=COHORTS, *, clients=CLIENTS, start=START):
    """Models and states after every round."""
    params, state, found = start, strategy.init(start, clients), []
    for server_round, cohort in enumerate(cohorts):
        answered = replies(params, made_up(server_round, cohort))
        params, state, _ = strategy.server_update(state, params, answered)
        found.append((params, state))
    return found


def assert_models(found, expected):
    for (params, _), x in zip(found, expected, strict=True):
        np.testing.assert_allclose(params.numpy(), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("server_lr", [1.0, 2.5])
def test_average_all_equals_the_oracle(server_lr):
    x, expected = START.numpy(), []
    for server_round, cohort in enumerate(COHORTS):
        updates = made_up(server_round, cohort)
        x = oracle.average_all(x, updates, clients=CLIENTS, lr=server_lr)
        expected.append(x)
    assert_models(run(AverageAll(server_lr=server_lr)), expected)


@pytest.mark.parametrize("server_lr", [1.0, 0.4])
@pytest.mark.parametrize("told", ["by the scenario", "by the simulation", "by both"])
def test_known_participation_equals_the_oracle(server_lr, told):
    rates = None if told == "by the simulation" else RATES
    strategy = KnownParticipation(rates=rates, server_lr=server_lr)
    if told != "by the scenario":
        strategy.declare_rates(np.array(RATES if rates is None else [0.5] * CLIENTS))
    x, expected = START.numpy(), []
    for server_round, cohort in enumerate(COHORTS):
        updates = made_up(server_round, cohort)
        x = oracle.known(x, updates, RATES, clients=CLIENTS, lr=server_lr)
        expected.append(x)
    assert_models(run(strategy), expected)


@pytest.mark.parametrize("server_lr", [1.0, 0.4])
@pytest.mark.parametrize(
    ("strategy", "step"), [(MIFA, oracle.mifa), (FedVARP, oracle.fedvarp)], ids=["mifa", "fedvarp"]
)
def test_methods_with_a_memory_equal_their_oracles(strategy, step, server_lr):
    x, memory, expected = START.numpy(), np.zeros((CLIENTS, DIM)), []
    found = run(strategy(server_lr=server_lr))
    for server_round, cohort in enumerate(COHORTS):
        x, memory = step(x, made_up(server_round, cohort), memory, lr=server_lr)
        expected.append(x)
        remembered = found[server_round][1].updates
        np.testing.assert_allclose(remembered.numpy(), memory, rtol=0, atol=1e-14)
    assert_models(found, expected)


def test_known_participation_of_the_specifications_example():
    x = torch.zeros(1, dtype=torch.float64)
    strategy = KnownParticipation(rates=[0.25, 1.0])
    answered = replies(x, {0: [1.0]})
    moved, _, metrics = strategy.server_update(strategy.init(x, 2), x, answered)
    assert moved.tolist() == [2.0]
    assert metrics == {"effective_participation": 2.0}


def test_in_a_round_without_replies_only_mifa_moves_the_model():
    cohorts = [(0, 1, 3), ()]
    for strategy in (AverageAll(), KnownParticipation(rates=RATES), FedVARP()):
        before, after = run(strategy, cohorts)
        assert torch.equal(before[0], after[0])
    before, after = run(MIFA(), cohorts)
    step = np.sum(list(made_up(0, (0, 1, 3)).values()), axis=0) / CLIENTS
    np.testing.assert_allclose(after[0] - before[0], step, rtol=0, atol=1e-15)


@pytest.mark.parametrize("make", [MIFA, FedVARP])
def test_the_memory_is_copied_and_has_the_models_dtype(make):
    found = run(make(), start=START.float())
    tables = [state.updates for _, state in found]
    assert {t.dtype for t in tables} == {torch.float32}
    assert tables[0][4].eq(0).all()  # client 4 is there in the fourth round only
    assert not tables[3][4].eq(0).any()


@pytest.mark.parametrize("make", [AverageAll, MIFA, FedVARP])
def test_a_client_that_joins_late_counts_among_all(make):
    late = [(0, 1), (1, 4), (0,)]
    x, memory, n, expected = START.numpy(), np.zeros((2, DIM)), 2, []
    for server_round, cohort in enumerate(late):
        updates = made_up(server_round, cohort)
        if max(cohort) >= n:
            n = max(cohort) + 1
            memory = np.vstack([memory, np.zeros((n - len(memory), DIM))])
        if make is AverageAll:
            x = oracle.average_all(x, updates, clients=n)
        else:
            step = oracle.mifa if make is MIFA else oracle.fedvarp
            x, memory = step(x, updates, memory)
        expected.append(x)
    assert_models(run(make(), late, clients=2), expected)


def test_known_participation_refuses_a_client_that_joins_late():
    with pytest.raises(ValueError, match="client 4 joined after round 1"):
        run(KnownParticipation(rates=[0.5, 0.5]), [(0,), (1, 4)], clients=2)


def test_without_known_rates_known_participation_is_average_all_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        found = run(KnownParticipation())
    assert "nobody says at which rates clients take part" in caplog.text
    for (params, _), (other, _) in zip(found, run(AverageAll()), strict=True):
        assert torch.equal(params, other)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KnownParticipation(rates=[0.5, 0.0]), r"rates = 0.0 for client 1: must be in \(0"),
        (lambda: KnownParticipation(rates=[1.5]), "rates = 1.5 for client 0"),
        (
            lambda: KnownParticipation(rates=[0.5, 0.5]).init(START, 3),
            "rates has 2 values for 3 clients: give one per client",
        ),
    ],
)
def test_impossible_rates_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [AverageAll, KnownParticipation])
def test_with_everybody_a_linear_baseline_is_uniform_averaging_to_the_bit(make, dtype):
    everybody = [tuple(range(CLIENTS))] * 4
    start = START.to(dtype)
    found = run(make(server_lr=0.7), everybody, start=start)
    for (params, _), (other, _) in zip(
        found, run(FedAvg(weighted=False, server_lr=0.7), everybody, start=start), strict=True
    ):
        assert torch.equal(params, other)


@pytest.mark.parametrize("make", [MIFA, FedVARP])
def test_with_everybody_a_memory_changes_nothing_but_rounding(make):
    everybody = [tuple(range(CLIENTS))] * 4
    uniform = run(FedAvg(weighted=False, server_lr=0.7), everybody)
    assert_models(run(make(server_lr=0.7), everybody), [params.numpy() for params, _ in uniform])


def test_buffers_count_as_the_clients_do():
    answered = replies(START, made_up(0, (1, 2)))
    for make, expected in (
        (AverageAll, [1, 1]),
        (MIFA, [1, 1]),
        (FedVARP, [1, 1]),
        (FedAU, [1, 1]),
        (lambda: KnownParticipation(rates=RATES), [2, 4]),
    ):
        strategy = make()
        weights = strategy.buffer_weights(strategy.init(START, CLIENTS), answered)
        assert weights.dtype == torch.float64
        assert weights.tolist() == expected
