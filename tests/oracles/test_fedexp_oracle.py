"""FedExP against an independent oracle written from the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.fedavg import FedAvg
from strategies.fedexp import FedExP, extrapolation
from tests.oracles import fedexp_oracle as oracle
from tests.strategies.test_participation_baselines import START, made_up, replies

COHORTS = [(0, 1, 3), (0, 2), (), (0, 1, 2, 3, 4), (3,), (1, 2)]
EPS = np.finfo(np.float64).eps
UPDATES = st.lists(
    st.lists(st.floats(-10, 10), min_size=3, max_size=3).map(np.array), min_size=1, max_size=6
)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_the_strategy_equals_the_oracle_absences_included(weighted, epsilon):
    rounds = [
        (list(made_up(t, cohort).values()), list(range(1, len(cohort) + 1)))
        for t, cohort in enumerate(COHORTS)
    ]
    expected = oracle.follow(START.numpy(), rounds, epsilon=epsilon, weighted=weighted)
    assert max(lr for lr, _ in expected if lr) > 1.05  # some rounds extrapolate
    strategy = FedExP(epsilon=epsilon, weighted=weighted)
    params, state = START, strategy.init(START, 5)
    for (t, cohort), (lr, x) in zip(enumerate(COHORTS), expected, strict=True):
        answered = replies(params, made_up(t, cohort))
        params, state, metrics = strategy.server_update(state, params, answered)
        np.testing.assert_allclose(params.numpy(), x, rtol=0, atol=1e-12)
        assert metrics == ({} if lr is None else {"server_lr": pytest.approx(lr, rel=1e-12)})


@given(updates=UPDATES, epsilon=st.floats(1e-3, 1))
def test_the_step_is_the_papers(updates, epsilon):
    stack = torch.tensor(np.array(updates))
    ones = torch.ones(len(stack), dtype=torch.float64)
    mean = stack.mean(dim=0)
    found = extrapolation((stack**2).sum(dim=1), float(mean @ mean), ones, epsilon)
    # the mean's square is known to some roundings of the updates' squares
    largest = max(float(u @ u) for u in updates)
    assert found == pytest.approx(
        oracle.extrapolation(updates, epsilon=epsilon), rel=1e-12 + 100 * EPS * largest / epsilon
    )


@given(updates=UPDATES, epsilon=st.floats(1e-3, 1))
def test_the_step_lies_between_one_and_what_epsilon_allows(updates, epsilon):
    stack = torch.tensor(np.array(updates))
    ones = torch.ones(len(stack), dtype=torch.float64)
    mean, squares = stack.mean(dim=0), (stack**2).sum(dim=1)
    found = extrapolation(squares, float(mean @ mean), ones, epsilon)
    assert 1 <= found <= max(1.0, float(squares.mean()) / (2 * epsilon) * (1 + 8 * EPS))


def run(strategy, made):
    """The model after three rounds of updates made by (round, client)."""
    params, state = START, strategy.init(START, 4)
    for t in range(3):
        params, state, _ = strategy.server_update(state, params, replies(params, made(t)))
    return params


def test_on_identical_clients_it_is_fedavg_bit_for_bit():
    def alike(t):
        return dict.fromkeys(range(4), made_up(t, (0,))[0])

    assert torch.equal(run(FedExP(), alike), run(FedAvg(weighted=False), alike))


def test_where_updates_cancel_it_is_not():
    """The control: clients that pull apart."""

    def apart(t):
        return {n: (-1) ** n * 3.0 + made_up(t, range(4))[n] / 10 for n in range(4)}

    assert not torch.equal(run(FedExP(), apart), run(FedAvg(weighted=False), apart))


@given(power=st.integers(-8, 8), seed=st.integers(0, 99))
def test_the_unit_of_the_updates_is_of_no_account(power, seed):
    """Delta times c and epsilon times c^2 leave eta_g as it is; c a power of two, to the bit."""
    draw = torch.from_numpy(np.random.default_rng(seed).normal(size=(5, 3)))
    ones = torch.ones(5, dtype=torch.float64)
    steps = []
    for factor in (1.0, 2.0**power):
        rows = draw * factor
        mean = rows.mean(dim=0)
        square = float((mean**2).sum())
        steps.append(extrapolation((rows**2).sum(dim=1), square, ones, 1e-3 * factor**2))
    assert steps[0] == steps[1]


def test_a_client_alone_is_not_extrapolated():
    params = START
    moved, _, metrics = FedExP().server_update(
        FedExP().init(params, 5), params, replies(params, made_up(0, (2,)))
    )
    assert metrics == {"server_lr": 1.0}
    np.testing.assert_allclose(
        moved.numpy(), START.numpy() + made_up(0, (2,))[2], rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_an_epsilon_that_is_not_positive_is_refused(epsilon):
    with pytest.raises(ValueError, match=f"epsilon = {epsilon}: must be > 0 and finite"):
        FedExP(epsilon=epsilon)
