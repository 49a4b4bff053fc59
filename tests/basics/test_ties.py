"""Ranks with ties, shares of places, and what exceeds what."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics.ties import exceeds, ranks, shares, whole


def test_what_is_within_both_slacks_is_equal_and_what_is_not_is_not():
    assert ranks([([0.0, 2.0, 5.0], [1.0, 1.0, 1.0])]).tolist() == [0, 0, 1]
    assert ranks([([0.0, 2.1, 5.0], [1.0, 1.0, 1.0])]).tolist() == [0, 1, 2]
    assert ranks([([3.0, 1.0, 2.0], 0)]).tolist() == [2, 0, 1]


def test_equality_goes_from_one_to_the_next():
    """Else who is equal to whom would hang on who is asked first."""
    for order in itertools.permutations(range(3)):
        values = np.array([0.0, 1.0, 2.0])[list(order)]
        assert ranks([(values, 0.5)]).tolist() == [0, 0, 0]


def test_equals_go_by_the_next_key_which_only_they_are_asked_for():
    asked = []

    def keys(last):
        yield [1.0, 0.0, 1.0, 0.0], 0
        asked.append("second")
        yield [5.0, 7.0, 4.0, last], 0
        asked.append("third")
        yield [0.0, 2.0, 0.0, 1.0], 0

    assert ranks(keys(6.0)).tolist() == [3, 1, 2, 0]
    assert asked == ["second"]
    assert ranks(keys(7.0)).tolist() == [3, 1, 2, 0]
    assert asked == ["second", "second", "third"]


def test_every_row_is_ordered_by_itself():
    values = np.array([[2.0, 1.0, 1.0], [0.0, 5.0, 9.0]])
    found = ranks([(values, np.zeros((2, 3)))])
    assert found.tolist() == [[1, 0, 0], [0, 1, 2]]
    assert shares(found, 0, 1).tolist() == [[0, 0.5, 0.5], [1, 0, 0]]


def test_infinities_are_equal_and_beyond_all_others():
    values = [math.inf, 3.0, math.inf, -math.inf]
    assert ranks([(values, [math.inf, 0.0, math.nan, 0.0])]).tolist() == [2, 1, 2, 0]


@given(
    ties=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    first=st.integers(0, 8),
    count=st.integers(0, 8),
)
def test_shares_are_the_mean_over_all_orders_of_equals(ties, first, count):
    order = np.unique(ties, return_inverse=True)[1]
    last = min(len(ties), first + count)
    found = shares(order, first, last)
    assert found.sum() == pytest.approx(max(0, last - first))
    for rank in set(order.tolist()):
        members = np.flatnonzero(order == rank)
        begin = int((order < rank).sum())
        inside = sum(first <= place < last for place in range(begin, begin + len(members)))
        assert found[members].tolist() == [inside / len(members)] * len(members)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (0.1 + 0.2, 0.3, False),
        (0.3, 0.1 + 0.2, False),
        (1.0 + 1e-9, 1.0, True),
        (-1.0, -1.0 - 1e-9, True),
        (0.0, -1e-300, True),
        (math.inf, 1.0, True),
        (1.0, -math.inf, True),
        (1.0, math.inf, False),
        (-math.inf, -math.inf, False),
        (math.nan, 1.0, False),
    ],
)
def test_what_exceeds_is_larger_by_more_than_rounding(one, other, expected):
    assert exceeds(one, other) is expected


def test_many_numbers_are_compared_at_once():
    assert exceeds(np.array([0.1 + 0.2, 0.4]), 0.3).tolist() == [False, True]


def test_what_is_below_a_whole_number_by_rounding_is_whole():
    tenths = np.cumsum(np.full(10, 0.1)) * 100  # among them 79.99999999999999
    assert whole(tenths).tolist() == list(range(10, 101, 10))
    assert whole([0.0, 0.999, 1e6 - 1e-3]).tolist() == [0, 0, 999_999]
