"""The Flag Aggregator's kernel against the n-dimensional oracle and every number of its spec."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.flag import flag_aggregate
from strategies.unit_mean import unit_mean
from tests.oracles import flag_oracle as oracle

COS, SIN = math.cos(math.radians(30)), math.sin(math.radians(30))
AT_30_DEGREES = torch.tensor([[1.0, 0.0], [1.0, 0.0], [COS, SIN]], dtype=torch.float64)
OPTIONS = [
    {},
    {"subspace_dim": 1},
    {"subspace_dim": 2, "iterations": 1},
    {"subspace_dim": 3, "iterations": 30},
    {"subspace_dim": 3, "tolerance": 0.05},
    {"subspace_dim": 100},
    {"pair_weight": 0.5},
    {"pair_weight": 8.0, "subspace_dim": 2},
]


def gradients(workers=7, dim=50, seed=0, dtype=torch.float64):
    draw = np.random.default_rng(seed)
    common = draw.normal(size=dim)
    lengths = 10 ** draw.uniform(-3, 3, size=(workers, 1))
    return torch.from_numpy((draw.normal(size=(workers, dim)) + common) * lengths).to(dtype)


def angle(direction):
    """Degrees in [0, 180): a subspace has no sign."""
    return math.degrees(math.atan2(direction[1], direction[0])) % 180


def assert_near(found, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


# --- against the oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gram_form_equals_the_tall_svd(options, dtype, tolerance):
    for workers in (1, 2, 5, 15):
        rows = gradients(workers, dim=40, seed=workers, dtype=dtype)
        found = flag_aggregate(rows, **options)
        assert found.dtype == dtype
        assert_near(found, oracle.flag(rows.numpy(), **options), tolerance)


@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 9),
    dim=st.integers(1, 12),
    options=st.sampled_from(OPTIONS),
)
def test_random_gradients_give_the_oracles_aggregate(seed, workers, dim, options):
    rows = gradients(workers, dim, seed)
    assert_near(flag_aggregate(rows, **options), oracle.flag(rows.numpy(), **options), 1e-9)


def test_more_columns_than_fit_one_block_make_no_difference():
    rows = gradients(4, dim=150_001)
    assert_near(flag_aggregate(rows), oracle.flag(rows.numpy()))


def test_the_kernel_leaves_its_input_alone():
    rows = gradients()
    copy = rows.clone()
    flag_aggregate(rows, pair_weight=1.0)
    assert torch.equal(rows, copy)


# --- section (e) of the spec ----------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32),
    powers=st.lists(st.floats(-12, 12), min_size=7, max_size=7),
    order=st.permutations(range(7)),
    pair_weight=st.sampled_from([0.0, 0.7]),
)
def test_1_neither_lengths_nor_the_order_of_workers_matter(seed, powers, order, pair_weight):
    rows = gradients(seed=seed)
    lengths = 10 ** torch.tensor(powers, dtype=torch.float64)
    changed = (rows * lengths[:, None])[order]
    options = {"subspace_dim": 3, "pair_weight": pair_weight}
    assert_near(flag_aggregate(changed, **options), flag_aggregate(rows, **options), 1e-11)


@given(seed=st.integers(0, 2**32))
def test_2_turning_the_gradients_turns_the_aggregate(seed):
    rows = gradients(dim=12, seed=seed)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(12, 12)))
    turn = torch.from_numpy(turn)
    turned = flag_aggregate(rows @ turn.T, subspace_dim=3)
    assert_near(turned, turn @ flag_aggregate(rows, subspace_dim=3), 1e-11)


@given(seed=st.integers(0, 2**32), subspace_dim=st.integers(1, 8))
def test_3_the_aggregate_is_at_most_one_long(seed, subspace_dim):
    assert flag_aggregate(gradients(seed=seed), subspace_dim=subspace_dim).norm() < 1


def test_3_the_aggregate_is_one_long_when_all_directions_agree():
    rows = torch.tensor([[3.0, 4.0]], dtype=torch.float64) * torch.tensor([[1.0], [7.0], [1e-3]])
    assert_near(flag_aggregate(rows, subspace_dim=1), [0.6, 0.8])


@pytest.mark.parametrize("iterations", [1, 2, 5, 20])
@pytest.mark.parametrize(("workers", "dim"), [(7, 50), (7, 4), (3, 1)])
def test_4_a_subspace_that_holds_everything_gives_the_mean_of_unit_gradients(
    workers, dim, iterations
):
    rows = gradients(workers, dim)
    for subspace_dim in (min(workers, dim), workers, 10**6):
        found = flag_aggregate(rows, subspace_dim=subspace_dim, iterations=iterations)
        assert_near(found, unit_mean(rows), 1e-15)
        assert_near(found, oracle.unit_columns(rows).mean(axis=1), 1e-15)


def test_5_one_pass_is_the_principal_subspace_of_the_unit_gradients():
    rows = gradients()
    unit = oracle.unit_columns(rows)
    principal = np.linalg.svd(unit)[0][:, :3]
    expected = principal @ principal.T @ unit.mean(axis=1)
    assert_near(flag_aggregate(rows, subspace_dim=3, iterations=1), expected, 1e-14)


def test_6_gram_and_tall_form_differ_by_rounding_only():
    rows = gradients(7, 50)
    for iterations in range(1, 6):
        options = {"subspace_dim": 3, "iterations": iterations}
        assert_near(flag_aggregate(rows, **options), oracle.flag(rows, **options), 1e-14)


@pytest.mark.parametrize("pair_weight", [0.0, 1.0])
def test_7_no_pass_raises_the_objective(pair_weight):
    """The smoothed objective, which the passes minimise; the kernel is at the oracle's iterates."""
    rows = gradients(9, 20)
    unit = oracle.unit_columns(rows)
    reached = []
    for iterations in range(1, 16):
        options = {"iterations": iterations, "tolerance": 0.0, "pair_weight": pair_weight}
        basis = oracle.subspace(unit, 3, **options)
        reached.append(oracle.objective(basis, unit, pair_weight, smoothing=oracle.EPSILON))
        projected = basis @ basis.T @ unit.mean(axis=1)
        assert_near(flag_aggregate(rows, subspace_dim=3, **options), projected, 1e-10)
    assert all(later <= sooner + 1e-12 for sooner, later in itertools.pairwise(reached))
    assert reached[-1] < reached[0] - 0.01


@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 10, 1e6)])
def test_8_a_huge_outlier_has_no_more_effect_than_a_short_one(lengths, iterations):
    rows = torch.tensor([[1, 0], [1, 0], [0, 1]]).double() * torch.tensor(lengths)[:, None]
    one, two = (flag_aggregate(rows, subspace_dim=m, iterations=iterations) for m in (1, 2))
    assert_near(one, [2 / 3, 0])
    assert_near(two, [2 / 3, 1 / 3])


def test_9_the_median_is_nearer_to_the_majority_than_the_mean():
    after = {
        k: flag_aggregate(AT_30_DEGREES, subspace_dim=1, iterations=k, tolerance=0.0)
        for k in (1, 2, 3, 5, 10)
    }
    angles = [angle(direction) for direction in after.values()]
    assert angles == pytest.approx([9.5533, 5.2096, 2.5416, 0.5172, 0.0118], abs=5e-5)
    closed_form = 0.5 * math.degrees(math.atan2(math.sin(math.radians(60)), 2 + 0.5))
    assert angles[0] == pytest.approx(closed_form, abs=1e-12)
    assert after[1].tolist() == pytest.approx([0.956305, 0.160945], abs=5e-7)
    assert after[10].tolist() == pytest.approx([0.9554, 0.0002], abs=5e-5)
    unit = oracle.unit_columns(AT_30_DEGREES)
    reached = [
        oracle.objective((direction / direction.norm()).numpy()[:, None], unit)
        for direction in after.values()
    ]
    assert reached[0] == pytest.approx(0.6813, abs=5e-5)
    assert reached[-1] == pytest.approx(0.5, abs=5e-4)


def test_10_a_flipped_sign_is_not_seen_by_the_subspace():
    draw = np.random.default_rng(3).normal(size=20)
    u = torch.from_numpy(draw / np.linalg.norm(draw))
    rows = torch.stack([u] * 12 + [-10 * u] * 3)
    assert_near(flag_aggregate(rows), 0.6 * u)
    assert_near(rows.mean(dim=0), -1.2 * u)


def test_11_three_dimensions_by_hand():
    rows = torch.tensor([[1, 0, 0], [1, 0.1, 0], [1, -0.1, 0], [0, 0, 1]], dtype=torch.float64)
    assert_near(flag_aggregate(rows, subspace_dim=1), [0.747519, 0, 0], 5e-7)
    assert_near(flag_aggregate(rows, subspace_dim=2), [0.747519, 0, 0.25], 5e-7)


@pytest.mark.parametrize(
    ("pair_weight", "one_pass", "forty_passes"),
    [
        (0.0, 9.5533, 0.0087),
        (0.5, 6.3132, 0.0058),
        (1.0, 175.052, 0.0032),
        (2.0, 114.8145, 105.001),
        (10.0, 105.8229, 105.000),
    ],
)
def test_12_a_large_pair_weight_turns_the_subspace_to_the_difference(
    pair_weight, one_pass, forty_passes
):
    options = {"subspace_dim": 1, "pair_weight": pair_weight}
    one, forty = (
        flag_aggregate(AT_30_DEGREES, iterations=k, tolerance=0.0, **options) for k in (1, 40)
    )
    assert angle(one) == pytest.approx(one_pass, abs=5e-4)
    assert angle(forty) == pytest.approx(forty_passes, abs=5e-4)


@pytest.mark.parametrize("pair_weight", [0.0, 1.0, 1.241, 2.0])
def test_12_the_objective_of_both_directions_is_the_specs(pair_weight):
    unit = oracle.unit_columns(AT_30_DEGREES)

    def at(degrees):
        turn = math.radians(degrees)
        basis = np.array([[math.cos(turn)], [math.sin(turn)]])
        return oracle.objective(basis, unit, pair_weight)

    assert at(0) == pytest.approx(0.5 + 1.9319 * pair_weight, abs=1e-4)
    assert at(105) == pytest.approx(2.8978, abs=5e-5)
    assert (at(0) < at(105)) == (pair_weight < 1.2412)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_13_a_worker_that_is_not_finite_is_dropped(value):
    rows = gradients()
    broken = torch.cat([rows[:3], torch.full((1, 50), 1.0).double(), rows[3:]])
    broken[3, 7] = value
    assert torch.equal(flag_aggregate(broken), flag_aggregate(rows))


def test_13_a_zero_worker_counts_among_the_workers_alone():
    rows = gradients()
    more = torch.cat([rows, torch.zeros(1, 50).double()])
    options = {"subspace_dim": 3}
    assert_near(flag_aggregate(more, **options), 7 / 8 * flag_aggregate(rows, **options))


# --- edge cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pair_weight", [0.0, 2.0])
@pytest.mark.parametrize(
    "rows",
    [torch.zeros(0, 3), torch.zeros(1, 3), torch.zeros(4, 3), torch.full((2, 3), math.nan)],
    ids=["nobody", "one zero", "all zero", "none finite"],
)
def test_nothing_to_aggregate_gives_zero(rows, pair_weight):
    assert flag_aggregate(rows, pair_weight=pair_weight).tolist() == [0, 0, 0]


@pytest.mark.parametrize("pair_weight", [0.0, 2.0])
def test_a_lone_worker_gives_its_unit_gradient(pair_weight):
    rows = torch.tensor([[0.0, 30.0, -40.0]], dtype=torch.float64)
    assert_near(flag_aggregate(rows, pair_weight=pair_weight), [0, 0.6, -0.8])


def test_coincident_pairs_are_skipped():
    rows = gradients(3)
    doubled = torch.cat([rows, 5 * rows[:1], torch.zeros(1, 50).double()])
    options = {"subspace_dim": 2, "pair_weight": 1.5}
    assert_near(flag_aggregate(doubled, **options), oracle.flag(doubled, **options), 1e-11)
    same = rows[:1].expand(4, -1)
    assert_near(flag_aggregate(same, **options), unit_mean(rows[:1]))


@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float64, (1e300, 1e200, 1e-200, 1e-310)),
        (torch.float32, (1e36, 1e25, 1e-25, 1e-36)),
    ],
)
def test_no_length_overflows_or_vanishes(dtype, factors):
    rows = gradients(4, dtype=dtype)
    rows = rows / rows.norm(dim=1, keepdim=True)
    stretched = rows * torch.tensor(factors, dtype=dtype)[:, None]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-6}[dtype]
    for aggregate in (flag_aggregate, unit_mean):
        assert_near(aggregate(stretched), aggregate(rows), tolerance)
    assert_near(flag_aggregate(rows, pair_weight=1.0), oracle.flag(rows, pair_weight=1.0), 1e-6)


def test_the_best_iterate_is_kept_when_a_pass_does_not_improve():
    """Converged, so that further passes move nothing; and a large tolerance stops at once."""
    rows = gradients(9, 20)
    long, longer = (flag_aggregate(rows, subspace_dim=3, iterations=k) for k in (300, 600))
    assert torch.equal(long, longer)
    one, stopped = (
        flag_aggregate(rows, subspace_dim=3, iterations=1),
        flag_aggregate(rows, subspace_dim=3, iterations=2, tolerance=1e3),
    )
    assert not torch.equal(one, stopped)  # the second pass is better, though not by 1000
    assert torch.equal(stopped, flag_aggregate(rows, subspace_dim=3, iterations=9, tolerance=1e3))


def test_a_pass_that_makes_it_worse_is_not_kept():
    """The first pass lies on a kink of the objective, which the smoothed passes then round off."""
    tilt = math.radians(10)
    other = -0.5 * math.asin(0.5 * math.sin(2 * tilt))  # two of them balance the principal axis
    at = torch.tensor([0, 0, tilt, other, other], dtype=torch.float64)
    rows = torch.stack([at.cos(), at.sin()], dim=1)
    unit = oracle.unit_columns(rows)
    first, second = np.array([[1.0], [0.0]]), np.array([[math.cos(1.6e-4)], [math.sin(1.6e-4)]])
    for turn in (1, -1):
        moved = second * [[1], [turn]]
        assert oracle.objective(moved, unit) > oracle.objective(first, unit) + 1e-5
    for iterations in (1, 2, 5):
        found = flag_aggregate(rows, subspace_dim=1, iterations=iterations)
        assert_near(found, [at.cos().mean(), 0], 1e-9)
        assert_near(found, oracle.flag(rows, subspace_dim=1, iterations=iterations), 1e-9)


@pytest.mark.parametrize(
    ("name", "value"), [("iterations", 0), ("subspace_dim", 0), ("pair_weight", -1.0)]
)
def test_the_kernel_refuses_what_is_below_its_bound(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value}: must be >= "):
        flag_aggregate(gradients(), **{name: value})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_gives_the_same(dtype):
    rows = gradients(dtype=dtype)
    found = flag_aggregate(rows.cuda(), pair_weight=0.5)
    assert found.device.type == "cuda"
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-6}[dtype]
    assert_near(found.cpu(), flag_aggregate(rows, pair_weight=0.5), tolerance)
