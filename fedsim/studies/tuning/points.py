"""Points that are tried: a grid that widens, or a random draw."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.studies.cells.variants import Axis

Point = tuple[str, ...]

_DRAWS = 20  # per point that is asked for, where values come again


@dataclass(frozen=True)
class Grid:
    """Points that every method tries.

    Attributes:
        axes: The keys and their values.
        drawn: Points drawn at random between the values; empty for all combinations of them.
    """

    axes: tuple[Axis, ...]
    drawn: tuple[Point, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys."""
        return tuple(axis.key for axis in self.axes)

    @property
    def points(self) -> tuple[Point, ...]:
        """A value of each key, as a scenario's assignment has it."""
        return self.drawn or tuple(itertools.product(*(axis.values for axis in self.axes)))


def draw(axes: Sequence[Axis], count: int, seed: int) -> Grid:
    """Draw points at random.

    Positive numbers are drawn log-uniformly between the smallest and the largest value given,
    rounded to three digits (to whole numbers where all are whole); of anything else, one of the
    values.

    Args:
        axes: The keys with their values.
        count: So many different points; >= 1. Fewer where there are no more, or hardly any.
        seed: Of the draw.
    """
    random = rng.generator(seed, "random search")
    points: dict[Point, None] = {}
    for _ in range(_DRAWS * count):
        if len(points) == count:
            break
        points[tuple(_one(axis, random.random()) for axis in axes)] = None
    return Grid(tuple(axes), tuple(points))


def _one(axis: Axis, at: float) -> str:
    numbers = as_numbers(axis.values)
    if numbers is None:
        return axis.values[int(at * len(axis.values))]
    low, high = math.log(min(numbers)), math.log(max(numbers))
    return _written(math.exp(low + at * (high - low)), axis.values, digits=3)


def as_numbers(values: Iterable[str]) -> list[float] | None:
    """Return values as positive numbers; None where one is none.

    Example:
        >>> as_numbers(["0.1", "1"]), as_numbers(["sgd"])
        ([0.1, 1.0], None)
    """
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(0 < number < math.inf for number in numbers) else None


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def on_edge(axis: Axis, value: str) -> bool:
    """Return whether a value is the smallest or the largest of several numbers.

    Where 0 is among the values, the grid has no lower edge: nothing lies below.

    Example:
        >>> on_edge(Axis("client.local_lr", ("0.01", "0.1")), "0.01")
        True
        >>> on_edge(Axis("strategy.mu", ("0", "0.01", "0.1")), "0")
        False
    """
    above = [each for each in axis.values if not _is_number(each) or float(each) != 0]
    numbers = as_numbers(above)
    if numbers is None or len(numbers) < 2:
        return False
    edges = [max(numbers)] if len(above) < len(axis.values) else [min(numbers), max(numbers)]
    return float(value) in edges


def widened(axis: Axis, value: str) -> Axis:
    """Return an axis with one value more beyond the edge, a step as large as the last one on.

    Args:
        axis: Two positive numbers or more, and 0 perhaps.
        value: The edge: the largest of them, or the smallest where that is not 0.

    Returns:
        The axis in ascending order, or the same one if there is no further value (of whole
        numbers).

    Example:
        >>> widened(Axis("client.local_lr", ("0.01", "0.1")), "0.1").values
        ('0.01', '0.1', '1')
        >>> widened(Axis("client.local_steps", ("1", "2")), "1").values
        ('1', '2')
    """
    ordered = sorted(axis.values, key=float)
    numbers = [float(each) for each in ordered]
    at_top = float(value) == numbers[-1]
    edge, inner = (numbers[-1], numbers[-2]) if at_top else (numbers[0], numbers[1])
    beyond = _written(edge * edge / inner, axis.values, digits=2)
    if float(beyond) in numbers or float(beyond) <= 0:
        return axis
    return Axis(axis.key, tuple([*ordered, beyond] if at_top else [beyond, *ordered]))


def just_beyond(axis: Axis, value: str) -> str:
    """Return a value that is hardly beyond the edge: a thousandth of it, or 1 of whole numbers.

    Args:
        axis: As for `widened`.
        value: The edge.

    Example:
        >>> just_beyond(Axis("strategy.alpha", ("0.5", "1.0")), "1.0")
        '1.001'
        >>> just_beyond(Axis("client.local_steps", ("1", "2")), "1")
        '0'
    """
    edge = float(value)
    sign = 1 if edge == max(map(float, axis.values)) else -1
    if _all_whole(axis.values):
        return str(round(edge) + sign)
    return f"{edge * (1 + sign / 1000):.6g}"


def _all_whole(values: Iterable[str]) -> bool:
    return all(value.strip().isdecimal() for value in values)


def _written(number: float, like: Sequence[str], *, digits: int) -> str:
    """Write a number as the given ones are: whole where all are."""
    if _all_whole(like):
        return str(max(1, round(number)))
    return f"{number:.{digits}g}"


def check(axes: Sequence[Axis], *, random: bool, option: str = "--grid") -> None:
    """Refuse keys that come twice, and a random draw between numbers that have no logarithms.

    Args:
        axes: The keys with their values.
        random: Whether points are drawn.
        option: What giving them is called.

    Raises:
        ScenarioError: Naming the key.
    """
    keys = [axis.key for axis in axes]
    for axis in axes:
        if keys.count(axis.key) > 1:
            raise ScenarioError(f"{option} {axis.key}: is there twice; give all its values at once")
        numbers = as_numbers(axis.values)
        if random and numbers is None and all(map(_is_number, axis.values)):
            raise ScenarioError(
                f"{option} {axis.key}={','.join(axis.values)}: --random draws log-uniformly "
                "between numbers: all must be > 0 and finite"
            )
        if random and numbers is not None and len(numbers) < 2:
            raise ScenarioError(
                f"{option} {axis.key}={axis.values[0]}: --random draws between the smallest and "
                "the largest value: give two"
            )
