"""Grids that widen, and random points."""

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.studies.cells.variants import Axis
from fedsim.studies.tuning.points import Grid, check, draw, just_beyond, on_edge, widened


def test_a_grid_is_every_combination():
    axes = Axis("a", ("1", "2")), Axis("b", ("x", "y"))
    assert Grid(axes).points == (("1", "x"), ("1", "y"), ("2", "x"), ("2", "y"))


@pytest.mark.parametrize(
    ("values", "value", "after"),
    [
        (("0.1", "1"), "1", ("0.1", "1", "10")),
        (("0.1", "0.3", "1"), "0.1", ("0.033", "0.1", "0.3", "1")),
        (("1", "0.1"), "1", ("0.1", "1", "10")),
        (("2", "4"), "2", ("1", "2", "4")),
        (("1", "2"), "1", ("1", "2")),  # there is no whole number between
        (("0", "0.1", "1"), "1", ("0", "0.1", "1", "10")),
    ],
)
def test_it_widens_by_its_last_step(values, value, after):
    assert widened(Axis("a", values), value).values == after


def test_only_numbers_have_an_edge():
    assert on_edge(Axis("a", ("0.1", "1", "10")), "10")
    assert not on_edge(Axis("a", ("0.1", "1", "10")), "1")
    assert not on_edge(Axis("a", ("sgd", "adam")), "sgd")
    assert not on_edge(Axis("a", ("1",)), "1")
    assert not on_edge(Axis("a", ("0", "0.5")), "0.5")  # no ratio goes on from zero


def test_nothing_lies_below_zero():
    axis = Axis("a", ("0", "0.1", "1"))
    assert [on_edge(axis, value) for value in axis.values] == [False, False, True]


def test_just_beyond_an_edge_is_outside_and_before_the_next_step():
    for values, edge in ((("0.5", "1"), "1"), (("0.5", "1"), "0.5"), (("0", "0.5", "1"), "1")):
        axis = Axis("a", values)
        beyond, next_step = float(just_beyond(axis, edge)), widened(axis, edge).values
        assert min(map(float, next_step)) < beyond < max(map(float, next_step))
        assert abs(beyond - float(edge)) <= 0.001 * float(edge) * (1 + 1e-9)
        assert (beyond > float(edge)) == (edge == "1")
    assert just_beyond(Axis("a", ("1", "2")), "2") == "3"


def test_random_points_are_log_uniform_and_follow_the_seed():
    axes = Axis("lr", ("0.001", "1")), Axis("steps", ("1", "8")), Axis("how", ("x", "y"))
    points = draw(axes, 400, seed=1).points
    assert points == draw(axes, 400, seed=1).points
    assert points != draw(axes, 400, seed=2).points
    steps = [float(lr) for lr, _, _ in points]
    assert min(steps) >= 0.001
    assert max(steps) <= 1
    below = sum(lr < 0.001**0.5 for lr in steps) / len(steps)
    assert below == pytest.approx(0.5, abs=0.08)
    assert {n for _, n, _ in points} == {str(n) for n in range(1, 9)}
    assert {how for _, _, how in points} == {"x", "y"}


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ScenarioError, match="a: is there twice"):
        check([Axis("a", ("1",)), Axis("a", ("2",))], random=False)
    with pytest.raises(ScenarioError, match="give two"):
        check([Axis("a", ("1",))], random=True)
    with pytest.raises(ScenarioError, match=r"a=0,1: .* all must be > 0"):
        check([Axis("a", ("0", "1"))], random=True)
    check([Axis("a", ("sgd", "adam"))], random=True)


def test_points_that_come_again_are_drawn_again():
    few = Axis("steps", ("1", "4")), Axis("how", ("x", "y"))
    assert len(set(draw(few, 8, seed=1).points)) == 8  # all there are
    assert len(draw(few, 9, seed=1).points) == 8
    assert draw(few, 3, seed=1).points == draw(few, 8, seed=1).points[:3]
