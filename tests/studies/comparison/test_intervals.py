"""Statistics against scipy's own tests and plain counting."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fedsim.studies.comparison.intervals import (
    EXACT,
    mean_interval,
    median,
    paired,
    paired_ratio,
    sign_flip,
)


def counted(differences):
    """The sign-flip test by writing all flips down."""
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    seen = abs(math.fsum(differences))
    sums = [abs(math.fsum(s * d for s, d in zip(f, differences, strict=True))) for f in flips]
    return sum(s >= seen - 1e-9 for s in sums) / len(flips)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 30])
def test_paired_intervals_are_scipys(count):
    a, b = np.random.default_rng(count).normal(size=(2, count))
    found = paired(a.tolist(), b.tolist())
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.mean == pytest.approx((a - b).mean(), abs=1e-14)
    assert found.above == sum(x > y for x, y in zip(a, b, strict=True))


def test_the_mean_of_one_value_has_no_interval():
    assert mean_interval([0.5])[:2] == (1, 0.5)
    assert all(map(math.isnan, mean_interval([0.5])[2:]))
    assert math.isnan(mean_interval([0.5, math.nan]).mean)
    assert math.isnan(mean_interval([]).mean)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_sign_flips_are_those_that_counting_finds(count):
    differences = np.random.default_rng(count).normal(0.4, 1, size=count).round(2).tolist()
    assert sign_flip(differences) == pytest.approx(counted(differences), abs=1e-12)


def test_ties_count_as_far_as_what_was_seen():
    # rounding must not decide whether a flip is as far: 0.1 + 0.2 is not 0.3
    assert sign_flip([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip([0.0, 0.0]) == 1.0


def test_drawn_flips_agree_with_scipys_permutation_test():
    differences = np.random.default_rng(7).normal(0.5, 1, size=EXACT + 2)
    exact = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flip(differences.tolist()) == pytest.approx(exact, abs=4 * math.sqrt(exact / 1e5))
    assert sign_flip(differences.tolist()) == sign_flip(differences.tolist())


def test_a_median_knows_of_what_was_never_reached():
    assert median([1.0, math.inf, 2.0]) == 2.0
    assert median([1.0, math.inf]) == math.inf
    assert median([2.0, 1.0]) == 1.5
    assert math.isnan(median([]))


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize("count", [3, 5, 10, 30])
def test_at_the_ends_of_a_ratios_interval_the_paired_test_turns(count):
    """Fieller's interval by its definition: r such that the mean of a - r b may be 0."""
    random = np.random.default_rng(count)
    b = random.normal(2.0, 0.3, size=count)
    a = 0.7 * b + random.normal(0, 0.2, size=count)
    found = paired_ratio(a.tolist(), b.tolist())
    assert found.n == count
    assert found.ratio == pytest.approx(a.mean() / b.mean(), rel=1e-14)
    assert found.low < found.ratio < found.high
    for end in (found.low, found.high):
        assert stats.ttest_1samp(a - end * b, 0).pvalue == pytest.approx(0.05, abs=1e-9)


def test_a_ratio_of_equal_pairs_is_certain_and_one_over_noise_has_no_interval():
    found = paired_ratio([1.0, 1.25, 0.75], [2.0, 2.5, 1.5])
    assert found == (3, 0.5, pytest.approx(0.5), pytest.approx(0.5))
    unbounded = paired_ratio([1.0, 1.0, 1.0], [1.0, -1.0, 0.5])
    assert unbounded.ratio == pytest.approx(6.0)
    assert math.isnan(unbounded.low) and math.isnan(unbounded.high)  # noqa: PT018
    assert math.isnan(paired_ratio([1.0], [0.0]).ratio)
    assert math.isnan(paired_ratio([], []).ratio)
    assert paired_ratio([1.0], [2.0])[:2] == (1, 0.5)
    assert math.isnan(paired_ratio([math.nan, 1.0], [1.0, 1.0]).ratio)
    with pytest.raises(ValueError, match="must be as many"):
        paired_ratio([1.0], [1.0, 2.0])
