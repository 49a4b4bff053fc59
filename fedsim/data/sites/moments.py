"""Mean and spread of numbers that lie at several sites, from what each says of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.data.federated import Ints

_BLOCK = 4096  # samples at a time

Wide = npt.NDArray[np.float64]


class FeatureMoments(NamedTuple):
    """How many numbers there are of each feature, their mean, and their squared distances from it.

    Attributes:
        number: How many; of images, pixels of a channel.
        mean: Of each feature; of images, of each channel; flat.
        squares: The sum of squared distances from the mean, of each.
    """

    number: int
    mean: Wide
    squares: Wide

    @classmethod
    def over(cls, parts: Sequence["FeatureMoments"]) -> "FeatureMoments":
        """Return the moments of all numbers together.

        Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing
        sample variances, Stanford STAN-CS-79-773.
        """
        count = sum(part.number for part in parts)
        mean = sum(part.mean * part.number for part in parts) / count
        squares = sum(p.squares + p.number * (p.mean - mean) ** 2 for p in parts)
        return cls(count, np.asarray(mean), np.asarray(squares))

    def rounded(self) -> dict[str, Any]:
        """Return mean and deviation in float32, as the manifest has them.

        A feature that is the same everywhere has deviation 1, and so becomes 0. They are rounded,
        for the last bits of a long sum differ from one NumPy to another.
        """
        deviation = np.sqrt(self.squares / self.number)
        deviation[deviation <= np.abs(self.mean) * 1e-6] = 1
        return {"mean": _listed(self.mean), "std": _listed(deviation)}

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON, from which every bit is read back."""
        return {
            "number": self.number, "mean": self.mean.tolist(), "squares": self.squares.tolist()
        }  # fmt: skip

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "FeatureMoments":
        """Return what `to_json` returned, from elsewhere.

        Raises:
            ValueError: If these are no moments.
        """
        found = cls(int(told["number"]), *(np.asarray(told[n], float) for n in ("mean", "squares")))
        lists = (found.mean, found.squares)
        shape = all(each.ndim == 1 and np.isfinite(each).all() for each in lists)
        if found.number < 1 or not shape or (found.squares < 0).any():
            raise ValueError("no moments")
        return found


def moments_of(array: npt.NDArray[Any], rows: Ints) -> FeatureMoments:
    """Return the moments of some samples.

    Args:
        array: `[n, ...]`; images are `[n, channels, height, width]`.
        rows: Those that count, ascending, at least one.
    """
    axes = (0, 2, 3) if array.ndim == 4 else (0,)
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    count = len(rows) * int(np.prod([array.shape[axis] for axis in axes[1:]], dtype=np.int64))

    def total(power: int, center: Wide | float) -> Wide:
        sums = (((array[b] - center) ** power).sum(axis=axes, keepdims=True) for b in blocks)
        return np.asarray(sum(sums))

    mean = total(1, np.float64(0)) / count
    return FeatureMoments(count, mean.reshape(-1), total(2, mean).reshape(-1))


def _listed(values: Wide) -> Any:
    found = values.astype(np.float32)
    return found.tolist() if found.size > 1 else float(found[0])
