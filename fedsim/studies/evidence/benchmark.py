"""Runs a benchmark: tunes every arm alike in every setting and holds them beside each other."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.basics.errors import ScenarioError
from fedsim.runs.arms import CENTRALISED, LOCAL
from fedsim.runs.client_metrics import is_error
from fedsim.runs.world import build
from fedsim.studies.cells.cell import Cell, cells_of, in_one_process
from fedsim.studies.cells.outcome import (
    outcome_of,
    read_history,
    refuse_unrecorded,
    require_recorded,
    worst_metric,
)
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.variants import Variant
from fedsim.studies.comparison.intervals import (
    Mean,
    Paired,
    Ratio,
    mean_interval,
    paired,
    paired_ratio,
)
from fedsim.studies.evidence.benchmark_file import Benchmark, BenchmarkArm, BenchmarkSetting
from fedsim.studies.evidence.file import assignments
from fedsim.studies.tuning.alike import TunedMethod, tune_alike
from fedsim.studies.tuning.points import Grid, Point
from fedsim.studies.tuning.tune import SEEDS_APART, ChoiceRule, Tuned

WIDENINGS = 12  # of a benchmark's grids, which are not to end on an edge
_UNTRAINED = "personal/clients_untrained"

Expect = Callable[[int, int], None]


class Scores(NamedTuple):
    """One arm in one setting, a value per seed in the order of the seeds.

    A run that broke off counts as the study says.

    Attributes:
        clients: The mean over clients, on their own test samples, of the model that they use.
        worst: The mean over the worst tenth of the clients; None where no run has measured it.
        shared: The shared model on the server's test set; None where no run has measured one.
        broken_off: So many runs broke off.
        untrained: In so many runs some client had never trained by the end and is left out of a
            mean over personal models.
    """

    clients: Sequence[float]
    worst: Sequence[float] | None
    shared: Sequence[float] | None
    broken_off: int
    untrained: int


@dataclass(frozen=True)
class SettingScores:
    """The arms in one setting.

    Attributes:
        declared: The benchmark.
        setting: The setting.
        scores: Of each arm.
        tuned: How each arm's settings were chosen.
        rounds: Rounds of each run.
    """

    declared: Benchmark
    setting: BenchmarkSetting
    scores: Sequence[Scores]
    tuned: Sequence[Tuned]
    rounds: int

    def mean(self, arm: int) -> Mean:
        """Return the mean over seeds of an arm's mean over clients."""
        return mean_interval(self.scores[arm].clients)

    def worst(self, arm: int) -> Mean | None:
        """Return the mean over seeds of an arm's worst tenth of the clients; None without one."""
        worst = self.scores[arm].worst
        return None if worst is None else mean_interval(worst)

    def shared(self, arm: int) -> Mean | None:
        """Return the mean over seeds of an arm's shared model; None where it has none."""
        shared = self.scores[arm].shared
        return None if shared is None else mean_interval(shared)

    def minus(self, arm: int, other: int) -> Paired:
        """Return one arm minus another, seed by seed."""
        return paired(self.scores[arm].clients, self.scores[other].clients)

    def better(self, arm: int, other: int) -> bool | None:
        """Return whether one arm is better than another; None where no difference is shown."""
        low, high = self.minus(arm, other)[2:4]
        if not (low > 0 or high < 0):
            return None
        less = is_error(self.declared.metric_of(self.declared.arms[arm]))
        return (high < 0) if less else (low > 0)

    def same(self, other: int) -> set[int]:
        """Return the arms that have the values of another one, as those tuned to be the same."""
        values = self.scores[other].clients
        return {
            place
            for place, scores in enumerate(self.scores)
            if place != other and list(scores.clients) == list(values)
        }

    def best(self, values: Callable[[Scores], Sequence[float] | None]) -> set[int]:
        """Return the federated arm of the best mean and all that do not differ from it.

        Args:
            values: What of an arm is looked at; arms of which it returns None are left out.

        Returns:
            The places of the arms. An arm differs where the 95 % interval of its paired difference
            from the best one leaves out 0.
        """
        known = {
            place: found
            for place, arm in enumerate(self.declared.arms)
            if arm.reference is None and (found := values(self.scores[place])) is not None
        }
        if not known:
            return set()
        sign = -1 if is_error(self.declared.document.metric) else 1
        top = max(known, key=lambda place: sign * mean_interval(known[place]).mean)
        alike = (
            place
            for place, found in known.items()
            if place != top and not _leaves_out_zero(paired(known[top], found))
        )
        return {top, *alike}

    def gap_closed(self, arm: int) -> Ratio | None:
        """Return (arm - local) / (centralised - local); None without both references."""
        alone, together = map(self.declared.reference, (LOCAL, CENTRALISED))
        if alone is None or together is None:
            return None
        own, low, high = (self.scores[place].clients for place in (arm, alone, together))
        gained = [a - b for a, b in zip(own, low, strict=True)]
        room = [a - b for a, b in zip(high, low, strict=True)]
        return paired_ratio(gained, room)


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark showed.

    Attributes:
        declared: The benchmark.
        seeds: The seeds of the final runs.
        settings: Its settings.
    """

    declared: Benchmark
    seeds: Sequence[int]
    settings: Sequence[SettingScores]


def gather_benchmark(
    declared: Benchmark,
    study: Path,
    *,
    seeds: int | None = None,
    pool: Pool,
    expect: Expect,
) -> BenchmarkResult:
    """Run what is missing of a benchmark.

    Args:
        declared: The benchmark.
        study: The folder of its runs.
        seeds: So many seeds instead of its own.
        pool: Runs what is missing.
        expect: Is told, before runs begin, how many are missing and how many are there.

    Raises:
        ScenarioError: If a point of a grid is impossible in a setting, or a metric is not recorded.
    """
    document = declared.document
    first = declared.federated(document.settings[0], declared.arms[0]).scenario.seed
    chosen = range(first, first + (seeds or document.seeds))
    apart = range(first + SEEDS_APART, first + SEEDS_APART + document.tune.seeds)
    _check_all(declared)
    found = []
    for setting in document.settings:
        methods = [_method(declared, setting, arm) for arm in declared.arms]
        rule = ChoiceRule(last=document.last, widenings=WIDENINGS)
        tuned = tune_alike(methods, declared.common(), list(apart), study, rule, pool, expect)
        variants = [
            declared.variant(setting, arm, one.settings(0))
            for arm, one in zip(declared.arms, tuned, strict=True)
        ]
        cells = cells_of(variants, chosen, study)
        folders = {cell.folder: cell.finished for cell in cells}
        expect(len(folders) - sum(folders.values()), sum(folders.values()))
        # arms that chose the same settings of one scenario share their runs
        pool.run(list({cell.folder: cell for cell in cells if not cell.finished}.values()))
        scores = [
            _scores(declared, arm, [cell for cell in cells if cell.variant == place])
            for place, arm in enumerate(declared.arms)
        ]
        rounds = variants[0].scenario.rounds
        found.append(SettingScores(declared, setting, scores, tuned, rounds))
    return BenchmarkResult(declared, list(chosen), found)


def _check_all(declared: Benchmark) -> None:
    """Refuse what is impossible at some point in some setting, or records no metric.

    Raises:
        ScenarioError: Naming setting and arm.
    """
    for setting in declared.document.settings:
        for arm in declared.arms:
            try:
                _check(declared, setting, arm)
            except ScenarioError as error:
                place = f"{declared.path}: {setting.title}: {arm.name}"
                raise ScenarioError(f"{place}: {error}") from error


def _check(declared: Benchmark, setting: BenchmarkSetting, arm: BenchmarkArm) -> None:
    grid = Grid((*declared.common(), *declared.own(arm)))
    for point in grid.points:
        declared.federated(setting, arm, assignments(grid.keys, point))
    made = declared.variant(setting, arm).scenario
    scenario = in_one_process(made, made.seed)
    build(scenario)  # what only the data, the model and the strategy together can refuse
    refuse_unrecorded(scenario, [("metric", declared.metric_of(arm))])


def _method(declared: Benchmark, setting: BenchmarkSetting, arm: BenchmarkArm) -> TunedMethod:
    def make(grid: Grid, point: Point) -> Variant:
        made = declared.variant(setting, arm, assignments(grid.keys, point))
        labels = {**made.labels, **dict(zip(grid.keys, point, strict=True))}
        return Variant(labels, made.scenario)

    return TunedMethod(arm.name, declared.own(arm), make, declared.metric_of(arm))


def _scores(declared: Benchmark, arm: BenchmarkArm, cells: Sequence[Cell]) -> Scores:
    """What an arm's runs came to."""
    document, metric = declared.document, declared.metric_of(arm)
    histories = [read_history(cell.folder) if cell.finished else None for cell in cells]
    for history in histories:
        if history is not None:
            require_recorded(metric, history, f"{declared.path}: {arm.name}: metric")

    def values(name: str) -> list[float]:
        late = [
            math.nan if history is None else outcome_of(history, name, last=document.last).value
            for history in histories
        ]
        return [value if math.isfinite(value) else document.broken_off for value in late]

    finished = [history for history in histories if history is not None]
    recorded = {name for history in finished for record in history for name in record}
    lost = sum(
        history is None or not math.isfinite(outcome_of(history, metric, last=document.last).value)
        for history in histories
    )
    worst, shared = worst_metric(metric), document.shared
    return Scores(
        values(metric),
        values(worst) if worst in recorded else None,
        values(shared) if shared is not None and shared in recorded else None,
        lost,
        sum(_some_untrained(metric, history) for history in finished),
    )


def _some_untrained(metric: str, history: Sequence[Mapping[str, Any]]) -> bool:
    last = [record[_UNTRAINED] for record in history if record.get(_UNTRAINED) is not None]
    return metric.startswith("personal/") and bool(last) and last[-1] > 0


def _leaves_out_zero(difference: Paired) -> bool:
    return difference.low > 0 or difference.high < 0
