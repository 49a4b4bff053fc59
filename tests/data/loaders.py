"""Loaders as a user writes them; named by import path in tests."""

import numpy as np
import torch

from fedsim.data.sets.user import DataSet


def blobs(*, samples: int = 60, shift: float = 2.0, calls: str = "") -> DataSet:
    """Two blobs.

    Args:
        samples: How many.
        shift: Between the two.
        calls: A file that gets a line with each call.
    """
    if calls:
        with open(calls, "a") as file:
            file.write("called\n")
    draw = np.random.default_rng(5)
    targets = np.arange(samples) % 2
    return DataSet(draw.normal(size=(samples, 3)) + shift * targets[:, None], targets)


def everything():
    features = torch.arange(24.0, dtype=torch.float64).reshape(6, 2, 2)
    return DataSet(
        features=features,
        targets=torch.tensor([0, 1, 0, 1, 1, 0]),
        groups=["b", "a", "b", "c", "a", "b"],
        test_features=features[:3] + 100,
        test_targets=[1, 1, 0],
        num_classes=3,
    )


def from_file(path: str) -> DataSet:
    numbers = np.loadtxt(path)
    return DataSet(numbers[:, :-1], numbers[:, -1])


def unseeded():
    return DataSet(np.random.default_rng().normal(size=(30, 2)), np.arange(30) % 2)


def tokens():
    return DataSet(np.arange(40).reshape(20, 2) % 7, np.arange(20) % 7, vocabulary=7)


def failing(key: int = 3):
    return {}["missing"]


def returning(case: str):
    features, targets = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    hole = features.copy()
    hole[2, 1] = np.nan
    return {
        "a tuple": (features, targets),
        "a hole": DataSet(hole, targets),
        "too large": DataSet(np.full((4, 2), 1e300), targets),
        "text": DataSet(np.full((4, 2), "x"), targets),
        "flat": DataSet(np.zeros(4), targets),
        "ragged": DataSet([[1, 2], [3], [4, 5], [6, 7]], targets),
        "masked": DataSet(np.ma.masked_equal([[1, 2], [3, 4], [5, 6], [7, 9]], 4), targets),
        "lengths": DataSet(features, targets[:3]),
        "one sample": DataSet(features[:1], targets[:1]),
        "one class": DataSet(features, targets * 0),
        "gap": DataSet(features, targets * 2),
        "from one": DataSet(features, targets + 1),
        "negative": DataSet(features, targets - 1),
        "above": DataSet(features, [0, 1, 2, 1], num_classes=2),
        "class shape": DataSet(features, targets[:, None]),
        "half a test": DataSet(features, targets, test_features=features),
        "test shape": DataSet(features, targets, None, np.zeros((2, 3)), [0, 1]),
        "test class": DataSet(features, targets, None, features[:2], [0, 3]),
        "empty test": DataSet(features, targets, None, features[:0], targets[:0]),
        "fraction": DataSet(features, targets, test_fraction=1.0),
        "groups": DataSet(features, targets, groups=[1, 2, 3]),
        "no owner": DataSet(features, targets, groups=["a", None, "b", "a"]),
        "token": DataSet([[0, 1], [2, 7], [0, 0], [0, 0]], targets, vocabulary=7),
        "float token": DataSet(features, targets, vocabulary=7),
        "hole in targets": DataSet(features, [0.5, 1.5, np.inf, 0.0]),
        "no features": DataSet(None, targets),
    }[case]


not_a_function = 7
