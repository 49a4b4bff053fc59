"""What is odd about a chunk's result, numbers that are none included."""

import math

import pytest
import torch

from fedsim.client.differences import apart, first_odd, largest

ODD = (math.nan, math.inf, -math.inf)


def result(*numbers):
    return {"weight": (torch.tensor([numbers]), 0.0)}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_number_beside_a_number_is_odd_whichever_has_it(odd):
    assert first_odd(result(1.0, odd), result(1.0, 5.0), 1e-3)
    assert first_odd(result(1.0, 5.0), result(1.0, odd), 1e-3)
    assert apart(torch.tensor([odd]), torch.tensor([5.0])) >= 5
    assert apart(torch.tensor([0.0]), torch.tensor([odd])) >= 5


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_number_on_both_sides_is_alike(odd):
    assert first_odd(result(1.0, odd), result(1.0, odd), 1e-3) is None
    assert apart(torch.tensor([odd]), torch.tensor([odd])) == 0


def test_differences_within_a_share_of_the_largest_are_rounding():
    assert first_odd(result(1.0, 2.0), result(1.0, 2.001), 1e-3) is None
    assert "differs in 'weight' by 0.1" in first_odd(result(1.0, 2.0), result(1.0, 2.1), 1e-3)


def test_the_largest_entry_by_size():
    assert largest(torch.tensor([1.0, -3.0])) == 3
    assert largest(torch.tensor([math.nan, -3.0])) == 3
    assert largest(torch.zeros(0)) == 0
