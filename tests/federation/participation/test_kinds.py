import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.federation.participation.kinds import (
    PARTICIPATION,
    Bernoulli,
    Cyclic,
    Full,
    Markov,
    Participation,
    Uniform,
)
from fedsim.federation.participation.rates import label_rates

COUNTS = np.random.default_rng(3).integers(0, 30, size=(20, 4))  # samples of each class


def learned(rule, counts=COUNTS):
    rule.learn_labels(counts, seed=3)
    return rule


RULES = {
    "full": Full(),
    "uniform": Uniform(cohort_size=3),
    "bernoulli": Bernoulli(rate=0.4),
    "bernoulli_per_client": Bernoulli(rate=[i / 20 for i in range(20)]),
    "bernoulli_by_labels": learned(Bernoulli(rate=0.4, label_alpha=0.5)),
    "cyclic": Cyclic(rate=0.4, cycle=20),
}
CHAINS = {
    "markov": Markov(rate=0.4, activation=0.5),
    "markov_per_client": Markov(rate=[i / 20 for i in range(1, 21)], activation=0.5),
    "markov_by_labels": learned(Markov(rate=0.4, label_alpha=0.5, activation=0.5)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(seed=st.integers(0, 2**40), server_round=st.integers(1, 10**6))
def test_participants_are_sorted_unique_client_ids(rule, seed, server_round):
    ids = rule.participants(server_round, num_clients=20, seed=seed)
    assert ids.dtype == np.int64
    assert sorted(set(ids.tolist())) == ids.tolist()
    assert all(0 <= i < 20 for i in ids.tolist())


@pytest.mark.parametrize("rule", CHAINS.values(), ids=CHAINS)
@given(seed=st.integers(0, 2**40), server_round=st.integers(1, 30))
def test_active_clients_are_sorted_unique_client_ids(rule, seed, server_round):
    ids = rule.participants(server_round, num_clients=20, seed=seed)
    assert ids.dtype == np.int64
    assert sorted({i for i in ids.tolist() if 0 <= i < 20}) == ids.tolist()


@pytest.mark.parametrize("rule", (RULES | CHAINS).values(), ids=RULES | CHAINS)
def test_participants_depend_on_seed_and_round_alone(rule):
    asked_once = rule.participants(7, num_clients=20, seed=3)
    for server_round in (1, 2, 9):
        rule.participants(server_round, num_clients=20, seed=5)
    np.testing.assert_array_equal(rule.participants(7, num_clients=20, seed=3), asked_once)


@pytest.mark.parametrize(
    "name", ["uniform", "bernoulli", "bernoulli_per_client", "bernoulli_by_labels", *CHAINS]
)
def test_rounds_and_seeds_give_other_participants(name):
    rule = (RULES | CHAINS)[name]
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


def _followed(rule, clients, rounds):
    """Who is active, `[rounds, clients]`."""
    active = np.zeros((rounds, clients), dtype=bool)
    for t in range(rounds):
        active[t, rule.participants(t + 1, num_clients=clients, seed=11)] = True
    return active


CHAIN_RATES = np.array([0.02, 0.1, 0.3, 0.5, 0.9])
ACTIVATION = 0.05
# the probabilities of becoming active and absent, by hand: for the first rate, a (1/p - 1) = 2.45
UP = np.array([0.02 / 0.98, 0.05, 0.05, 0.05, 0.05])
DOWN = np.array([1.0, 0.45, 0.05 * 7 / 3, 0.05, 0.05 / 9])


@pytest.fixture(scope="module")
def chains():
    """Twenty clients of each rate over 4000 rounds."""
    rule = Markov(rate=np.repeat(CHAIN_RATES, 20).tolist(), activation=ACTIVATION)
    return _followed(rule, 100, 4000).reshape(4000, 5, 20)


def test_markov_clients_are_active_at_their_rates(chains):
    memory = 1 - UP - DOWN  # correlation of a round with the next: it widens the error of a mean
    error = np.sqrt(CHAIN_RATES * (1 - CHAIN_RATES) / 4000 * (1 + memory) / (1 - memory))
    assert (np.abs(chains.mean(axis=0) - CHAIN_RATES[:, None]) <= 4 * error[:, None]).all()
    assert (np.abs(chains.mean(axis=(0, 2)) - CHAIN_RATES) <= 4 * error / np.sqrt(20)).all()


def test_markov_spells_last_as_long_as_their_chains_say(chains):
    now, after = chains[:-1], chains[1:]
    for active, leave in ((False, UP), (True, DOWN)):
        chances = (now == active).sum(axis=(0, 2))
        left = ((now == active) & (after != active)).sum(axis=(0, 2))
        error = np.sqrt(leave * (1 - leave) / chances)
        assert (np.abs(left / chances - leave) <= 4 * error).all()
    # and a spell has no memory: who has been absent for two rounds returns as often
    absent = ~now[:-1] & ~now[1:]
    returned = (absent & after[1:]).sum(axis=(0, 2)) / absent.sum(axis=(0, 2))
    error = np.sqrt(UP * (1 - UP) / absent.sum(axis=(0, 2)))
    assert (np.abs(returned - UP) <= 4 * error).all()


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_markov_chains_begin_in_their_stationary_law(rate):
    clients = 20_000
    for server_round in (1, 2):
        ids = Markov(rate=rate).participants(server_round, num_clients=clients, seed=6)
        error = math.sqrt(rate * (1 - rate) / clients)
        assert abs(len(ids) / clients - rate) <= 4 * error


def test_markov_chains_make_a_transition_before_the_first_round():
    rule = Markov(rate=0.5, activation=1.0)  # every transition is a change
    begun = rng.generator(6, "participation", 0).random(30) < 0.5
    for server_round in (1, 2, 3):
        begun = ~begun
        ids = rule.participants(server_round, num_clients=30, seed=6)
        assert ids.tolist() == np.flatnonzero(begun).tolist()


def test_markov_clients_of_rates_zero_and_one_never_change():
    active = _followed(Markov(rate=[0.0, 1.0, 0.5]), 3, 200)
    assert active.mean(axis=0)[:2].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rate", "cycle", "on", "off"),
    [
        (0.02, 100, 2, 98),
        (0.1, 100, 10, 90),
        (0.001, 100, 1, 99),
        (0.4, 5, 2, 3),
        (1.0, 100, 100, 1),
    ],
)
def test_cyclic_clients_are_on_and_off_in_turns(rate, cycle, on, off):
    rule, clients, period = Cyclic(rate=rate, cycle=cycle), 40, on + off
    active = _followed(rule, clients, 3 * period)
    assert (active.reshape(3, period, clients).sum(axis=1) == on).all()
    for column in active.T:
        start = int(column.argmax())  # the off phase in which a client begins is the rest of one
        assert start <= off - 1
        turns = np.arange(len(column) - start) % period < on
        assert column[start:].tolist() == turns.tolist()
    assert rule.rates(clients).tolist() == [on / period] * clients


def test_cyclic_clients_begin_anywhere_in_the_off_phase():
    clients, off = 4000, 90
    first = _followed(Cyclic(rate=0.1, cycle=100), clients, 100).argmax(axis=0)
    assert (first.min(), first.max()) == (0, off - 1)
    error = math.sqrt((off**2 - 1) / 12 / clients)
    assert abs(first.mean() - (off - 1) / 2) <= 4 * error


def test_rates_by_labels_are_those_of_the_construction():
    """p_n = min(1, max(p_min, mean C sum_c kappa_nc q_c)) with one q for all."""
    counts = np.vstack([10 * np.eye(4), [[5, 5, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]]]).astype(int)
    made = label_rates(counts, mean=0.1, alpha=0.7, minimum=1e-9, seed=5)
    preferred = made[:4] / (0.1 * 4)  # whoever holds one class alone shows its q
    assert preferred.sum() == pytest.approx(1)
    assert made[4] == pytest.approx(0.1 * 4 * (preferred[0] + preferred[1]) / 2)
    assert made[5] == pytest.approx(0.1)  # no sample: equal shares
    assert made[6] == pytest.approx(0.1 * 4 * (preferred @ [0.1, 0.2, 0.3, 0.4]))
    bounded = label_rates(counts, mean=0.8, alpha=0.7, minimum=0.3, seed=5)
    np.testing.assert_allclose(bounded, np.clip(8 * made, 0.3, 1))
    assert bounded.min() == 0.3
    assert bounded.max() == 1


def test_rates_by_labels_are_the_mean_rate_on_average():
    counts = np.random.default_rng(1).integers(0, 9, size=(5, 4))
    made = np.stack(
        [label_rates(counts, mean=0.2, alpha=0.5, minimum=1e-9, seed=s) for s in range(2000)]
    )
    error = made.std(axis=0) / math.sqrt(2000)
    assert (np.abs(made.mean(axis=0) - 0.2) <= 4 * error).all()
    even = label_rates(counts, mean=0.2, alpha=1e9, minimum=1e-9, seed=1)
    np.testing.assert_allclose(even, 0.2, rtol=1e-3)  # alpha large: no class is preferred


@pytest.mark.parametrize("make", [Bernoulli, Markov, Cyclic])
def test_clients_take_part_at_the_rates_that_their_labels_make(make):
    rule = learned(make(rate=0.3, label_alpha=0.5))
    made = label_rates(COUNTS, mean=0.3, alpha=0.5, minimum=0.02, seed=3)
    rates = rule.rates(20)
    np.testing.assert_allclose(rates, made, atol=0.005 if make is Cyclic else 0)
    assert len(set(rates.tolist())) > 10
    # a chain's rounds are correlated by 1 - up - down
    memory = 1 - np.minimum(0.05 / made, 1 / (1 - made)) if make is Markov else np.zeros(20)
    rounds = 4000
    error = np.sqrt(rates * (1 - rates) / rounds * (1 + memory) / (1 - memory))
    assert (np.abs(_rates(rule, 20, rounds) - rates) <= 4 * error).all()


@pytest.mark.parametrize("make", [Bernoulli, Markov, Cyclic])
def test_the_expected_cohort_is_the_scenarios_whatever_the_labels_say(make):
    rule = make(rate=0.26, label_alpha=0.1)
    assert rule.needs_labels
    assert rule.expected_cohort(20) == 5
    assert learned(rule).expected_cohort(20) == 5


@pytest.mark.parametrize("make", [Bernoulli, Markov, Cyclic])
def test_nobody_takes_part_before_the_labels_are_known(make):
    rule = make(label_alpha=0.1)
    for ask in (
        lambda: rule.participants(1, num_clients=20, seed=0),
        lambda: rule.rates(20),
    ):
        with pytest.raises(ScenarioError, match=r"label_alpha = 0.1: .* not known yet"):
            ask()
    with pytest.raises(ScenarioError, match="the labels of 20 clients are known, there are 30"):
        learned(rule).participants(1, num_clients=30, seed=0)


def test_rules_that_do_not_ask_for_labels_are_not_changed_by_them():
    for rule in RULES.values():
        if not rule.needs_labels:
            before = rule.participants(7, num_clients=20, seed=3)
            after = learned(rule).participants(7, num_clients=20, seed=3)
            np.testing.assert_array_equal(before, after)


class Somebody(Participation):
    def participants(self, server_round, *, num_clients, seed):
        return np.array([0])

    def expected_cohort(self, num_clients):
        return 1


@pytest.mark.parametrize(
    ("rule", "rates"),
    [
        (Full(), [1.0] * 4),
        (Uniform(cohort_size=3), [0.75] * 4),
        (Bernoulli(rate=0.3), [0.3] * 4),
        (Bernoulli(rate=[0.0, 0.5, 1.0, 0.1]), [0.0, 0.5, 1.0, 0.1]),
        (Markov(rate=[0.0, 0.5, 1.0, 0.1]), [0.0, 0.5, 1.0, 0.1]),
        (Cyclic(rate=[0.001, 0.5, 1.0, 0.1], cycle=10), [0.1, 0.5, 10 / 11, 0.1]),
    ],
)
def test_a_rule_knows_the_share_of_rounds_of_each_client(rule, rates):
    known = rule.rates(4)
    assert known.dtype == np.float64
    assert known.tolist() == pytest.approx(rates, abs=1e-15)
    assert Somebody().rates(4) is None


def _chain(**options):
    return Markov(rate=0.4, activation=0.3, **options)


def _active(rule, rounds, seed=9):
    return [rule.participants(t, num_clients=20, seed=seed).tolist() for t in rounds]


def test_a_chain_that_was_saved_goes_on_as_the_one_that_was_not():
    undisturbed = _active(_chain(), range(1, 31))
    before = _chain()
    assert _active(before, range(1, 11)) == undisturbed[:10]
    saved = json.loads(json.dumps(before.state()))
    assert saved == {"round": 10, "seed": 9, "clients": 20, "active": undisturbed[9]}
    for asked in (range(11, 31), range(10, 31), range(9, 31), range(1, 31)):  # on, again, and back
        restored = _chain()
        restored.restore(saved)
        assert _active(restored, asked) == undisturbed[asked[0] - 1 :]


def test_a_saved_chain_is_taken_up_and_not_computed_anew():
    restored = _chain()
    restored.restore({"round": 10, "seed": 9, "clients": 20, "active": [2, 3]})
    assert _active(restored, [10]) == [[2, 3]]


def test_a_saved_chain_serves_its_own_seed_and_federation_alone():
    before, restored = _chain(), _chain()
    _active(before, range(1, 11))
    restored.restore(before.state())
    assert _active(restored, [11], seed=8) == _active(_chain(), [11], seed=8)
    restored.restore(before.state())
    assert restored.participants(11, num_clients=30, seed=9).tolist() == (
        _chain().participants(11, num_clients=30, seed=9).tolist()
    )


def test_a_chain_without_rounds_has_an_empty_state():
    rule = _chain()
    assert rule.state() == {}
    _active(rule, [3])
    rule.restore({})
    assert rule.state() == {}
    assert _active(rule, [3]) == _active(_chain(), [3])


def test_a_chain_refuses_the_state_of_another_rule():
    with pytest.raises(ValueError, match=r"'markov': the checkpoint has \['phase'\], expected"):
        _chain().restore({"phase": 3})


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
        (Markov(rate=0.26), 5),
        (Cyclic(rate=[0.25] * 20), 5),
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


@pytest.mark.parametrize("name", sorted(PARTICIPATION.keys() - {"trace"}))
def test_every_rule_that_reads_no_file_can_be_built_without_arguments(name):
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
            "cohort_size = 11: more than all clients, use at most 10",
        ),
        (
            lambda: Uniform(cohort_size=11).expected_cohort(10),
            "cohort_size = 11: more than all clients, use at most 10",
        ),
        (
            lambda: Bernoulli(rate=[0.5, 0.5]).participants(1, num_clients=3, seed=0),
            "rate has 2 values for 3 clients",
        ),
        (lambda: Markov(rate=0.0), r"\[participation\] rate = 0.0: must be in \(0, 1\]"),
        (lambda: Markov(activation=0.0), r"activation = 0.0: must be in \(0, 1\]"),
        (lambda: Markov(activation=1.1), r"activation = 1.1: must be in \(0, 1\]"),
        (lambda: Cyclic(cycle=1), r"\[participation\] cycle = 1: must be >= 2"),
        (lambda: Cyclic(rate=[0.5, 0]), r"rate = 0 for client 1: must be in \(0, 1\]"),
        (lambda: Cyclic(rate=[0.5, 0.5]).expected_cohort(3), "rate has 2 values for 3 clients"),
        (lambda: Bernoulli(label_alpha=0.0), r"label_alpha = 0.0: must be in \(0, 1e6\]"),
        (lambda: Markov(label_alpha=math.inf), r"label_alpha = inf: must be in \(0, 1e6\]"),
        (
            lambda: Bernoulli(rate=[0.5, 0.5], label_alpha=0.1),
            r"label_alpha = 0.1 with a list of rates: .* give one number, their mean",
        ),
        (
            lambda: Bernoulli(rate=0.01, label_alpha=0.1),
            r"min_rate = 0.02: must be > 0 and at most rate = 0.01",
        ),
        (lambda: Cyclic(min_rate=0.0, label_alpha=0.1), r"min_rate = 0.0: must be > 0"),
    ],
)
def test_impossible_numbers_are_refused_with_what_is_allowed(build, message):
    with pytest.raises(ScenarioError, match=message):
        build()
