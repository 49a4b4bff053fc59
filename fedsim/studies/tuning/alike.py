"""Tunes methods that have keys of their own: what is common to them is the same grid for all."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.variants import Axis, Variant
from fedsim.studies.tuning.points import Grid, Point
from fedsim.studies.tuning.tune import ChoiceRule, Tuned, tune


class TunedMethod(NamedTuple):
    """A method with keys of its own.

    Attributes:
        name: What it is called.
        own: Keys that it alone has, with their values.
        make: The values of the common keys and of its own -> the scenario that measures them.
        metric: What its points are judged by.
    """

    name: str
    own: tuple[Axis, ...]
    make: Callable[[Grid, Point], Variant]
    metric: str


def tune_alike(
    methods: Sequence[TunedMethod],
    common: tuple[Axis, ...],
    seeds: Sequence[int],
    study: Path,
    rule: ChoiceRule,
    pool: Pool,
    expect: Callable[[int, int], None] = lambda missing, there: None,
) -> list[Tuned]:
    """Choose each method's best point of the common grid times the grid of its own keys.

    A method's own grid grows while its best lies on an edge of it. A common one then grows for all
    methods, until no method's best lies on its edge. No grid grows by more than `rule.widenings`
    values for one method. What is tried is a function of the outcomes alone, so that a study that
    was interrupted ends as if it had not been.

    Args:
        methods: The methods.
        common: Keys that all methods try, with their values.
        seeds: Seeds apart from those of the final runs.
        study: The folder of the cells.
        rule: How points are chosen; its metric is replaced by each method's.
        pool: Runs what is missing.
        expect: Is told, before runs begin, how many are missing and how many are there.

    Returns:
        What was tried and is best, for each method a grid of its own; the common keys come first in
        it and have the same values in all.

    Raises:
        ScenarioError: If nothing records a metric, or a point is impossible.
    """
    given = [(*common, *method.own) for method in methods]
    own = [method.own for method in methods]
    while True:
        found = []
        for place, method in enumerate(methods):
            axes = (*common, *own[place])
            left = replace(rule, widenings=max(0, rule.widenings - _grown(given[place], axes)))
            one = _tuned(method, axes, seeds, study, left, pool, expect)
            own[place] = one.grid.axes[len(common) :]
            found.append(one)
        grown = tuple(
            _union([one.grid.axes[place] for one in found]) for place in range(len(common))
        )
        if grown == common:
            return found
        common = grown


def _grown(given: Sequence[Axis], axes: Sequence[Axis]) -> int:
    """How many values have been added to the axis that has grown most."""
    return max(len(now.values) - len(was.values) for was, now in zip(given, axes, strict=True))


def _tuned(
    method: TunedMethod,
    axes: tuple[Axis, ...],
    seeds: Sequence[int],
    study: Path,
    rule: ChoiceRule,
    pool: Pool,
    expect: Callable[[int, int], None],
) -> Tuned:
    grid = Grid(axes)

    def make(_: int, point: Point) -> Variant:
        return method.make(grid, point)

    judged = replace(rule, metric=method.metric)
    return tune([method.name], make, grid, seeds, study, judged, pool, expect)


def _union(axes: Sequence[Axis]) -> Axis:
    """An axis with the values of all; the given one where none has grown.

    Example:
        >>> grown = [Axis("lr", ("0.1", "1")), Axis("lr", ("0.1", "1", "10"))]
        >>> _union(grown).values
        ('0.1', '1', '10')
    """
    first = max(axes, key=lambda axis: len(axis.values))
    values = list(dict.fromkeys(value for axis in axes for value in axis.values))
    if len(values) == len(first.values):
        return first
    return Axis(first.key, tuple(sorted(values, key=float)))
