"""Samples of the zoo: 12 numbers and one of 3 classes, at four clients of unequal size."""

import numpy as np

from fedsim.data.sets.user import DataSet

SIZES = (10, 6, 7, 4)


def samples():
    random = np.random.default_rng(5)
    x = random.standard_normal((sum(SIZES), 12))
    y = (x[:, :3] + 0.5 * random.standard_normal((len(x), 3))).argmax(1)
    y[:3] = 0, 1, 2
    owners = np.repeat(np.arange(len(SIZES)), SIZES)
    return DataSet(x, y, groups=owners, test_features=x[:8], test_targets=y[:8])
