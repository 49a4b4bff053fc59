"""Rates that change over the rounds: sines and staircases, shifted, clipped and by labels."""

import math
import tracemalloc

import numpy as np
import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.federation.participation.kinds import Sine, Staircase
from fedsim.federation.participation.rates import label_rates
from fedsim.scenario.signatures import check

CLIENTS, ROUNDS = 20, 4000
COUNTS = np.random.default_rng(3).integers(0, 30, size=(CLIENTS, 4))


def learned(rule):
    rule.learn_labels(COUNTS, seed=3)
    return rule


def sine(t, mean, amplitude, period, shift=0):
    """The probability of round t, from the definition."""
    swing = 1 + amplitude * math.sin(2 * math.pi * (t - 1 - shift) / period)
    return min(1.0, max(0.0, mean * swing))


def staircase(t, mean, levels, length, shift=0):
    turn = (t - 1 - shift) % (len(levels) * length)
    return min(1.0, mean * levels[turn // length])


def followed(rule, rounds=ROUNDS, seed=12):
    """Who takes part, `[rounds, clients]`."""
    there = np.zeros((rounds, CLIENTS), dtype=bool)
    for t in range(rounds):
        ids = rule.participants(t + 1, num_clients=CLIENTS, seed=seed)
        assert ids.dtype == np.int64
        assert (np.diff(ids) > 0).all()
        there[t, ids] = True
    return there


OWN = [0.0, 0.05, 0.4, 0.9] * 5
SHIFTS = list(range(CLIENTS))
CASES = {
    "sine": (
        Sine(rate=0.3, amplitude=0.8, period=10),
        lambda t, c: sine(t, 0.3, 0.8, 10),
    ),
    "sine per client": (
        Sine(rate=OWN, amplitude=0.5, period=8, shift=SHIFTS),
        lambda t, c: sine(t, OWN[c], 0.5, 8, SHIFTS[c]),
    ),
    "sine cut at both ends": (
        Sine(rate=0.6, amplitude=2.5, period=12, shift=3),
        lambda t, c: sine(t, 0.6, 2.5, 12, 3),
    ),
    "staircase": (
        Staircase(rate=0.5, levels=[1.0, 0.4, 0.0], length=4),
        lambda t, c: staircase(t, 0.5, [1.0, 0.4, 0.0], 4),
    ),
    "staircase per client": (
        Staircase(rate=OWN, levels=[0.2, 2.0], length=5, shift=SHIFTS),
        lambda t, c: staircase(t, OWN[c], [0.2, 2.0], 5, SHIFTS[c]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_at_every_place_of_the_period_clients_take_part_at_the_rate_of_the_season(name):
    rule, chance = CASES[name]
    there = followed(rule)
    expected = np.array([[chance(t, c) for c in range(CLIENTS)] for t in range(1, ROUNDS + 1)])
    values, which = np.unique(expected.round(12), return_inverse=True)
    assert len(values) > 2
    counts = np.bincount(which.ravel())
    seen = np.bincount(which.ravel(), there.ravel()) / counts
    # rounds and clients are independent coins
    assert (np.abs(seen - values) <= 4 * np.sqrt(values * (1 - values) / counts)).all()


@pytest.mark.parametrize("name", CASES)
def test_the_share_of_rounds_of_each_client_is_within_four_standard_errors(name):
    rule, chance = CASES[name]
    each = np.array([[chance(t, c) for c in range(CLIENTS)] for t in range(1, ROUNDS + 1)])
    # independent coins of different rates: their variances add
    error = np.sqrt((each * (1 - each)).sum(axis=0)) / ROUNDS
    empirical = followed(rule).mean(axis=0)
    assert (np.abs(empirical - each.mean(axis=0)) <= 4 * error).all()
    np.testing.assert_allclose(rule.rates(CLIENTS), each[:3960].mean(axis=0), atol=1e-12)
    assert rule.expected_cohort(CLIENTS) == max(1, round(rule.rates(CLIENTS).sum()))


def test_a_sine_that_nothing_cuts_has_its_mean_rate():
    np.testing.assert_allclose(Sine(rate=OWN, amplitude=0.1).rates(CLIENTS), OWN, atol=1e-12)
    assert Sine(rate=0.26).expected_cohort(20) == 5


@pytest.mark.parametrize("make", [Sine, Staircase])
def test_mean_rates_may_follow_the_labels(make):
    rule = make(rate=0.3, label_alpha=0.5)
    assert rule.needs_labels
    expected = rule.expected_cohort(CLIENTS)
    with pytest.raises(ScenarioError, match="not known yet"):
        rule.participants(1, num_clients=CLIENTS, seed=0)
    made = label_rates(COUNTS, mean=0.3, alpha=0.5, minimum=0.02, seed=3)
    assert len(set(made.tolist())) > 10
    factor = 1.0 if make is Sine else 0.7
    np.testing.assert_allclose(
        learned(rule).rates_in(1, num_clients=CLIENTS, seed=0), made, atol=1e-12
    )
    small = made < 0.6  # nothing is cut there
    np.testing.assert_allclose(rule.rates(CLIENTS)[small], factor * made[small], atol=1e-12)
    assert rule.expected_cohort(CLIENTS) == expected


def test_random_shifts_are_fixed_for_a_run_and_spread_over_the_period():
    rule = Sine(rate=0.5, amplitude=1.0, period=4, shift="random")
    by_round = np.stack([rule.rates_in(t, num_clients=4000, seed=7) for t in range(1, 9)])
    np.testing.assert_array_equal(by_round[:4], by_round[4:])
    starts = by_round[0]  # sin of 0, -1/4, -2/4, -3/4 of a turn
    counts = [np.isclose(starts, value).sum() for value in (0.5, 0.0, 1.0)]
    error = math.sqrt(4000 * 0.25 * 0.75)
    assert abs(counts[1] - 1000) <= 4 * error
    assert abs(counts[2] - 1000) <= 4 * error
    assert counts[0] == 4000 - counts[1] - counts[2]
    other = rule.rates_in(1, num_clients=4000, seed=8)
    assert not np.array_equal(other, starts)


def test_a_season_of_one_level_is_the_bernoulli_rule_bit_for_bit():
    from fedsim.federation.participation.kinds import Bernoulli

    for rate in (0.3, OWN):
        flat, plain = Staircase(rate=rate, levels=[1.0]), Bernoulli(rate=rate)
        for t in range(1, 30):
            np.testing.assert_array_equal(
                flat.participants(t, num_clients=CLIENTS, seed=5),
                plain.participants(t, num_clients=CLIENTS, seed=5),
            )


def test_drawing_from_a_million_clients_costs_the_cohort_alone():
    rule = Sine(rate=2e-5)
    rule.participants(1, num_clients=1_000_000, seed=1)
    tracemalloc.start()
    ids = rule.participants(2, num_clients=1_000_000, seed=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1 <= len(ids) < 60
    assert peak < 100_000


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sine(amplitude=-0.1), r"\[participation\] amplitude = -0.1: must be >= 0"),
        (lambda: Sine(amplitude=math.inf), "amplitude = inf: must be >= 0"),
        (lambda: Sine(period=1), r"\[participation\] period = 1: must be in 2..1000000 rounds"),
        (lambda: Sine(rate=0.0), r"rate = 0.0: must be in \(0, 1\]"),
        (lambda: Sine(shift="all"), "shift = 'all': must be rounds, a list .* or \"random\""),
        (
            lambda: Sine(shift=[1, 2]).participants(1, num_clients=3, seed=0),
            "shift has 2 values for 3 clients",
        ),
        (lambda: Staircase(levels=[]), "levels: at least one must be > 0"),
        (lambda: Staircase(levels=[0.0, 0.0]), "levels: at least one must be > 0"),
        (lambda: Staircase(levels=[1.0, -1.0]), r"levels\[1\] = -1.0: must be >= 0"),
        (lambda: Staircase(length=0), "length = 0: must be in 1..500000"),
    ],
)
def test_impossible_seasons_are_refused_with_what_is_allowed(build, message):
    with pytest.raises(ScenarioError, match=message):
        build()


def test_a_scenario_may_give_a_shift_in_each_of_its_forms():
    for shift in (3, [1, 2], "random"):
        assert check(Sine, {"shift": shift}, where="[participation]")["shift"] == shift
    with pytest.raises(ScenarioError, match=r"\[participation\] shift = 0.5: must be"):
        check(Sine, {"shift": 0.5}, where="[participation]")
