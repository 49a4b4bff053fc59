import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics.errors import ScenarioError
from fedsim.basics.rng import generator
from fedsim.data.federated import Samples
from fedsim.data.partitions.by_owner import natural
from fedsim.data.partitions.by_size import iid
from fedsim.data.partitions.dirichlet import dirichlet, draw_dirichlet
from fedsim.data.partitions.drawing import (
    choose,
    largest_remainders,
    local_test_counts,
    stratified_counts,
)


def assign(partition, targets, seed=0):
    return partition.assign(Samples(np.asarray(targets, dtype=np.int64)), seed).owners


def sizes_of(partition, targets, seed=0):
    return np.bincount(assign(partition, targets, seed), minlength=partition.clients)


@st.composite
def divisions(draw):
    """A partition of any kind, with targets that it can divide."""
    targets = draw(st.lists(st.integers(0, 5), min_size=1, max_size=120))
    if draw(st.booleans()):
        targets = sorted(targets)
    clients = draw(st.integers(1, len(targets)))
    if draw(st.booleans()):
        return iid(clients=clients), targets, 0
    min_size = draw(st.integers(0, len(targets) // clients))
    partition = dirichlet(
        clients=clients,
        alpha=draw(st.sampled_from([1e-300, 1e-9, 1e-3, 0.1, 1.0, 100.0, 1e12])),
        min_size=min_size,
        balanced=draw(st.booleans()),
    )
    return partition, targets, min_size


@given(division=divisions(), seed=st.integers(0, 2**40))
def test_every_sample_belongs_to_exactly_one_existing_client(division, seed):
    partition, targets, _ = division
    owners = assign(partition, targets, seed)
    assert owners.dtype == np.int64
    assert owners.shape == (len(targets),)
    assert owners.min() >= 0
    assert owners.max() < partition.clients


@given(division=divisions(), seed=st.integers(0, 2**40))
def test_a_reachable_minimum_is_reached(division, seed):
    partition, targets, min_size = division
    assert sizes_of(partition, targets, seed).min() >= min_size


@given(division=divisions(), seed=st.integers(0, 2**40))
def test_owners_depend_on_the_seed_and_the_targets_alone(division, seed):
    partition, targets, _ = division
    np.testing.assert_array_equal(
        assign(partition, targets, seed), assign(partition, targets, seed)
    )


@given(samples=st.integers(1, 300), data=st.data())
def test_iid_sizes_differ_by_at_most_one(samples, data):
    clients = data.draw(st.integers(1, samples))
    sizes = sizes_of(iid(clients=clients), np.zeros(samples))
    assert sizes.sum() == samples
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("partition", [iid(clients=20), dirichlet(clients=20, alpha=0.5)])
def test_seeds_give_other_partitions(partition):
    targets = np.arange(200) % 10
    assert len({assign(partition, targets, seed).tobytes() for seed in range(20)}) == 20


def test_iid_mixes_class_sorted_samples():
    targets = np.repeat(np.arange(10), 500)
    owners = assign(iid(clients=10), targets)
    counts = np.zeros((10, 10))
    np.add.at(counts, (owners, targets), 1)
    # hypergeometric: 500 samples of 5,000, of which a tenth are of the class
    spread = math.sqrt(500 * 0.1 * 0.9 * (4500 / 4999))
    assert np.abs(counts - 50).max() <= 5 * spread


def test_dirichlet_takes_class_members_at_random_whatever_their_order():
    # the mean position of a client's members of a class is that of all members
    targets = np.zeros(2000, dtype=np.int64)
    excess = []
    for seed in range(60):
        rows = np.flatnonzero(assign(dirichlet(clients=4, alpha=1.0), targets, seed) == 0)
        if len(rows) > 20:
            error = 2000 / math.sqrt(12 * len(rows)) * math.sqrt(1 - len(rows) / 2000)
            excess.append((rows.mean() - 999.5) / error)
    assert len(excess) > 40
    assert abs(np.mean(excess)) <= 4 / math.sqrt(len(excess))
    assert max(map(abs, excess)) < 5


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0])
def test_dirichlet_shares_have_the_mean_and_variance_of_their_law(alpha):
    clients, draws = 8, 300
    targets = np.zeros(5_000, dtype=np.int64)
    shares = np.array(
        [
            sizes_of(dirichlet(clients=clients, alpha=alpha), targets, seed) / len(targets)
            for seed in range(draws)
        ]
    )
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    squares = (shares - mean) ** 2
    for client_id in range(clients):
        error = shares[:, client_id].std() / math.sqrt(draws)
        assert abs(shares[:, client_id].mean() - mean) <= 4 * error
    per_draw = squares.mean(axis=1)
    assert abs(per_draw.mean() - variance) <= 4 * per_draw.std() / math.sqrt(draws)


def test_a_vanishing_alpha_gives_each_class_to_one_client_chosen_uniformly():
    targets = np.zeros(10, dtype=np.int64)
    wins = np.zeros(5)
    for seed in range(1000):
        sizes = sizes_of(dirichlet(clients=5, alpha=1e-200), targets, seed)
        assert sizes.max() == 10
        wins[sizes.argmax()] += 1
    assert np.abs(wins - 200).max() <= 4 * math.sqrt(1000 * 0.2 * 0.8)


def test_a_huge_alpha_divides_each_class_evenly():
    targets = np.repeat(np.arange(3), 1000)
    owners = assign(dirichlet(clients=10, alpha=1e9), targets)
    for label in range(3):
        counts = np.bincount(owners[targets == label], minlength=10)
        assert np.abs(counts - 100).max() <= 1


def _flower_oracle(targets, clients, alpha, balanced, rng):
    """The algorithm of flwr-datasets' DirichletPartitioner, client by client, as sizes."""
    sizes = [0] * clients
    for label in sorted(set(targets.tolist())):
        members = int((targets == label).sum())
        shares = rng.dirichlet([alpha] * clients)
        if balanced:
            for client_id in range(clients):
                if sizes[client_id] > len(targets) / clients:
                    shares[client_id] = 0
            shares = shares / shares.sum()
        before, total = 0, 0.0
        for client_id in range(clients):
            total += shares[client_id]
            after = members if client_id == clients - 1 else int(total * members)
            sizes[client_id] += after - before
            before = after
    return np.array(sizes)


@pytest.mark.parametrize("balanced", [False, True])
def test_dirichlet_sizes_spread_as_those_of_flwr_datasets(balanced):
    targets, clients, draws = np.arange(1000) % 10, 10, 300
    partition = dirichlet(clients=clients, alpha=0.5, balanced=balanced)
    ours = np.array([sizes_of(partition, targets, s).std() for s in range(draws)])
    rng = np.random.default_rng(0)
    theirs = np.array(
        [_flower_oracle(targets, clients, 0.5, balanced, rng).std() for _ in range(draws)]
    )
    error = math.sqrt((ours.var() + theirs.var()) / draws)
    assert abs(ours.mean() - theirs.mean()) <= 4 * error


def test_balancing_narrows_the_sizes():
    targets = np.arange(2000) % 10
    spread = {
        balanced: np.mean(
            [
                sizes_of(dirichlet(clients=20, alpha=0.3, balanced=balanced), targets, s).std()
                for s in range(20)
            ]
        )
        for balanced in (False, True)
    }
    assert spread[True] < 0.8 * spread[False]


def test_an_exactly_reachable_minimum_makes_all_sizes_equal():
    targets = np.arange(100) % 4
    sizes = sizes_of(dirichlet(clients=20, alpha=0.01, min_size=5), targets)
    assert sizes.tolist() == [5] * 20


def test_missing_samples_come_from_the_largest_clients_alone():
    targets = np.arange(400) % 4
    filled = dirichlet(clients=10, alpha=0.05, min_size=3)
    owners, notes = filled.assign(Samples(targets), 5)[:2]
    assert notes["draws"] == 11  # so small an alpha never reaches the minimum by itself
    after = np.bincount(owners, minlength=10)
    # the eleventh draw, before any sample moved
    before = np.bincount(
        draw_dirichlet(10, 0.05, False, targets, generator(5, "partition", 10)),
        minlength=10,
    )
    missing = np.maximum(3 - before, 0)
    assert notes["moved_to_reach_min_size"] == missing.sum() > 0
    level = next(
        level
        for level in range(400, -1, -1)
        if np.maximum(before - level, 0).sum() >= missing.sum()
    )
    assert (after[before < 3] == 3).all()
    kept = (before >= 3) & (before <= level)
    assert (after[kept] == before[kept]).all()
    assert set(after[before > level].tolist()) <= {level, level + 1}


def test_even_shares_of_a_hundred_samples_are_ten_each_though_tenths_are_rounded():
    targets = np.repeat([0, 1], 100)
    owners = draw_dirichlet(10, 1e16, False, targets, generator(5, "partition", 10))
    for label in (0, 1):
        assert np.bincount(owners[targets == label]).tolist() == [10] * 10


def test_half_a_sample_is_rounded_up_though_its_product_is_a_little_less():
    assert 100 * 0.145 < 14.5
    assert local_test_counts(np.array([100]), 0.145).tolist() == [15]
    assert stratified_counts(np.array([50, 50]), 0.145).tolist() == [8, 7]


def test_equal_remainders_go_to_the_first_though_one_is_rounded_up():
    assert largest_remainders(np.array([0.3, 0.1 * 3, 0.4]), 1).tolist() == [0, 0, 1]
    assert largest_remainders(np.array([0.3, 0.1 * 3, 0.4]), 2).tolist() == [1, 0, 1]
    assert largest_remainders(np.array([1.3, 2.9999999999999996]), 4).tolist() == [1, 3]


def test_an_easy_minimum_is_reached_without_moving_samples():
    partition = dirichlet(clients=5, alpha=10.0, min_size=50)
    notes = partition.assign(Samples(np.arange(1000) % 10), 0).notes
    assert notes == {"draws": 1, "moved_to_reach_min_size": 0}


def test_ten_thousand_clients_take_seconds():
    targets = np.arange(60_000) % 10
    began = time.perf_counter()
    sizes = sizes_of(dirichlet(clients=10_000, alpha=0.1, min_size=6), targets)
    assert time.perf_counter() - began < 10
    assert sizes.min() == 6


@given(
    groups=st.lists(st.integers(0, 6), max_size=60),
    seed=st.integers(0, 2**40),
    fraction=st.floats(0, 1),
)
def test_choosing_marks_exactly_the_counts_asked_for(groups, seed, fraction):
    groups = np.array(groups, dtype=np.int64)
    counts = np.floor(np.bincount(groups, minlength=7) * fraction).astype(np.int64)
    marked = choose(groups, counts, generator(seed, "test"))
    np.testing.assert_array_equal(np.bincount(groups[marked], minlength=7), counts)


def test_choosing_is_uniform_over_the_members_of_a_group():
    groups = np.array([1, 0, 1, 1, 0, 1, 1])
    hits = np.zeros(7)
    for seed in range(2000):
        hits += choose(groups, np.array([1, 2]), generator(seed, "test"))
    expected = np.where(groups == 0, 1 / 2, 2 / 5)
    error = np.sqrt(expected * (1 - expected) / 2000)
    assert (np.abs(hits / 2000 - expected) <= 4 * error).all()


@given(
    class_sizes=st.lists(st.integers(0, 500), min_size=1, max_size=12),
    fraction=st.floats(0, 1, allow_nan=False),
)
def test_stratified_counts_add_up_and_are_within_one_of_the_exact_share(class_sizes, fraction):
    class_sizes = np.array(class_sizes)
    counts = stratified_counts(class_sizes, fraction)
    assert counts.sum() == math.floor(class_sizes.sum() * fraction + 0.5)
    assert (np.abs(counts - class_sizes * fraction) < 1).all()
    assert (counts <= class_sizes).all()


@given(size=st.integers(0, 1000), fraction=st.floats(0, 1, exclude_max=True))
def test_a_local_test_split_is_the_rounded_share_and_leaves_one_to_train(size, fraction):
    count = int(local_test_counts(np.array([size]), fraction)[0])
    if size:
        assert 0 <= count <= size - 1
        assert count == size - 1 or abs(count - size * fraction) <= 0.5
    else:
        assert count == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: iid(clients=0), r"\[partition\] clients = 0: must be >= 1"),
        (lambda: natural(clients=-1), r"\[partition\] clients = -1: must be >= 1"),
        (lambda: iid(test_fraction=1.0), r"test_fraction = 1.0: must be in \[0, 1\)"),
        (lambda: dirichlet(test_fraction=-0.1), r"test_fraction = -0.1: must be in \[0, 1\)"),
        (lambda: dirichlet(alpha=-1), r"\[partition\] alpha = -1: must be finite and > 0"),
        (lambda: dirichlet(alpha=0.0), "alpha = 0.0: must be finite and > 0"),
        (lambda: dirichlet(alpha=math.inf), "alpha = inf: must be finite and > 0"),
        (lambda: dirichlet(alpha=math.nan), "alpha = nan: must be finite and > 0"),
        (lambda: dirichlet(min_size=-1), "min_size = -1: must be >= 0"),
        (
            lambda: assign(iid(clients=11), np.zeros(10)),
            r"\[partition\] clients = 11: the data set has 10 training samples; use at most 10",
        ),
        (
            lambda: assign(dirichlet(clients=11), np.zeros(10)),
            r"\[partition\] clients = 11: the data set has 10 training samples; use at most 10",
        ),
        (
            lambda: assign(dirichlet(clients=4, min_size=6), np.zeros(23)),
            r"min_size = 6: 23 samples give each of 4 clients at most 5",
        ),
    ],
)
def test_impossible_numbers_are_refused_with_what_is_allowed(build, message):
    with pytest.raises(ScenarioError, match=message):
        build()
