"""Every rule of division is what its name says; flwr-datasets is the oracle where it has it."""

import inspect
import math
import time
import warnings

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets import partitioner as flwr_partitioners
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.basics.errors import ScenarioError
from fedsim.basics.rng import generator
from fedsim.data.federated import Samples
from fedsim.data.partitions.named import PARTITIONS, partition_factory
from fedsim.data.partitions.partition import DROPPED
from fedsim.data.partitions.sizes import law_sizes, law_weights
from fedsim.scenario import signatures

LAWS = ("equal", "linear", "square", "exponential", "log_normal", "power")
MODES = ("random", "deterministic", "first-deterministic")
COMMON = {
    "parts", "test_fraction", "label_noise",
    "rotation", "feature_noise", "feature_shift", "feature_scale", "centralised",
}  # fmt: skip


def assign(kind, labels, seed=0, groups=None, **keys):
    partition = partition_factory(kind)(**keys)
    groups = None if groups is None else np.asarray(groups, dtype=np.int64)
    return partition.assign(Samples(np.asarray(labels, dtype=np.int64), groups), seed)


def counts_of(made, labels, classes=None):
    """How many samples of each class each client has, `[clients, classes]`."""
    labels = np.asarray(labels)
    counts = np.zeros((made.clients, classes or int(labels.max()) + 1), dtype=np.int64)
    owned = made.owners != DROPPED
    np.add.at(counts, (made.owners[owned], labels[owned]), 1)
    return counts


def flwr_counts(partitioner, labels, groups=None):
    """The same, of a partitioner of flwr-datasets used as its documentation says."""
    columns = {"label": labels, "row": np.arange(len(labels))}
    if groups is not None:
        columns["owner"] = groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        partitioner.dataset = Dataset.from_dict(columns)
        held = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
    return np.array([np.bincount(each["label"], minlength=max(labels) + 1) for each in held])


# --- laws over all rules -----------------------------------------------------------------------


def hostile(kind, draw):
    """Keys of a rule's own, far beyond what makes sense too."""
    numbers = st.sampled_from([0.0, 1e-300, 1e-9, 1e-3, 0.3, 1.0, 30.0, 1e9, 1e300])
    values = {
        "alpha": numbers, "sigma": numbers, "exponent": numbers, "law": st.sampled_from(LAWS),
        "min_size": st.integers(0, 60), "balanced": st.booleans(),
        "classes_per_client": st.integers(1, 8), "labels_per_client": st.integers(1, 8),
        "class_assignment_mode": st.sampled_from(MODES), "shards_per_client": st.integers(1, 9),
        "clients": st.integers(1, 130),
    }  # fmt: skip
    own = [name for name in inspect.signature(PARTITIONS[kind]).parameters if name not in COMMON]
    drawn = {name: draw(values[name]) for name in own}
    law = drawn.get("law")
    for name, of in (("sigma", "log_normal"), ("exponent", "power")):
        if law not in (None, of):  # refused, for it would change nothing
            del drawn[name]
    return drawn


@settings(max_examples=200)
@given(data=st.data(), seed=st.integers(0, 2**62))
def test_any_rule_gives_every_sample_to_one_client_or_says_why_not_or_is_refused(data, seed):
    kind = data.draw(st.sampled_from([kind for kind in PARTITIONS if kind != "file"]))
    labels = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=120))
    groups = data.draw(st.lists(st.integers(0, 20), min_size=len(labels), max_size=len(labels)))
    keys = hostile(kind, data.draw)
    refused = ""
    try:
        made = assign(kind, labels, seed, groups, **keys)
    except ScenarioError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("[partition] ")
        return
    assert made.owners.dtype == np.int64
    assert made.owners.shape == (len(labels),)
    assert made.owners.min() >= DROPPED
    assert made.owners.max() < made.clients == keys["clients"]
    if (made.owners == DROPPED).any():
        assert made.why_dropped
    sizes = np.bincount(made.owners[made.owners >= 0], minlength=made.clients)
    assert sizes.min() >= keys.get("min_size", 0)
    again = assign(kind, labels, seed, groups, **keys)
    np.testing.assert_array_equal(made.owners, again.owners)


@pytest.mark.parametrize("kind", [kind for kind in PARTITIONS if kind not in ("file", "natural")])
def test_ten_thousand_clients_take_seconds_and_seeds_differ(kind):
    labels = np.arange(60_000) % 10
    groups = np.arange(60_000) % 20_000
    began = time.perf_counter()
    made = assign(kind, labels, 1, groups, clients=10_000)
    assert time.perf_counter() - began < 10
    assert made.clients == 10_000
    other = assign(kind, labels, 2, groups, clients=10_000)
    assert (made.owners != other.owners).mean() > 0.5


@pytest.mark.parametrize("kind", PARTITIONS)
def test_every_key_of_every_rule_is_explained_and_the_common_ones_are_everywhere(kind):
    keys = signatures.keys(PARTITIONS[kind])
    assert set(keys) > COMMON
    assert all(key.description for key in keys.values())
    assert next(iter(keys)) == "clients"
    table = {"path": "x"} if kind == "file" else {}
    assert signatures.check(PARTITIONS[kind], table, where="[partition]")["test_fraction"] == 0.0


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "theirs"),
    [
        ("linear", flwr_partitioners.LinearPartitioner),
        ("square", flwr_partitioners.SquarePartitioner),
        ("exponential", flwr_partitioners.ExponentialPartitioner),
    ],
)
def test_size_laws_are_those_of_flwr_datasets_up_to_rounding(law, theirs):
    labels = np.zeros(9973, dtype=np.int64)
    ours = counts_of(assign("sizes", labels, clients=8, law=law), labels)[:, 0]
    oracle = flwr_counts(theirs(num_partitions=8), labels)[:, 0]
    # they cut every share down and give what is left to the last client
    assert (np.abs(ours - oracle)[:-1] <= 1).all()
    assert 0 <= oracle[-1] - ours[-1] < 8
    assert ours.sum() == oracle.sum() == 9973


def test_power_sizes_fall_as_a_power_of_the_rank():
    labels = np.zeros(100_000, dtype=np.int64)
    sizes = counts_of(assign("sizes", labels, clients=50, law="power", exponent=1.5), labels)[:, 0]
    ranks = np.arange(1, 51)
    exact = 100_000 * ranks**-1.5 / (ranks**-1.5).sum()
    np.testing.assert_allclose(sizes[::-1], exact, atol=1)


def test_log_normal_sizes_have_the_logarithms_spread():
    labels = np.zeros(1_000_000, dtype=np.int64)
    made = assign("sizes", labels, clients=2000, law="log_normal", sigma=0.7)
    logarithms = np.log(counts_of(made, labels)[:, 0])
    error = 0.7 / math.sqrt(2 * 2000)
    assert abs(logarithms.std() - 0.7) <= 4 * error
    # not ordered by client, unlike the other laws
    assert abs(np.corrcoef(logarithms, np.arange(2000))[0, 1]) < 4 / math.sqrt(2000)


@given(
    weights=st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=30),
    spare=st.integers(0, 500),
    min_size=st.integers(0, 5),
)
def test_sizes_add_up_keep_the_minimum_and_move_no_more_than_is_missing(weights, spare, min_size):
    weights = np.array(weights)
    total = min_size * len(weights) + spare
    free, none = law_sizes(weights, total, 0)
    raised, moved = law_sizes(weights, total, min_size)
    assert none == 0
    assert free.sum() == raised.sum() == total
    assert (np.abs(free - weights / weights.sum() * total) < 1 + 1e-6).all()
    assert raised.min() >= min_size
    assert np.maximum(raised - free, 0).sum() == moved == np.maximum(min_size - free, 0).sum()
    untouched = (free >= min_size) & (raised == free)
    cut = raised < free
    if cut.any() and untouched.any():  # the largest alone were cut, to one level
        assert free[untouched].max() <= raised[cut].min() + 1
        assert np.ptp(raised[cut]) <= 1


def test_laws_of_size_differ_from_each_other():
    weights = {law: law_weights(law, 9, generator(0, "t"), sigma=1, exponent=1) for law in LAWS}
    shares = {tuple(np.round(w / w.sum(), 9)) for w in weights.values()}
    assert len(shares) == len(LAWS)
    assert all(w.max() == 1 for law, w in weights.items() if law in ("log_normal", "power"))


def test_exponential_sizes_of_very_many_clients_do_not_overflow():
    labels = np.zeros(20_000, dtype=np.int64)
    sizes = counts_of(assign("sizes", labels, clients=5000, law="exponential"), labels)[:, 0]
    assert sizes.min() == 1
    assert sizes[-1] == sizes.max()


def test_sized_clients_hold_samples_of_all_classes_in_the_common_proportions():
    labels = np.repeat(np.arange(5), 2000)
    counts = counts_of(assign("sizes", labels, clients=4, law="linear"), labels)
    expected = counts.sum(axis=1, keepdims=True) / 5
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


# --- classes -----------------------------------------------------------------------------------


def test_deterministic_pathological_counts_are_exactly_those_of_flwr_datasets():
    labels = generator(0, "t").integers(0, 7, 1000)
    theirs = flwr_partitioners.PathologicalPartitioner(
        num_partitions=20, partition_by="label", num_classes_per_partition=3,
        class_assignment_mode="deterministic",
    )  # fmt: skip
    made = assign(
        "pathological", labels, clients=20, classes_per_client=3,
        class_assignment_mode="deterministic",
    )  # fmt: skip
    np.testing.assert_array_equal(counts_of(made, labels), flwr_counts(theirs, labels))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("held", [1, 2, 5])
def test_pathological_clients_hold_exactly_so_many_classes_each_evenly_divided(mode, held):
    labels = np.repeat(np.arange(6), [60, 70, 80, 90, 100, 333])
    for seed in range(5):
        keys = {"clients": 12, "classes_per_client": held, "class_assignment_mode": mode}
        made = assign("pathological", labels, seed, **keys)
        counts = counts_of(made, labels)
        assert ((counts > 0).sum(axis=1) == held).all()
        for label in range(6):
            given_to = counts[counts[:, label] > 0, label]
            if len(given_to):
                assert np.ptp(given_to) <= 1
                assert given_to.sum() == (labels == label).sum()
            else:
                assert str(label) in made.why_dropped
        if mode != "random":
            assert (counts[np.arange(12), np.arange(12) % 6] > 0).all()
        if mode == "deterministic":
            assert (counts[np.arange(12), (np.arange(12) + held - 1) % 6] > 0).all()


def test_pathological_modes_draw_what_they_say():
    labels = np.repeat(np.arange(10), 300)

    def sets(mode, seeds=40):
        keys = {"clients": 30, "classes_per_client": 2, "class_assignment_mode": mode}
        return np.concatenate(
            [counts_of(assign("pathological", labels, s, **keys), labels) > 0 for s in range(seeds)]
        )

    random = sets("random")
    # every pair of classes is equally likely: 45 pairs in 1,200 draws
    pairs = np.array([np.flatnonzero(row) for row in random])
    seen = np.bincount(pairs[:, 0] * 10 + pairs[:, 1], minlength=100)
    seen = seen[seen > 0]
    assert len(seen) == 45
    assert ((seen - 1200 / 45) ** 2 / (1200 / 45)).sum() < 44 + 4 * math.sqrt(2 * 44)
    assert (sets("deterministic")[:30] == sets("deterministic")[30:60]).all()


def test_label_quantity_is_the_first_class_in_turn_and_others_at_random():
    labels = np.repeat(np.arange(10), 300)
    made = assign("label_quantity", labels, 3, clients=25, labels_per_client=3)
    counts = counts_of(made, labels)
    assert ((counts > 0).sum(axis=1) == 3).all()
    assert (counts[np.arange(25), np.arange(25) % 10] > 0).all()
    assert (made.owners >= 0).all()  # with more clients than classes every class has a client
    twin = assign(
        "pathological", labels, 3, clients=25, classes_per_client=3,
        class_assignment_mode="first-deterministic",
    )  # fmt: skip
    np.testing.assert_array_equal(made.owners, twin.owners)
    others = assign("label_quantity", labels, 4, clients=25, labels_per_client=3)
    assert ((counts_of(others, labels) > 0) != (counts > 0)).any()


def test_shards_of_one_are_the_blocks_of_flwr_datasets_given_out_at_random():
    labels = np.sort(generator(0, "t").integers(0, 7, 600))
    theirs = flwr_partitioners.ShardPartitioner(
        num_partitions=30, partition_by="label", num_shards_per_partition=1
    )
    ours = counts_of(assign("shards", labels, clients=30, shards_per_client=1), labels)
    oracle = flwr_counts(theirs, labels)
    assert sorted(map(tuple, ours)) == sorted(map(tuple, oracle))
    assert not (ours == ours[np.argsort(ours @ np.arange(7), kind="stable")]).all()


def test_mcmahans_setting_gives_most_clients_two_classes_of_three_hundred_each():
    labels = np.repeat(np.arange(10), 6000)
    counts = counts_of(assign("shards", labels, clients=100, shards_per_client=2), labels)
    assert (counts.sum(axis=1) == 600).all()
    assert set(np.unique(counts).tolist()) == {0, 300, 600}
    # both shards of one class: 19 of the 199 others are of the same class
    same = (counts == 600).any(axis=1).sum()
    expected = 100 * 19 / 199
    assert abs(same - expected) <= 4 * math.sqrt(expected)


def test_uneven_shards_differ_by_one_and_lose_nothing():
    labels = np.arange(1007) % 10
    made = assign("shards", labels, clients=10, shards_per_client=3)
    sizes = counts_of(made, labels).sum(axis=1)
    assert (made.owners >= 0).all()
    assert np.ptp(sizes) <= 3


# --- Dirichlet laws over the classes of a client -----------------------------------------------


def test_client_laws_have_the_mean_and_variance_of_a_dirichlet_law_around_the_prior():
    from fedsim.data.partitions.dirichlet import _client_laws

    prior, alpha, draws = np.array([0.5, 0.3, 0.2]), 2.5, 20_000
    laws = _client_laws(draws, alpha, prior, generator(1, "t"))
    np.testing.assert_allclose(laws.sum(axis=1), 1)
    variance = prior * (1 - prior) / (alpha + 1)  # Dirichlet(alpha p)
    assert (np.abs(laws.mean(axis=0) - prior) <= 4 * np.sqrt(variance / draws)).all()
    squares = (laws - prior) ** 2
    error = squares.std(axis=0) / math.sqrt(draws)
    assert (np.abs(squares.mean(axis=0) - variance) <= 4 * error).all()


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_client_skew_is_that_of_flwr_datasets_with_the_same_concentration_per_class(alpha):
    labels, seeds = np.repeat(np.arange(5), 120), range(14)

    def distance(counts):  # of the clients' laws from the common one, in total variation
        return np.abs(counts / counts.sum(axis=1, keepdims=True) - 1 / 5).sum(axis=1).mean() / 2

    def ours(alpha, seed):
        return counts_of(assign("dirichlet_client", labels, seed, clients=12, alpha=alpha), labels)

    def theirs(seed):
        return flwr_partitioners.InnerDirichletPartitioner(
            partition_sizes=[50] * 12, partition_by="label", alpha=[alpha / 5] * 5, seed=seed
        )

    found = np.array([distance(ours(alpha, seed)) for seed in seeds])
    oracle = np.array([distance(flwr_counts(theirs(seed), labels)) for seed in seeds])
    error = math.sqrt((found.var() + oracle.var()) / len(seeds))
    assert abs(found.mean() - oracle.mean()) <= 4 * error
    # the neighbour's reading, alpha for every class, is another law
    neighbour = np.array([distance(ours(5 * alpha, seed)) for seed in seeds])
    assert found.mean() - neighbour.mean() > 8 * error


def test_client_sizes_are_equal_or_follow_the_law_whatever_the_classes():
    labels = np.repeat(np.arange(4), [10, 200, 30, 165])
    equal = counts_of(assign("dirichlet_client", labels, clients=9, alpha=0.1), labels)
    assert equal.sum(axis=1).tolist() == [45] * 9
    linear = assign("dirichlet_client", labels, clients=9, alpha=0.1, law="linear")
    assert counts_of(linear, labels).sum(axis=1).tolist() == [9 * c for c in range(1, 10)]
    for made in (equal, counts_of(linear, labels)):
        np.testing.assert_array_equal(made.sum(axis=0), [10, 200, 30, 165])


def test_a_vanishing_alpha_gives_clients_one_class_as_long_as_it_lasts_and_a_huge_one_all():
    labels = np.repeat(np.arange(5), 400)
    small = counts_of(assign("dirichlet_client", labels, clients=50, alpha=1e-9), labels)
    assert (small > 0).sum(axis=1).min() == 1
    assert np.median(small.max(axis=1) / small.sum(axis=1)) == 1
    large = counts_of(assign("dirichlet_client", labels, clients=50, alpha=1e9), labels)
    assert ((large > 0).sum(axis=1) >= 4).all()
    assert abs(large.mean(axis=0) - 8).max() < 1e-9


# --- owners ------------------------------------------------------------------------------------

OWNERS = np.array([7, 7, 2, 9, 2, 7, 11, 9, 2, 2])


def test_natural_clients_are_the_owners_in_their_order():
    made = assign("natural", np.zeros(10), groups=OWNERS)
    assert made.clients == 4
    assert made.owners.tolist() == [1, 1, 0, 2, 0, 1, 3, 2, 0, 0]  # 2, 7, 9, 11
    assert made.why_dropped is None
    theirs = flwr_partitioners.NaturalIdPartitioner(partition_by="owner")
    oracle = flwr_counts(theirs, np.zeros(10, dtype=np.int64), OWNERS)
    np.testing.assert_array_equal(np.bincount(made.owners), oracle[:, 0])


def test_fewer_natural_clients_are_whole_owners_drawn_uniformly():
    hits = np.zeros(4)
    for seed in range(400):
        made = assign("natural", np.zeros(10), seed, OWNERS, clients=2)
        assert made.clients == 2
        for owner in np.unique(OWNERS):
            assert len(set(made.owners[owner == OWNERS].tolist())) == 1
        kept = np.unique(OWNERS[made.owners >= 0])
        assert len(kept) == 2
        assert made.owners[kept[0] == OWNERS][0] == 0  # in the owners' order
        hits[np.searchsorted(np.unique(OWNERS), kept)] += 1
        assert made.why_dropped == "2 of 4 owners were not drawn"
    assert np.abs(hits - 200).max() <= 4 * math.sqrt(400 / 4)


def test_grouped_owners_stay_whole_and_are_dealt_out_evenly_or_by_law():
    owners = np.repeat(np.arange(23), 3)
    for law, sizes in (("equal", [6, 6, 6, 5]), ("linear", [2, 5, 7, 9])):
        made = assign("grouped", np.zeros(69), 5, owners, clients=4, law=law)
        held = [np.unique(owners[made.owners == client]) for client in range(4)]
        assert [len(mine) for mine in held] == sizes
        assert sorted(np.concatenate(held).tolist()) == list(range(23))
    first = assign("grouped", np.zeros(69), 5, owners, clients=4).owners
    assert (first != assign("grouped", np.zeros(69), 6, owners, clients=4).owners).any()


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("sizes", {"law": "lineal"}, "law = 'lineal': must be equal or linear or"),
        ("sizes", {"sigma": -1.0}, r"\[partition\] sigma = -1.0: must be finite and >= 0"),
        ("sizes", {"law": "linear", "sigma": 2.0}, "sigma = 2.0: changes nothing under law = 'lin"),
        ("sizes", {"exponent": 2.0}, "exponent = 2.0: changes nothing under law = 'log_normal'"),
        ("iid", {"feature_scale": 100.0}, r"feature_scale = 100.0: must be in \[0, 10\]"),
        ("sizes", {"exponent": math.inf}, "exponent = inf: must be finite and >= 0"),
        ("sizes", {"clients": 21}, "has 20 training samples; use at most 20"),
        ("sizes", {"clients": 4, "min_size": 6}, "20 samples give each of 4 clients at most 5"),
        ("dirichlet_client", {"clients": 4, "min_size": 6}, "4 clients at most 5"),
        ("dirichlet_client", {"alpha": 0.0}, "alpha = 0.0: must be finite and > 0"),
        ("pathological", {"classes_per_client": 0}, "classes_per_client = 0: must be >= 1"),
        (
            "pathological",
            {"classes_per_client": 5},
            "training samples have 4 classes; use at most 4",
        ),
        ("pathological", {"class_assignment_mode": "first"}, "must be random or deterministic or"),
        (
            "pathological",
            {"clients": 20, "class_assignment_mode": "deterministic"},
            r"classes_per_client = 2 with clients = 20: 10 clients share the 5 samples of class 0",
        ),
        ("label_quantity", {"labels_per_client": 5}, "labels_per_client = 5: the training samples"),
        ("shards", {"clients": 11}, "20 training samples cannot be cut into 22 shards"),
        ("shards", {"shards_per_client": 0}, "shards_per_client = 0: must be >= 1"),
        ("natural", {}, 'kind = "natural": the data set does not say whose samples are whose'),
        ("grouped", {}, 'kind = "grouped": the data set does not say whose samples are whose'),
        ("natural", {"clients": 0}, "clients = 0: must be >= 1"),
        ("iid", {"clients": 2, "label_noise": [0.1]}, "label_noise has 1 values for 2 clients"),
        ("iid", {"clients": 2, "rotation": [0.1]}, "rotation has 1 values for 2 clients"),
        ("iid", {"rotation": math.nan}, "rotation = nan: must be finite"),
        ("iid", {"feature_noise": -0.5}, "feature_noise = -0.5: must be in \\[0, 1e\\+12\\]"),
        ("iid", {"alpha": 1.0}, "iid: got an unexpected keyword argument 'alpha'"),
        ("nature", {}, r"'nature' is not a partition; did you mean 'natural'\? .* flwr-datasets"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(kind, keys, message):
    with pytest.raises(ValueError, match=message):
        assign(kind, np.arange(20) % 4, **keys)


@pytest.mark.parametrize("kind", [kind for kind in PARTITIONS if kind != "file"])
def test_absurdly_many_clients_are_refused_before_anything_is_allocated(kind):
    with pytest.raises(ScenarioError, match="1000000000000"):
        assign(kind, np.arange(20) % 4, groups=np.arange(20), clients=10**12)


@pytest.mark.parametrize(("kind", "clients"), [("natural", 5), ("grouped", 5)])
def test_more_clients_than_owners_are_refused(kind, clients):
    with pytest.raises(ScenarioError, match="clients = 5: 4 owners have training samples; use at"):
        assign(kind, np.zeros(10), groups=OWNERS, clients=clients)


@pytest.mark.parametrize("key", ["label_noise", "rotation"])
def test_a_list_per_client_must_fit_the_owners_that_are_found(key):
    with pytest.raises(ScenarioError, match=f"{key} has 3 values for 4 clients"):
        assign("natural", np.zeros(10), groups=OWNERS, **{key: [0.1, 0.2, 0.3]})


def test_clients_laws_grow_apart_as_alpha_falls_although_classes_run_out():
    labels = np.repeat(np.arange(10), 140)
    held = {}
    for alpha in (1e-7, 0.01, 0.3, 1.0, 10.0):
        counts = np.zeros(5)
        for seed in range(5):
            rule = PARTITIONS["dirichlet_client"](clients=10, alpha=alpha)
            owners = rule.assign(Samples(labels), seed).owners
            pairs = np.unique(np.stack([owners, labels]), axis=1)
            counts[seed] = pairs.shape[1] / 10
        held[alpha] = counts.mean()
    # of ten clients of one class's size each a few must share classes that run out
    assert held[1e-7] < 3
    assert held[0.01] < 3
    assert held[0.01] < held[0.3] < held[1.0] < held[10.0]
