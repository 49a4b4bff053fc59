"""Medians, bootstrap intervals of a ratio's median, and when a target is met."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the median of some values and its percentile bootstrap interval.

    Args:
        values: One per repeat; at least one.
        level: Of the interval, in (0, 1).
        seed: Of the resampling.

    Raises:
        ValueError: Without values.

    Example:
        >>> median_interval([2.0, 2.0, 2.0])
        Interval(median=2.0, low=2.0, high=2.0)
    """
    if not len(values):
        raise ValueError("values is empty: must hold at least one")
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    medians = np.median(array[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.median(array)), float(low), float(high))


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> Interval:
    """Return the median of the ratios of each repeat, with its interval.

    Args:
        slow: Times, one per repeat.
        fast: Times of the same repeats.

    Raises:
        ValueError: If they are not as many.
    """
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return median_interval(ratios)


def met(interval: Interval, bound: float, sense: Literal["at least", "at most"]) -> bool:
    """Whether the whole interval is on the right side of a bound.

    Example:
        >>> met(Interval(2.5, 1.9, 3.0), 2.0, "at least")
        False
    """
    return interval.low >= bound if sense == "at least" else interval.high <= bound
