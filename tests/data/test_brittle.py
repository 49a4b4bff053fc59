"""A strong feature and many weak ones."""

import numpy as np
import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.data.preparation import prepare
from fedsim.data.sets.formats import DATASETS


def brittle(clients=10, *, seed=0, kind="natural", **arguments):
    partition = {"kind": kind, "clients": clients, "test_fraction": 0.0}
    return prepare({"name": "brittle", **arguments}, partition, seed=seed)


def held(data, client):
    found = data.clients([client])
    return found.features[found.rows[0]].astype(np.float64), found.targets[found.rows[0]]


def test_samples_follow_the_law():
    n = 20_000
    features, targets = held(brittle(1, samples=n, weak=3, shift=0.4, deviation=0.7), 0)
    assert features.shape == (n, 4)
    y = 2 * targets - 1
    # five standard deviations each
    assert abs(y.mean()) < 5 / np.sqrt(n)
    assert set(np.unique(features[:, 0])) == {-1.0, 1.0}
    agrees = (features[:, 0] == y).mean()
    assert abs(agrees - 0.93) < 5 * np.sqrt(0.93 * 0.07 / n)
    apart = features[:, 1:] * y[:, None]
    assert (np.abs(apart.mean(0) - 0.4) < 5 * 0.7 / np.sqrt(n)).all()
    assert (np.abs(apart.std(0) - 0.7) < 5 * 0.7 / np.sqrt(2 * n)).all()


def test_the_seed_and_the_client_decide_alone():
    whole, wide = brittle(), brittle(1000)
    np.testing.assert_array_equal(held(whole, 3)[0], held(wide, 3)[0])
    assert not np.array_equal(held(whole, 3)[0], held(whole, 4)[0])
    assert not np.array_equal(held(whole, 3)[0], held(brittle(seed=1), 3)[0])
    assert len(whole.test.targets) == 10 * 100
    assert len(wide.test.targets) == 20 * 100


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("weak", 0, ">= 1"),
        ("agreement", 1.5, r"in \[0, 1\]"),
        ("shift", -0.1, r"in \[0, 1e6\]"),
        ("deviation", np.nan, r"in \[0, 1e6\]"),
        ("samples", 0, ">= 1"),
        ("test_fraction", 0.0, r"in \(0, 1\]"),
        ("test_clients", 0, ">= 1"),
    ],
)
def test_impossible_numbers_are_refused(key, value, allowed):
    with pytest.raises(ScenarioError, match=rf"\[data\] {key} = {value}: must be {allowed}"):
        DATASETS["brittle"](**{key: value})


def test_other_divisions_and_skews_are_refused_by_its_name():
    with pytest.raises(ScenarioError, match=r"kind = 'iid': brittle makes each client's samples"):
        brittle(kind="iid")
    skewed = {"kind": "natural", "clients": 3, "feature_noise": 0.5}
    with pytest.raises(ScenarioError, match=r'name = "brittle": its one law says how clients'):
        prepare({"name": "brittle"}, skewed, seed=0)
