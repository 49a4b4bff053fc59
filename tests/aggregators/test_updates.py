"""Updates in blocks: inner products, distances, sums, and that no copy of the rows is made."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.aggregators.geometric import unit_mean_of
from fedsim.aggregators.sums import weighted_sum
from fedsim.aggregators.updates import Directions, Updates
from fedsim.messages.admission import finite_rows
from strategies.coordinate_median import coordinate_median
from strategies.fedld import principal_gradient_aggregate
from strategies.flag import flag_aggregate
from strategies.multi_krum import multi_krum
from strategies.unit_mean import unit_mean

SIZES = (1, 3, 70_001)  # of one block and of several


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def exact(rows, reference):
    return rows.double().numpy() - (0 if reference is None else reference.double().numpy())


REFERENCES = {
    "updates": lambda dim: None,
    "one start": lambda dim: draw(dim, seed=1),
    "own starts": lambda dim: draw(6, dim, seed=2),
}
each_reference = pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)


@each_reference
@pytest.mark.parametrize("dim", SIZES)
def test_inner_products_lengths_and_distances_are_those_of_the_differences(dim, reference):
    rows, reference = draw(6, dim), reference(dim)
    updates, plain = Updates.of(rows, reference), exact(rows, reference)
    np.testing.assert_allclose(updates.gram(), plain @ plain.T, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(updates.lengths(), np.linalg.norm(plain, axis=1), rtol=1e-13)
    distances = ((plain[:, None] - plain) ** 2).sum(axis=2)
    np.testing.assert_allclose(updates.squared_distances(), distances, rtol=1e-9)


@each_reference
@pytest.mark.parametrize("dim", SIZES)
def test_a_weighted_sum_has_the_bits_of_one_that_is_added_client_by_client(dim, reference):
    rows, reference = draw(6, dim), reference(dim)
    weights = draw(6, seed=3, dtype=torch.float64)
    total = torch.zeros(dim, dtype=torch.float64)
    for weight, row in zip(weights.tolist(), torch.from_numpy(exact(rows, reference)), strict=True):
        total = total.add(row, alpha=weight)
    assert torch.equal(weighted_sum(weights, rows, reference), total)


def test_a_row_without_weight_is_not_looked_at():
    rows = torch.tensor([[1.0, 2.0], [math.nan, 5.0]])
    assert weighted_sum(torch.tensor([3.0, 0.0]).double(), rows).tolist() == [3.0, 6.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_are_finite_when_all_their_values_are(value):
    rows = draw(5, 9)
    rows[1, 3], rows[4] = value, 3e38  # whose sum is not, either
    assert finite_rows(rows).tolist() == [True, False, True, True, True]


def test_distances_that_rounding_would_swallow_are_taken_from_the_differences():
    rows = 1e9 + draw(4, 300, dtype=torch.float64)
    rows = torch.cat([rows, -rows[:1], rows[:1]])
    plain = rows.numpy()
    distances = ((plain[:, None] - plain) ** 2).sum(axis=2)
    np.testing.assert_allclose(Updates.of(rows).squared_distances(), distances, rtol=1e-13)


@each_reference
def test_distances_are_the_same_both_ways_to_the_bit(reference):
    for dim in (5, 9, 301):
        distances = Updates.of(draw(6, dim, seed=dim), reference(dim)).squared_distances()
        assert torch.equal(distances, distances.T)
        assert not distances.diagonal().any()


@pytest.mark.parametrize("dim", SIZES)
def test_a_sum_that_cancels_has_no_length_however_it_is_rounded(dim):
    row = draw(1, dim, dtype=torch.float64)
    updates = Updates.of(torch.cat([1.7 * row, 0.1 * row, -(1.7 + 0.1) * row]))
    ones = torch.ones(1, 3, dtype=torch.float64)
    assert updates.mixed(ones).lengths().tolist() == [0]
    assert updates.mixed(ones / 3).lengths().tolist() == [0]
    assert Directions.of_updates(updates.mixed(ones)).unit_gram()[1].tolist() == [0]
    assert unit_mean_of(updates.mixed(ones))[0].any().item() is False
    found = updates.mixed(torch.tensor([[1.0, 2.0, 1.0]]).double()).lengths()
    np.testing.assert_allclose(found, 0.1 * updates.rows[0].norm() / 1.7, rtol=1e-13)


def test_what_updates_are_the_sums_of_has_the_lengths_of_all_of_it():
    rows = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [1e200, 0.0]], dtype=torch.float64)
    updates = Updates(rows)
    assert updates.sizes().tolist() == [5, 5, math.inf]
    mixed = updates.mixed(torch.tensor([[1.0, 1.0, 0.0], [0.0, -2.0, 0.0]]).double())
    assert mixed.sizes().tolist() == [10, 10]
    assert mixed.sums().tolist() == [0, 14]


@pytest.mark.parametrize("factor", [1e-310, 1e-200, 1.0, 1e200, 1e305])
def test_directions_have_length_one_however_long_the_updates_are(factor):
    start = torch.full((40,), 3.0, dtype=torch.float64) * factor
    rows = start + draw(3, 40, dtype=torch.float64) * factor
    directions = Directions.of(rows, start)
    gram, factors, lengths = directions.unit_gram()
    np.testing.assert_allclose(gram.diagonal(), np.ones(3), rtol=1e-12)
    np.testing.assert_allclose(factors, directions.factors()[0], rtol=1e-12)
    plain = (rows - start).numpy() / factor
    expected = np.linalg.norm(plain, axis=1) * factor
    np.testing.assert_allclose(lengths, expected, rtol=1e-9)


class Largest(TorchDispatchMode):
    """Remembers how many bytes the largest tensor had that was made meanwhile."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor) and not each._is_view():
                self.nbytes = max(self.nbytes, each.nbytes)
        return found


RULES = {
    "flag": flag_aggregate,
    "fedld": principal_gradient_aggregate,
    "unit_mean": unit_mean,
    "multi_krum": lambda updates: multi_krum(updates, num_byzantine=2),
    "coordinate_median": coordinate_median,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_rule_copies_the_updates(rule):
    clients, dim = 30, 60_000
    updates = draw(clients, dim)
    with Largest() as largest:
        rule(updates)
    # a block in float64, and float64 vectors as long as the model, but nothing of both sizes
    assert 4 * dim <= largest.nbytes <= 8 * clients * 2**13 < updates.nbytes / 3
