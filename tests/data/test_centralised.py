"""All training samples in one hand."""

import pickle

import numpy as np
import pytest

from fedsim.data.preparation import prepare

DATA = [
    ({"name": "digits"}, {"kind": "dirichlet", "clients": 6, "min_size": 5}),
    ({"name": "digits"}, {"kind": "iid", "clients": 6, "label_noise": 0.3, "rotation": 20.0}),
    ({"name": "diabetes"}, {"kind": "iid", "clients": 6}),
    (
        {"name": "synthetic", "dimension": 4, "max_samples": 30, "test_clients": 3},
        {"kind": "natural", "clients": 6},
    ),
]


@pytest.fixture(params=DATA, ids=[f"{d['name']}-{p['kind']}" for d, p in DATA])
def both(request):
    data, partition = request.param
    partition = {**partition, "test_fraction": 0.25}
    return [
        prepare(data, {**partition, "centralised": central}, seed=3) for central in (False, True)
    ]


def samples(held, rows):
    return np.asarray(held.features)[rows], np.asarray(held.targets)[rows]


def test_client_0_holds_what_all_held_and_others_nothing(both):
    divided, central = both
    every = divided.clients(range(6))
    held = central.clients([3, 0])
    assert len(held.rows[0]) == 0
    expected = samples(every, np.sort(np.concatenate(every.rows)))
    for found, wanted in zip(samples(held, held.rows[1]), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert central.sizes(range(6)).tolist() == [int(divided.sizes(range(6)).sum()), 0, 0, 0, 0, 0]
    labels = np.concatenate(divided.labels(range(6)))
    assert sorted(central.labels([1, 0])[1]) == sorted(labels)
    assert central.num_clients == 6


def test_local_test_splits_and_the_servers_stay(both):
    divided, central = both
    for one, other in zip(divided.test, central.test, strict=True):
        np.testing.assert_array_equal(one, other)
    one, other = (each.clients(range(6), split="test") for each in both)
    for mine, same in zip(one.rows, other.rows, strict=True):
        for a, b in zip(samples(one, mine), samples(other, same), strict=True):
            np.testing.assert_array_equal(a, b)
    assert sum(map(len, other.rows)) > 0


def test_another_process_has_the_same(both):
    divided, central = both
    again = pickle.loads(pickle.dumps(central))
    assert again.manifest_sha256 == central.manifest_sha256 != divided.manifest_sha256
    assert again.sizes(range(6)).tolist() == central.sizes(range(6)).tolist()
    with pytest.raises(IndexError):
        central.clients([6])
