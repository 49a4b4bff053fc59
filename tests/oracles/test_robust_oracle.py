"""The kernels of unit_mean, coordinate_median and multi_krum against oracles and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.coordinate_median import coordinate_median
from strategies.multi_krum import multi_krum
from strategies.unit_mean import unit_mean
from tests.oracles import robust_oracle as oracle


def krum(updates):
    return multi_krum(updates, num_byzantine=1)


RULES = {
    "unit_mean": (unit_mean, oracle.unit_mean),
    "coordinate_median": (coordinate_median, oracle.coordinate_median),
    "multi_krum": (krum, lambda updates: oracle.multi_krum(updates, 1)),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def random_updates(clients=7, dim=9, seed=0, dtype=torch.float64):
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.normal(size=(clients, dim))).to(dtype)


def assert_near(found, expected, tolerance=1e-14):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


# --- all of them ----------------------------------------------------------------------------------


@each_rule
@given(seed=st.integers(0, 2**32), clients=st.integers(5, 12), single=st.booleans())
def test_random_updates_give_the_oracles_aggregate(rule, seed, clients, single):
    kernel, expected = RULES[rule]
    dtype, tolerance = (torch.float32, 1e-6) if single else (torch.float64, 1e-14)
    updates = random_updates(clients, seed=seed, dtype=dtype)
    found = kernel(updates)
    assert found.dtype == dtype
    assert_near(found, expected(updates.numpy()), tolerance)


@each_rule
def test_more_columns_than_fit_one_block_make_no_difference(rule):
    kernel, expected = RULES[rule]
    updates = random_updates(6, dim=70_001)
    assert_near(kernel(updates), expected(updates.numpy()))


@each_rule
@given(seed=st.integers(0, 2**32), order=st.permutations(range(7)))
def test_the_order_of_clients_does_not_matter(rule, seed, order):
    kernel, _ = RULES[rule]
    updates = random_updates(seed=seed)
    assert_near(kernel(updates[order]), kernel(updates), 1e-14)


@pytest.mark.parametrize("rule", ["coordinate_median", "multi_krum"])
@given(seed=st.integers(0, 2**32))
def test_moving_all_updates_moves_the_aggregate(rule, seed):
    kernel, _ = RULES[rule]
    updates, shift = random_updates(seed=seed), random_updates(1, seed=seed + 1)
    assert_near(kernel(updates + shift), kernel(updates) + shift[0], 1e-13)


@each_rule
@given(seed=st.integers(0, 2**32), power=st.floats(-3, 150))
def test_one_client_moves_the_aggregate_by_a_bounded_amount(rule, seed, power):
    """By what the honest ones spread over, whatever it sends."""
    kernel, _ = RULES[rule]
    updates = random_updates(seed=seed)
    attacked = updates.clone()
    attacked[3] = random_updates(1, seed=seed + 1)[0] * 10**power
    assert (kernel(attacked) - kernel(updates)).norm() <= 2 * updates.norm(dim=1).max()


@each_rule
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_dropped(rule, value):
    kernel, _ = RULES[rule]
    updates = random_updates()
    broken = torch.cat([updates[:2], torch.full((1, 9), value).double(), updates[2:]])
    assert torch.equal(kernel(broken), kernel(updates))


@each_rule
@pytest.mark.parametrize("updates", [torch.zeros(0, 3), torch.full((2, 3), math.nan)])
def test_no_row_gives_zero(rule, updates):
    assert RULES[rule][0](updates).tolist() == [0, 0, 0]


@each_rule
def test_the_kernel_leaves_its_input_alone(rule):
    updates = random_updates()
    copy = updates.clone()
    RULES[rule][0](updates)
    assert torch.equal(updates, copy)


@pytest.mark.gpu
@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_gives_the_same(rule, dtype):
    kernel, _ = RULES[rule]
    updates = random_updates(dtype=dtype)
    found = kernel(updates.cuda())
    assert found.device.type == "cuda"
    assert_near(found.cpu(), kernel(updates), {torch.float64: 1e-13, torch.float32: 1e-6}[dtype])


# --- each by hand ---------------------------------------------------------------------------------


def test_unit_mean_counts_every_direction_alike():
    updates = torch.tensor([[3, 4], [0, 1e-9], [0, 0], [-5e8, 0]], dtype=torch.float64)
    assert_near(unit_mean(updates), [(0.6 - 1) / 4, (0.8 + 1) / 4])


@pytest.mark.parametrize(
    ("column", "expected"),
    [([7], 7), ([1, 4], 2.5), ([9, 1, 5], 5), ([100, 0, 2, 1], 1.5), ([-1, -1, 8, 9], 3.5)],
)
def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two(column, expected):
    updates = torch.tensor(column, dtype=torch.float32)[:, None]
    assert coordinate_median(updates).tolist() == [expected]


def test_the_median_of_large_floats_does_not_overflow():
    updates = torch.tensor([[3e38], [3.2e38]])
    assert coordinate_median(updates).item() == pytest.approx(3.1e38, rel=1e-6)


# The squared distances of 0, 1, 3, 4, 20 to the two nearest others add up to
# 1 + 9, 1 + 4, 1 + 4, 1 + 9 and 256 + 289.
LINE = torch.tensor([[0.0], [1.0], [3.0], [4.0], [20.0]], dtype=torch.float64)


def test_the_scores_by_hand():
    assert oracle.krum_scores(LINE.numpy(), 1) == [10, 5, 5, 10, 545]


@pytest.mark.parametrize(
    ("num_selected", "expected"), [(None, 2), (1, 3), (2, 2), (3, 8 / 3), (4, 2), (5, 5.6)]
)
def test_the_best_scores_are_averaged_and_equal_ones_go_by_further_neighbours(
    num_selected, expected
):
    """1 and 3 tie with two neighbours and with three; with all of them 3 is nearer to 20."""
    found = multi_krum(LINE, num_byzantine=1, num_selected=num_selected)
    assert found.item() == pytest.approx(expected, abs=1e-15)


@given(
    seed=st.integers(0, 2**32),
    clients=st.integers(7, 12),
    num_byzantine=st.integers(0, 2),
    num_selected=st.integers(1, 7),
)
def test_every_f_and_m_give_the_oracles_krum(seed, clients, num_byzantine, num_selected):
    updates = random_updates(clients, seed=seed)
    found = multi_krum(updates, num_byzantine=num_byzantine, num_selected=num_selected)
    assert_near(found, oracle.multi_krum(updates.numpy(), num_byzantine, num_selected))


@pytest.mark.parametrize("clients", [1, 2, 3, 8])
def test_without_byzantine_clients_krum_of_all_is_the_mean(clients):
    updates = random_updates(clients)
    assert_near(multi_krum(updates, num_byzantine=0), updates.mean(dim=0))


def test_distances_of_long_updates_close_together_are_exact():
    """A Gram matrix has a rounding error of about 1 here and could not tell them apart."""
    updates = 1e8 + LINE
    assert multi_krum(updates, num_byzantine=1, num_selected=1).item() == 1e8 + 3


def test_a_difference_beyond_the_largest_float_only_excludes_its_row():
    updates = torch.cat([LINE[:4], torch.tensor([[1e308], [-1e308]]).double(), LINE[:4] + 5])
    assert_near(multi_krum(updates, num_byzantine=2), (updates[:4].sum() + updates[6:].sum()) / 8)


@pytest.mark.parametrize(
    ("clients", "arguments", "words"),
    [
        (4, {"num_byzantine": 1}, r"num_byzantine = 1 with 4 updates.* = 5; use at most 0"),
        (8, {"num_byzantine": 3}, r"num_byzantine = 3 with 8 updates.* = 9; use at most 2"),
        (5, {"num_byzantine": 1, "num_selected": 6}, r"num_selected = 6: must be in 1..5"),
        (5, {"num_byzantine": 1, "num_selected": 0}, r"num_selected = 0: must be in 1..5"),
        (5, {"num_byzantine": -1}, r"num_byzantine = -1: must be >= 0"),
    ],
)
def test_too_few_updates_are_refused(clients, arguments, words):
    with pytest.raises(ValueError, match=words):
        multi_krum(random_updates(clients), **arguments)


def test_only_finite_updates_count():
    updates = random_updates(5)
    updates[0, 0] = math.nan
    with pytest.raises(ValueError, match="num_byzantine = 1 with 4 updates"):
        multi_krum(updates, num_byzantine=1)
