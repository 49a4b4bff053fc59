"""Sparse features of Zipf's frequencies."""

import numpy as np
import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.basics.rng import generator
from fedsim.data.preparation import prepare
from fedsim.data.sets.formats import DATASETS

ALL = np.arange(30)


def zipf(clients=30, *, seed=0, test_fraction=0.0, kind="natural", **arguments):
    partition = {"kind": kind, "clients": clients, "test_fraction": test_fraction}
    return prepare({"name": "zipf", **arguments}, partition, seed=seed)


def held(data, client, split="train"):
    found = data.clients([client], split=split)
    return found.features[found.rows[0]], found.targets[found.rows[0]]


def test_every_sample_has_so_many_ones():
    features, targets = held(zipf(dimension=50, active=4, samples=70), 3)
    assert features.shape == (70, 50)
    assert features.dtype == np.float32
    assert set(np.unique(features)) == {0.0, 1.0}
    assert (features.sum(axis=1) == 4).all()
    assert set(np.unique(targets)) <= {0, 1}


def test_samples_with_every_feature_are_possible():
    features, _ = held(zipf(dimension=3, active=3), 0)
    assert (features == 1).all()


def test_a_clients_samples_follow_its_law():
    """One active feature is a draw by the client's probabilities, its label one by w."""
    samples = 40_000
    data = zipf(1, dimension=8, active=1, samples=samples, signal=1.5, seed=4)
    features, targets = held(data, 0)
    mean = np.arange(1, 9) ** -1.1
    law = generator(4, "synthetic", 0).dirichlet(60.0 * mean / mean.sum())
    counts = features.sum(axis=0)
    # five standard deviations of a binomial count
    assert (np.abs(counts - samples * law) <= 5 * np.sqrt(samples * law * (1 - law)) + 1).all()
    weights = 1.5 * generator(4, "synthetic-common").standard_normal(8)
    chance = 1 / (1 + np.exp(-weights))
    positive = (features * targets[:, None]).sum(axis=0)
    assert (np.abs(positive - counts * chance) <= 5 * np.sqrt(counts) / 2 + 1).all()


def test_the_servers_test_set_has_all_features_alike_or_follows_the_clients():
    shared = {"dimension": 20, "active": 2, "samples": 400, "test_fraction": 1.0}
    for uniform in (True, False):
        data = prepare(
            {"name": "zipf", "uniform_test": uniform, **shared},
            {"kind": "natural", "clients": 30},
            seed=1,
        )
        counts = data.test.features.sum(axis=0)
        assert len(data.test.targets) == 30 * 400
        rare, common = counts.min(), counts.max()
        assert (rare > 0.8 * common) == uniform


def test_a_clients_data_do_not_depend_on_its_neighbours_and_the_seed_decides_them():
    data = zipf(1_000_000)
    alone, _ = held(data, 999_999)
    found = data.clients([5, 999_999])
    np.testing.assert_array_equal(found.features[found.rows[1]], alone)
    other, _ = held(zipf(1_000_000, seed=1), 999_999)
    assert not np.array_equal(other, alone)
    assert zipf().manifest_sha256 == zipf().manifest_sha256
    assert zipf().manifest_sha256 != zipf(seed=1).manifest_sha256
    assert zipf().manifest_sha256 != zipf(signal=1.0).manifest_sha256
    assert data.manifest["data"]["name"] == "zipf"


def test_a_local_test_split_is_cut_off_the_clients_samples():
    whole, split = zipf(5), zipf(5, test_fraction=0.25)
    for client in range(5):
        parts = [held(split, client, part)[0] for part in ("train", "test")]
        assert [len(part) for part in parts] == [30, 10]
        np.testing.assert_array_equal(np.concatenate(parts), held(whole, client)[0])


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("dimension", 0, ">= 1"),
        ("active", 0, "in 1 to dimension = 300"),
        ("active", 301, "in 1 to dimension = 300"),
        ("exponent", -1.0, r"in \[0, 10\]"),
        ("exponent", np.nan, r"in \[0, 10\]"),
        ("concentration", 0.0, "> 0 and at most 1e9"),
        ("signal", np.inf, r"in \[0, 1e6\]"),
        ("samples", 0, ">= 1"),
        ("test_fraction", 0.0, r"in \(0, 1\]"),
        ("test_clients", 0, ">= 1"),
    ],
)
def test_impossible_numbers_are_refused(key, value, allowed):
    with pytest.raises(ScenarioError, match=rf"\[data\] {key} = {value}: must be {allowed}"):
        DATASETS["zipf"](**{key: value})


def test_other_divisions_and_skews_are_refused_by_its_name():
    with pytest.raises(ScenarioError, match=r"kind = 'iid': zipf makes each client's samples"):
        zipf(kind="iid")
    with pytest.raises(ScenarioError, match=r'name = "zipf": its concentration says how clients'):
        prepare({"name": "zipf"}, {"kind": "natural", "clients": 3, "feature_noise": 0.5}, seed=0)
