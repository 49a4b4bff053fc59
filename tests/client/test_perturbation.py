"""PGD and FGSM: closed forms on linear models, balls and boxes that hold, units."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.client.perturbation import Ball, Units, fgsm, pgd, starts, worst

NORMS = ("inf", "2")
N, D = 6, 5


def linear(seed=0):
    """Samples, classes in {-1, 1}, weights; and what looks at samples by the logistic loss."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=draw, dtype=torch.float64)
    w = torch.randn(D, generator=draw, dtype=torch.float64)
    y = torch.tensor([1.0, -1.0] * (N // 2), dtype=torch.float64)

    def look(points):
        margin = y * (points @ w)
        return torch.nn.functional.softplus(-margin), -(y * torch.sigmoid(-margin))[:, None] * w

    return x, y, w, look


def farthest(x, y, w, radius, norm):
    """x - rho y sign(w), or x - rho y w / |w|."""
    way = w.sign() if norm == "inf" else w / w.norm()
    return x - radius * y[:, None] * way


def lengths(change, norm):
    return change.abs().amax(1) if norm == "inf" else change.norm(dim=1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("radius", "step"), [(0.4, 0.1), (0.35, 0.1), (1.0, 1.0), (0.2, 0.7)])
def test_on_a_linear_model_pgd_is_at_the_farthest_point_after_so_many_steps(norm, radius, step):
    x, y, w, look = linear()
    needed = math.ceil(radius / step - 1e-9)
    expected = farthest(x, y, w, radius, norm)
    ball = Ball(norm, radius)
    for steps in (needed, needed + 3):
        moved = pgd(x, look, ball, step=step, steps=steps)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    before = pgd(x, look, ball, step=step, steps=needed - 1)
    torch.testing.assert_close(
        before, farthest(x, y, w, step * (needed - 1), norm), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(fgsm(x, look, ball), expected, rtol=0, atol=1e-12)
    # from any point of the ball the longest way is twice the radius, under "inf" along each axis
    start = torch.from_numpy(starts(np.random.default_rng(0), N, (D,), norm)).double()
    if norm == "inf":
        options = {"step": step, "steps": math.ceil(2 * radius / step), "start": start}
        torch.testing.assert_close(pgd(x, look, ball, **options), expected, rtol=0, atol=1e-12)


@given(
    st.sampled_from(NORMS), st.floats(0, 3), st.floats(1e-3, 2), st.integers(0, 6),
    st.integers(0, 99), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_samples_stay_in_ball_and_box_and_no_loss_falls_below_the_samples(
    norm, radius, step, steps, seed, boxed, scaled, begun
):
    x, _, _, look = linear(seed)
    box = (-0.5, 1.5) if boxed else None
    units = None
    raw = x
    if scaled:
        units = Units(torch.linspace(-1, 1, D).double(), torch.linspace(0.1, 4, D).double())
        raw = units.mean + units.deviation * x
    start = torch.from_numpy(starts(np.random.default_rng(seed), N, (D,), norm)) if begun else None
    ball = Ball(norm, radius, box, units)
    for search in (pgd, worst):
        moved = search(x, look, ball, step=step, steps=steps, start=start)
        there = moved if units is None else units.mean + units.deviation * moved
        assert bool((lengths(there - raw, norm) <= radius * (1 + 1e-6) + 1e-12).all())
        if boxed:
            inside = (raw >= box[0]) & (raw <= box[1])
            assert bool(((there >= box[0] - 1e-9) & (there <= box[1] + 1e-9))[inside].all())
            # what lies outside is moved no further out
            assert bool((there >= raw.clamp(max=box[0]) - 1e-9).all())
            assert bool((there <= raw.clamp(min=box[1]) + 1e-9).all())
        if search is worst or start is None:
            assert bool((look(moved)[0] >= look(x)[0] - 1e-12).all())


@pytest.mark.parametrize("norm", NORMS)
def test_in_standardised_features_the_ball_is_that_of_the_raw_ones(norm):
    x, y, w, _ = linear()
    units = Units(torch.arange(D).double(), torch.tensor([0.1, 1.0, 2.0, 5.0, 10.0]).double())
    raw = units.mean + units.deviation * x

    def look(points):  # the loss of the raw features
        margin = y * ((units.mean + units.deviation * points) @ w)
        return (
            torch.nn.functional.softplus(-margin),
            -(y * torch.sigmoid(-margin))[:, None] * w * units.deviation,
        )

    moved = pgd(x, look, Ball(norm, 0.3, units=units), step=0.1, steps=4)
    found = units.mean + units.deviation * moved
    torch.testing.assert_close(found, farthest(raw, y, w, 0.3, norm), rtol=0, atol=1e-12)


def test_several_clients_samples_are_moved_as_each_ones():
    x, _, _, look = linear()
    both = torch.stack([x, x.flip(0)])

    def looks(points):
        found = [look(points[0]), look(points[1])]
        return tuple(torch.stack(each) for each in zip(*found, strict=True))

    for norm in NORMS:
        together = pgd(both, looks, Ball(norm, 0.3), step=0.1, steps=2, lead=2)
        for client in range(2):
            alone = pgd(both[client], look, Ball(norm, 0.3), step=0.1, steps=2)
            torch.testing.assert_close(together[client], alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_slope_that_is_0_but_for_rounding_moves_nothing(norm, dtype):
    tiny = torch.finfo(dtype).eps
    ways = Ball(norm, 1.0).ascent(torch.tensor([[1.0, -tiny, 0.0], [0.0, 0.0, 0.0]], dtype=dtype))
    assert ways.tolist()[1] == [0.0, 0.0, 0.0]
    assert ways[0, 0] == 1
    assert abs(float(ways[0, 1])) <= (0 if norm == "inf" else tiny)
    # one that is small as a whole is no rounding
    small = torch.tensor([[1e-30, -1e-30]], dtype=dtype)
    assert Ball("inf", 1.0).ascent(small).tolist() == [[1.0, -1.0]]
    assert float(Ball("2", 1.0).ascent(small).norm()) == pytest.approx(1, abs=1e-6)


def test_no_radius_and_no_step_leave_samples_as_they_are():
    x, _, _, look = linear()
    for norm in NORMS:
        assert torch.equal(pgd(x, look, Ball(norm, 0.0), step=0.1, steps=3), x)
        assert torch.equal(pgd(x, look, Ball(norm, 0.3), step=0.1, steps=0), x)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_uniform_in_the_ball(norm):
    drawn = starts(np.random.default_rng(1), 4000, (2, 1), norm).astype(np.float64)
    assert drawn.shape == (4000, 2, 1)
    flat = drawn.reshape(4000, 2)
    length = np.abs(flat).max(1) if norm == "inf" else np.linalg.norm(flat, axis=1)
    assert length.max() <= 1 + 1e-6
    # in two dimensions a quarter of them is within half of the radius: 5 standard deviations
    assert abs((length < 0.5).mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert (np.abs(flat.mean(0)) < 5 / math.sqrt(4000)).all()


def test_the_worst_point_is_no_better_with_more_steps_or_a_point_that_is_known():
    """A loss of many hills, on which a long step often leads down."""
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]

    def look(points):
        return (7 * points).sin().sum(1), 7 * (7 * points).cos()

    def height(points):
        return look(points)[0]

    ball = Ball("inf", 1.0)
    found = [worst(x, look, ball, step=0.6, steps=s) for s in range(8)]
    for fewer, more in itertools.pairwise(found):
        assert bool((height(more) >= height(fewer)).all())
    last = pgd(x, look, ball, step=0.6, steps=7)
    assert bool((height(last) < height(found[-1]) - 0.1).any())  # the last point is often not it
    wider = worst(x, look, Ball("inf", 1.3), step=0.6, steps=1, known=found[-1])
    assert bool((height(wider) >= height(found[-1])).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "1", "radius": 0.1}, "norm = '1': must be inf or 2"),
        ({"norm": "2", "radius": -0.1}, "radius = -0.1: must be >= 0"),
        ({"norm": "2", "radius": math.inf}, "radius = inf: must be >= 0 and finite"),
        ({"norm": "2", "radius": 0.1, "box": (1.0, 0.0)}, r"box = \(1.0, 0.0\): must be two"),
    ],
)
def test_impossible_balls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ball(**arguments)
