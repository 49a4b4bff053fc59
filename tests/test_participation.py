import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import ScenarioError
from fedsim.participation import PARTICIPATION, Bernoulli, Full, Uniform

RULES = {
    "full": Full(),
    "uniform": Uniform(cohort_size=3),
    "bernoulli": Bernoulli(rate=0.4),
    "bernoulli_per_client": Bernoulli(rate=[i / 20 for i in range(20)]),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(seed=st.integers(0, 2**40), server_round=st.integers(1, 10**6))
def test_participants_are_sorted_unique_client_ids(rule, seed, server_round):
    ids = rule.participants(server_round, num_clients=20, seed=seed)
    assert ids.dtype == np.int64
    assert sorted(set(ids.tolist())) == ids.tolist()
    assert all(0 <= i < 20 for i in ids.tolist())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_participants_depend_on_seed_and_round_alone(rule):
    asked_once = rule.participants(7, num_clients=20, seed=3)
    for server_round in (1, 2, 9):
        rule.participants(server_round, num_clients=20, seed=5)
    np.testing.assert_array_equal(rule.participants(7, num_clients=20, seed=3), asked_once)


@pytest.mark.parametrize("name", ["uniform", "bernoulli", "bernoulli_per_client"])
def test_rounds_and_seeds_give_other_participants(name):
    rule = RULES[name]
    by_round = {tuple(rule.participants(t, num_clients=20, seed=1)) for t in range(1, 31)}
    by_seed = {tuple(rule.participants(1, num_clients=20, seed=s)) for s in range(30)}
    assert len(by_round) > 20
    assert len(by_seed) > 20


def test_full_participation_takes_every_client():
    assert Full().participants(1, num_clients=5, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_uniform_cohorts_have_the_size_asked_for():
    sizes = {
        len(Uniform(cohort_size=6).participants(t, num_clients=9, seed=2)) for t in range(1, 50)
    }
    assert sizes == {6}


def test_a_cohort_of_all_clients_is_everybody():
    ids = Uniform(cohort_size=9).participants(1, num_clients=9, seed=2)
    assert ids.tolist() == list(range(9))


def _rates(rule, clients, rounds):
    seen = np.zeros(clients)
    for server_round in range(1, rounds + 1):
        seen[rule.participants(server_round, num_clients=clients, seed=11)] += 1
    return seen / rounds


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Uniform(cohort_size=5), np.full(20, 5 / 20)),
        (Bernoulli(rate=0.3), np.full(20, 0.3)),
        (Bernoulli(rate=[0.0, 0.1, 0.5, 0.9, 1.0] * 4), np.array([0.0, 0.1, 0.5, 0.9, 1.0] * 4)),
    ],
    ids=["uniform", "bernoulli", "bernoulli_per_client"],
)
def test_each_clients_empirical_rate_is_within_four_standard_errors(rule, expected):
    rounds = 4000
    error = np.sqrt(expected * (1 - expected) / rounds)
    assert (np.abs(_rates(rule, 20, rounds) - expected) <= 4 * error).all()


def test_bernoulli_clients_are_independent_of_each_other():
    # with one common rate a count is drawn first: its law must be the binomial's
    rule, clients, rate, rounds = Bernoulli(rate=0.3), 20, 0.3, 4000
    sizes = np.array(
        [len(rule.participants(t, num_clients=clients, seed=4)) for t in range(1, rounds + 1)]
    )
    variance = clients * rate * (1 - rate)
    fourth = variance * (1 + 3 * (clients - 2) * rate * (1 - rate))  # binomial fourth moment
    assert abs(sizes.mean() - clients * rate) <= 4 * math.sqrt(variance / rounds)
    assert abs(sizes.var() - variance) <= 4 * math.sqrt((fourth - variance**2) / rounds)


def test_pairs_meet_in_a_uniform_cohort_as_often_as_chance_says():
    clients, cohort, rounds = 10, 3, 4000
    met = np.zeros((clients, clients))
    for server_round in range(1, rounds + 1):
        ids = Uniform(cohort_size=cohort).participants(server_round, num_clients=clients, seed=8)
        met[np.ix_(ids, ids)] += 1
    chance = cohort * (cohort - 1) / (clients * (clients - 1))
    pairs = met[np.triu_indices(clients, 1)] / rounds
    # 45 pairs: five standard errors for the largest of them
    assert np.abs(pairs - chance).max() <= 5 * math.sqrt(chance * (1 - chance) / rounds)


@pytest.mark.parametrize("rule", [Uniform(cohort_size=20), Bernoulli(rate=2e-5)])
def test_drawing_from_a_million_clients_costs_the_cohort_alone(rule):
    rule.participants(1, num_clients=1_000_000, seed=1)
    tracemalloc.start()
    ids = rule.participants(2, num_clients=1_000_000, seed=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1 <= len(ids) < 60
    assert peak < 100_000


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Full(), 20),
        (Uniform(cohort_size=7), 7),
        (Bernoulli(rate=0.26), 5),
        (Bernoulli(rate=0.001), 1),
        (Bernoulli(rate=[0.25] * 20), 5),
    ],
)
def test_the_expected_cohort_is_the_mean_number_of_participants(rule, expected):
    assert rule.expected_cohort(20) == expected


def test_bernoulli_rounds_may_be_empty():
    sizes = [len(Bernoulli(rate=0.05).participants(t, num_clients=5, seed=0)) for t in range(1, 50)]
    assert min(sizes) == 0


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_without_memory_have_an_empty_state(rule):
    assert json.dumps(rule.state()) == "{}"
    rule.restore({})
    with pytest.raises(ValueError, match="has no state"):
        rule.restore({"phase": 3})


@pytest.mark.parametrize("name", PARTICIPATION)
def test_every_rule_can_be_built_without_arguments(name):
    ids = PARTICIPATION[name]().participants(1, num_clients=30, seed=0)
    assert ids.dtype == np.int64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Uniform(cohort_size=0), r"\[participation\] cohort_size = 0: must be >= 1"),
        (lambda: Bernoulli(rate=0.0), r"\[participation\] rate = 0.0: must be in \(0, 1\]"),
        (lambda: Bernoulli(rate=1.5), r"\[participation\] rate = 1.5: must be in \(0, 1\]"),
        (lambda: Bernoulli(rate=float("nan")), r"rate = nan"),
        (lambda: Bernoulli(rate=[0.5, -0.1]), r"rate = -0.1 for client 1: must be in \[0, 1\]"),
        (lambda: Bernoulli(rate=[0.0, 0.0]), r"at least one must be > 0"),
        (
            lambda: Uniform(cohort_size=11).participants(1, num_clients=10, seed=0),
            "cohort_size = 11: there are 10 clients; use at most 10",
        ),
        (
            lambda: Uniform(cohort_size=11).expected_cohort(10),
            "cohort_size = 11: there are 10 clients; use at most 10",
        ),
        (
            lambda: Bernoulli(rate=[0.5, 0.5]).participants(1, num_clients=3, seed=0),
            "rate has 2 values for 3 clients",
        ),
    ],
)
def test_impossible_numbers_are_refused_with_what_is_allowed(build, message):
    with pytest.raises(ScenarioError, match=message):
        build()
