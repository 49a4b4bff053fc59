"""Chooses each method's best point of one grid: on a validation split, with seeds apart.

Clients keep a part of their samples to themselves (`[partition] test_fraction`), and a point is
judged by the model's metric on these parts together (`pooled/...`): the server's test set is never
looked at. All methods try the same points. After each seed the worse ones of a method go no
further. While a method's best point lies on an edge of the grid, the grid grows there, for all.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsim.basics.errors import ScenarioError
from fedsim.basics.ties import ROUNDING, ranks
from fedsim.runs.client_metrics import is_error
from fedsim.studies.cells.cell import Cell, cells_of
from fedsim.studies.cells.outcome import (
    LAST,
    outcome_of,
    read_history,
    refuse_unrecorded,
    require_recorded,
)
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.variants import Axis, Variant
from fedsim.studies.comparison.intervals import Mean, mean_interval
from fedsim.studies.tuning.points import Grid, Point, just_beyond, on_edge, widened

SEEDS_APART = 1000  # tuning's seeds begin so much above the scenario's
TEST_FRACTION = 0.2  # what clients keep to themselves where the scenario says nothing
WIDENINGS = 4
KEPT = 0.5
_FEWEST = 3  # points of a method that go on in any case
METRICS = ("pooled/accuracy", "pooled/rmse", "pooled/loss")

Make = Callable[[int, Point], Variant]


@dataclass(frozen=True)
class ChoiceRule:
    """How points are chosen.

    Attributes:
        metric: What they are judged by; None takes pooled accuracy, or the error or loss where
            there is none.
        last: The share of a run's rounds whose mean counts.
        kept: The share of a method's points that go on after each seed; 1 stops none early.
        widenings: How often the grid may grow.
    """

    metric: str | None = None
    last: float = LAST
    kept: float = KEPT
    widenings: int = WIDENINGS


@dataclass(frozen=True)
class Candidate:
    """One method at one point.

    Attributes:
        method: The method's place.
        point: The values of the grid's keys.
        values: What it was judged by, by seed.
        failure: Why a run broke off, or None.
        alive: Whether it went through all seeds.
    """

    method: int
    point: Point
    values: Mapping[int, float]
    failure: str | None
    alive: bool

    @property
    def mean(self) -> Mean:
        """The mean over the seeds it was tried with."""
        return mean_interval(list(self.values.values()))


@dataclass(frozen=True)
class Tuned:
    """What was tried, and what is best.

    Attributes:
        methods: What the methods are called.
        grid: The grid as it ended.
        metric: What points were judged by.
        seeds: The seeds.
        candidates: Everything that was tried.
        best: The best candidate of each method; None where none was sound.
        edges: The keys on whose edge a method's best still lies, per method; not where the
            scenario allows for no value beyond it, as for a share of 1.
        notes: What a reader should know besides.
    """

    methods: Sequence[str]
    grid: Grid
    metric: str
    seeds: Sequence[int]
    candidates: Sequence[Candidate]
    best: Sequence[Candidate | None]
    edges: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def settings(self, method: int) -> list[str]:
        """Return the assignments of a method's best point; empty where none was sound."""
        best = self.best[method]
        if best is None:
            return []
        return [f"{key}={value}" for key, value in zip(self.grid.keys, best.point, strict=True)]


def validating(overrides: Sequence[str], test_fraction: float) -> list[str]:
    """Return assignments that let a scenario measure what points are judged by.

    Args:
        overrides: Assignments so far.
        test_fraction: What the scenario's clients keep to themselves already.

    Raises:
        ScenarioError: If they switch that measurement off.
    """
    key, value = "evaluation.pooled", "true"
    for override in overrides:
        name, _, given = override.partition("=")
        if name.strip() == key and given.strip() != value:
            raise ScenarioError(
                f"--set {override}: points are judged by the model's metric on what all clients "
                f"keep to themselves, which takes {key}={value}; leave it out"
            )
    split = [] if test_fraction else [f"partition.test_fraction={TEST_FRACTION}"]
    return [*overrides, *split, f"{key}={value}"]


def check_metric_is_no_test(
    metric: str | None, option: str = "--metric", instead: str = "pooled/{}"
) -> None:
    """Refuse to choose by what is measured on the server's test set.

    Args:
        metric: What points are judged by.
        option: What giving it is called.
        instead: What to choose by, with `{}` for the metric's name.

    Raises:
        ScenarioError: Naming what to choose by.
    """
    if metric is not None and metric.startswith("test/"):
        raise ScenarioError(
            f"{option} {metric}: is measured on the test set, which tuning must not see; choose by "
            f"{instead.replace('{}', metric.partition('/')[2])}"
        )


def tune(
    methods: Sequence[str],
    make: Make,
    grid: Grid,
    seeds: Sequence[int],
    study: Path,
    rule: ChoiceRule,
    pool: Pool,
    expect: Callable[[int, int], None] = lambda missing, there: None,
) -> Tuned:
    """Choose each method's best point.

    What is tried is a function of the outcomes alone, so that a study that was interrupted ends as
    if it had not been.

    Args:
        methods: What the methods are called.
        make: (method, point) -> the scenario that measures it.
        grid: What is tried, by all methods.
        seeds: Seeds apart from those of the final runs.
        study: The folder of the cells.
        rule: How points are chosen.
        pool: Runs what is missing.
        expect: Is told, before runs begin, how many are missing and how many are there.

    Raises:
        ScenarioError: If nothing records the metric, or a point is impossible.
    """
    ends: dict[str, str] = {}
    refuse_unrecorded(make(0, grid.points[0]).scenario, [("--metric", rule.metric)])
    race = _PointRace(methods, make, seeds, study, rule, pool, expect)
    for widening in range(rule.widenings + 1):
        candidates = race.run(grid)
        best = [_best(candidates, method, race.sign) for method in range(len(methods))]
        if grid.drawn or widening == rule.widenings:
            break
        wider = _wider(grid, best, make, ends)
        if wider == grid:
            break
        grid = wider
    edges = [
        [key for key in _edges(grid, each) if not _at_bound(grid, each, key, method, make)]
        for method, each in enumerate(best)
    ]
    notes = [f"the grid ends here: beyond it, {reason}" for reason in ends.values()]
    for name, keys in zip(methods, edges, strict=True):
        of = f"{name}: " if name else ""
        notes += [f"{of}the best {key} lies on the edge of what was tried" for key in keys]
    return Tuned(methods, grid, race.metric, seeds, candidates, best, edges, notes)


class _PointRace:
    """Runs points seed by seed; the worse ones of a method go no further."""

    def __init__(
        self,
        methods: Sequence[str],
        make: Make,
        seeds: Sequence[int],
        study: Path,
        rule: ChoiceRule,
        pool: Pool,
        expect: Callable[[int, int], None],
    ) -> None:
        self._methods, self._make, self._seeds, self._study = methods, make, seeds, study
        self._rule, self._pool, self._expect = rule, pool, expect
        self._failed: dict[Path, str] = {}
        self.metric = rule.metric or ""

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return -1 if is_error(self.metric) else 1

    def run(self, grid: Grid) -> list[Candidate]:
        made = [(m, point) for m in range(len(self._methods)) for point in grid.points]
        variants = [self._make(*each) for each in made]
        found = [Candidate(*each, {}, None, True) for each in made]
        for turn, seed in enumerate(self._seeds):
            going = [place for place, candidate in enumerate(found) if candidate.alive]
            cells = [
                cell for place in going for cell in cells_of([variants[place]], [seed], self._study)
            ]
            self._run(cells)
            for place, cell in zip(going, cells, strict=True):
                found[place] = self._judged(found[place], cell)
            if turn + 1 < len(self._seeds):
                found = _fewer(found, len(self._methods), self._rule.kept, self.sign)
        return found

    def _run(self, cells: Sequence[Cell]) -> None:
        tried = [cell for cell in cells if cell.folder not in self._failed]
        there = sum(cell.finished for cell in tried)
        self._expect(len(tried) - there, there)
        # what broke off would break off again
        self._failed |= self._pool.run([cell for cell in tried if not cell.finished])

    def _judged(self, candidate: Candidate, cell: Cell) -> Candidate:
        if not cell.finished:
            reason = self._failed[cell.folder]
            return Candidate(candidate.method, candidate.point, candidate.values, reason, False)
        history = read_history(cell.folder)
        if not self.metric:
            recorded = {name for record in history for name in record}
            self.metric = next((m for m in METRICS if m in recorded), METRICS[0])
        require_recorded(self.metric, history, "--metric")
        value = outcome_of(history, self.metric, last=self._rule.last).value
        values = {**candidate.values, cell.seed: value}
        alive = math.isfinite(value)
        return Candidate(candidate.method, candidate.point, values, None, alive)


def _fewer(found: Sequence[Candidate], methods: int, kept: float, sign: int) -> list[Candidate]:
    """Let the better ones of each method go on."""
    going: set[tuple[int, Point]] = set()
    for method in range(methods):
        alive = [c for c in found if c.method == method and c.alive]
        count = max(_FEWEST, math.ceil(kept * len(alive)))
        going |= {(method, c.point) for c in best_first(alive, sign)[:count]}
    return [
        Candidate(c.method, c.point, c.values, c.failure, c.alive and (c.method, c.point) in going)
        for c in found
    ]


def _best(candidates: Sequence[Candidate], method: int, sign: int) -> Candidate | None:
    alive = [c for c in candidates if c.method == method and c.alive]
    return best_first(alive, sign)[0] if alive else None


def best_first(candidates: Sequence[Candidate], sign: int) -> list[Candidate]:
    """The best first; those that are equal but for rounding in the order of the grid."""
    if not candidates:
        return []
    means = np.array([-sign * candidate.mean.mean for candidate in candidates])
    order = ranks([(means, ROUNDING * np.abs(means))]).argsort(kind="stable")
    return [candidates[place] for place in order]


def _edges(grid: Grid, best: Candidate | None) -> list[str]:
    if best is None:
        return []
    tried = grid.axes
    if grid.drawn:
        columns = zip(*grid.drawn, strict=True)
        tried = tuple(
            Axis(axis.key, tuple(dict.fromkeys(column)))
            for axis, column in zip(grid.axes, columns, strict=True)
        )
    return [a.key for a, value in zip(tried, best.point, strict=True) if on_edge(a, value)]


def _wider(grid: Grid, best: Sequence[Candidate | None], make: Make, ends: dict[str, str]) -> Grid:
    """The grid with a value more wherever some method's best lies on its edge.

    Args:
        grid: What was tried.
        best: Each method's best.
        make: Refuses what is impossible.
        ends: Gets by key why it goes no further, where a value beyond the edge is impossible.
    """
    for place in range(len(grid.axes)):
        for value in dict.fromkeys(each.point[place] for each in best if each is not None):
            axis = grid.axes[place]
            if not on_edge(axis, value):
                continue
            axes = (*grid.axes[:place], widened(axis, value), *grid.axes[place + 1 :])
            wider = Grid(axes)
            added = [point for point in wider.points if point not in set(grid.points)]
            try:
                for method, point in itertools.product(range(len(best)), added):
                    make(method, point)
            except ScenarioError as error:
                ends[axis.key] = str(error)
            else:
                grid = wider
    return grid


def _at_bound(grid: Grid, best: Candidate | None, key: str, method: int, make: Make) -> bool:
    """Return whether a scenario is impossible with a key hardly beyond a method's best value."""
    assert best is not None
    place = grid.keys.index(key)
    beyond = just_beyond(grid.axes[place], best.point[place])
    try:
        make(method, (*best.point[:place], beyond, *best.point[place + 1 :]))
    except ScenarioError:
        return True
    return False
