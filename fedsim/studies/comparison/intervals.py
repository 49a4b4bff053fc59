"""Means over seeds, and paired differences: t-intervals and sign-flip tests."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
EXACT = 14  # pairs up to which all sign flips are counted
_DRAWN = 100_000  # flips drawn beyond that


class Mean(NamedTuple):
    """A mean and its t-interval.

    Attributes:
        n: The number of values.
        mean: Their mean; nan without any, and where one is not finite.
        low: The interval's lower end; nan where there are fewer than two values.
        high: The upper end, likewise.
    """

    n: int
    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """The mean of paired differences.

    Attributes:
        n: The number of pairs.
        mean: The mean of a - b.
        low: The t-interval's lower end; nan for fewer than two pairs.
        high: The upper end, likewise.
        p: Of the two-sided sign-flip test; nan without pairs.
        above: In how many pairs a is larger than b.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    above: int


def mean_interval(values: Sequence[float], *, level: float = LEVEL) -> Mean:
    """Return the mean of some values with its t-interval.

    Args:
        values: One per seed.
        level: Of the interval, in (0, 1).

    Example:
        >>> mean_interval([1.0, 3.0]).mean
        2.0
    """
    count = len(values)
    if not count or not all(map(math.isfinite, values)):
        return Mean(count, math.nan, math.nan, math.nan)
    mean = math.fsum(values) / count
    if count < 2:
        return Mean(count, mean, math.nan, math.nan)
    from scipy import stats

    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * float(np.std(values, ddof=1))
    half /= math.sqrt(count)
    return Mean(count, mean, mean - half, mean + half)


def paired(a: Sequence[float], b: Sequence[float], *, level: float = LEVEL) -> Paired:
    """Return how much larger `a` is than `b`, pair by pair.

    Args:
        a: One value per seed.
        b: The values of the same seeds, in the same order.
        level: Of the interval, in (0, 1).

    Raises:
        ValueError: If they are not as many.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = mean_interval(differences, level=level)
    above = sum(d > 0 for d in differences)
    return Paired(*mean, sign_flip(differences), above)


class Ratio(NamedTuple):
    """The ratio of two paired means.

    Attributes:
        n: The number of pairs.
        ratio: The mean of the numerators over that of the denominators; nan where that is 0.
        low: The interval's lower end; nan where the interval is not bounded, as when the
            denominators' mean may be 0.
        high: The upper end, likewise.
    """

    n: int
    ratio: float
    low: float
    high: float


def paired_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, level: float = LEVEL
) -> Ratio:
    """Return the ratio of two means over the same seeds, with Fieller's interval.

    The interval holds every r for which the mean of a - r b may be 0 by the paired t-test. Unlike
    the mean of ratios it stays sound where a single denominator is near 0.

    Args:
        numerators: a, one per seed.
        denominators: b, of the same seeds in the same order.
        level: Of the interval, in (0, 1).

    Source: Fieller, J. R. Stat. Soc. B 16 (1954).

    Example:
        >>> paired_ratio([1.0, 3.0], [2.0, 6.0]).ratio
        0.5
    """
    a, b = (np.asarray(v, dtype=np.float64) for v in (numerators, denominators))
    if len(a) != len(b):
        raise ValueError(f"{len(a)} numerators and {len(b)} denominators: must be as many")
    n = len(a)
    if not n or not (np.isfinite(a).all() and np.isfinite(b).all()) or not b.mean():
        return Ratio(n, math.nan, math.nan, math.nan)
    over, under = float(a.mean()), float(b.mean())
    if n < 2:
        return Ratio(n, over / under, math.nan, math.nan)
    from scipy import stats

    t = float(stats.t.ppf((1 + level) / 2, n - 1))
    (aa, ab), (_, bb) = (np.cov(a, b) * t * t / n).tolist()
    # r^2 (under^2 - bb) - 2 r (over under - ab) + (over^2 - aa) <= 0
    square, half = under * under - bb, over * under - ab
    root = half * half - square * (over * over - aa)
    if square <= 0:
        return Ratio(n, over / under, math.nan, math.nan)
    width = math.sqrt(max(root, 0.0))
    return Ratio(n, over / under, (half - width) / square, (half + width) / square)


def sign_flip(differences: Sequence[float], *, seed: int = 0) -> float:
    """Return the p-value of the two-sided sign-flip test of a mean of zero.

    It asks how often a mean as far from zero comes of differences whose signs are tossed, which
    needs no normal law. With n pairs it is never below 2 / 2^n: five seeds give 0.0625 at best.

    Args:
        differences: One per pair. Up to `EXACT` all 2^n flips are counted, beyond that drawn.
        seed: Of the flips that are drawn.

    Returns:
        The p-value; nan without differences, and where one is not finite.

    Example:
        >>> sign_flip([1.0, 2.0, 3.0])
        0.25
    """
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    if not count or not np.isfinite(values).all():
        return math.nan
    # flips that give the same mean up to rounding count as the same
    bound = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    if count <= EXACT:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float((np.abs((1 - 2 * bits) @ values) >= bound).mean())
    tossed = np.random.default_rng(seed).integers(2, size=(_DRAWN, count))
    as_far = int((np.abs((1 - 2 * tossed) @ values) >= bound).sum())
    return (1 + as_far) / (1 + _DRAWN)  # the flip that was observed counts, too


def median(values: Sequence[float]) -> float:
    """Return the median, in which an infinity stands for what was not reached.

    Example:
        >>> median([3.0, math.inf, 1.0]), median([2.0, math.inf])
        (3.0, inf)
    """
    ordered = sorted(values)
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
