"""Features, and targets of numbers, with mean 0 and standard deviation 1 over the training samples.

The statistics are those of all clients' training samples together: neither the server's held-out
set nor a client's local test split is looked at, so that they differ by seed and partition. (That
clients could compute them together is assumed, as everywhere in the literature; sums suffice.)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.federated import Ints
from fedsim.data.reading.checks import Numbers

_BLOCK = 4096  # samples at a time


def standardised(
    arrays: Mapping[str, npt.NDArray[Any]], fields: tuple[str, ...], train_rows: Ints
) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """Return arrays with mean 0 and standard deviation 1.

    Args:
        arrays: "features" and "targets", and those of the test set, "test_features" and
            "test_targets".
        fields: Which of "features" and "targets".
        train_rows: The rows that clients train on.

    Returns:
        Those arrays with their test set's, and each field's mean and standard deviation as JSON.
    """
    changed: dict[str, Numbers] = {}
    statistics: dict[str, Any] = {}
    for name in fields:
        mean, deviation = moments(arrays[name], train_rows)
        for array_name in (name, f"test_{name}"):
            changed[array_name] = applied(arrays[array_name], mean, deviation)
        statistics[name] = {"mean": _listed(mean), "std": _listed(deviation)}
    return changed, statistics


def moments(array: npt.NDArray[Any], rows: Ints) -> tuple[Numbers, Numbers]:
    """Return mean and standard deviation of each feature; of images, of each channel.

    Args:
        array: `[n, ...]`; images are `[n, channels, height, width]`.
        rows: Those that count.

    Returns:
        Both in the shape of a sample, images' with height and width 1. A feature that is the same
        everywhere gets deviation 1, and so becomes 0.
    """
    axes = (0, 2, 3) if array.ndim == 4 else (0,)
    blocks = [np.sort(rows)[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    count = len(rows) * int(np.prod([array.shape[axis] for axis in axes[1:]], dtype=np.int64))

    def mean_of(power: int, center: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
        sums = (((array[b] - center) ** power).sum(axis=axes, keepdims=True) for b in blocks)
        total: npt.NDArray[np.float64] = sum(sums) / count
        return total

    mean = mean_of(1, np.float64(0))
    deviation = np.sqrt(mean_of(2, mean))
    # rounding leaves a constant with a deviation of about the last bit of its value
    deviation[deviation <= np.abs(mean) * 1e-6] = 1
    # rounded: the last bits of a long sum differ from one NumPy to another
    return mean[0].astype(np.float32), deviation[0].astype(np.float32)


def applied(array: npt.NDArray[Any], mean: Numbers, deviation: Numbers) -> Numbers:
    """Return numbers less their mean, over their deviation, in float32 and block by block."""
    out = np.empty(array.shape, dtype=np.float32)
    for start in range(0, len(array), _BLOCK):
        block = array[start : start + _BLOCK]
        out[start : start + _BLOCK] = (block - mean) / deviation
    return out


def _listed(values: Numbers) -> Any:
    return values.reshape(-1).tolist() if values.size > 1 else float(values.reshape(-1)[0])
