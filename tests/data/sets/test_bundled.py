"""Scikit-learn's bundled data sets: their numbers are scikit-learn's, nothing leaks."""

import numpy as np
import pytest
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

from tests.data.tables import load

PARTITION = {"kind": "iid", "clients": 3, "test_fraction": 0.2}
ORIGINALS = {
    "breast_cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
    "diabetes": lambda: datasets.load_diabetes(return_X_y=True, scaled=False),
}
SHAPES = {"breast_cancer": ((30,), 2, (), 0), "diabetes": ((10,), 0, (), 0)}


def raw(cache, name, **keys):
    choices = {"standardise": False, "standardise_target": False}
    taken = {k: v for k, v in choices.items() if k == "standardise" or name == "diabetes"}
    return load(cache, PARTITION, name=name, **taken, **keys)


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_samples_are_scikit_learns(tmp_path, name):
    features, targets = ORIGINALS[name]()
    data = raw(tmp_path, name)
    assert data.spec == SHAPES[name]
    np.testing.assert_array_equal(data.clients([0]).features, features.astype(np.float32))
    np.testing.assert_array_equal(data.clients([0]).targets, targets.astype(np.float32))
    assert len(data.test.targets) == round(0.2 * len(targets))


@pytest.mark.parametrize("name", ORIGINALS)
def test_they_are_standardised_by_what_is_trained_on_alone(tmp_path, name):
    before, after = raw(tmp_path, name), load(tmp_path, PARTITION, name=name)
    rows = np.concatenate(before.clients(range(3)).rows)
    assert rows.tolist() == np.concatenate(after.clients(range(3)).rows).tolist()
    local_test = np.concatenate(before.clients(range(3), split="test").rows)
    assert not set(rows) & set(local_test)
    law = StandardScaler().fit(before.clients([0]).features[rows].astype(np.float64))
    for split in (lambda data: data.clients([0]), lambda data: data.test):
        expected = law.transform(split(before).features.astype(np.float64))
        np.testing.assert_allclose(split(after).features, expected, rtol=0, atol=1e-4)


def test_the_diabetes_target_can_be_had_back_from_the_manifest(tmp_path):
    before, after = raw(tmp_path, "diabetes"), load(tmp_path, PARTITION, name="diabetes")
    told = after.manifest["data"]["standardised"]["targets"]
    np.testing.assert_allclose(
        after.test.targets * told["std"] + told["mean"], before.test.targets, rtol=1e-5
    )
    trained = after.clients([0]).targets[np.concatenate(after.clients(range(3)).rows)]
    assert abs(trained.mean()) < 1e-6
    assert abs(trained.std() - 1) < 1e-6


def test_numbers_are_held_out_over_their_whole_range(tmp_path):
    data = raw(tmp_path, "diabetes")
    edges = np.quantile(data.clients([0]).targets, np.linspace(0, 1, 11))
    counts, _ = np.histogram(data.test.targets, edges)
    assert counts.min() >= 7  # of 88 in ten tenths
    assert counts.max() <= 11


def test_seeds_hold_out_others_and_have_statistics_of_their_own(tmp_path):
    made = [load(tmp_path, PARTITION, name="breast_cancer", seed=seed) for seed in (0, 1)]
    told = [data.manifest["data"]["standardised"]["features"]["mean"] for data in made]
    assert told[0] != told[1]
    assert made[0].manifest_sha256 != made[1].manifest_sha256
    again = load(tmp_path, PARTITION, name="breast_cancer", seed=0)
    assert again.manifest == made[0].manifest
    # the samples themselves are there once
    assert len(list(tmp_path.glob("data/*/index.json"))) == 1
