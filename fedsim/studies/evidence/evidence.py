"""Runs a declared study: the method beside its baseline and controls, at equal and best steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsim.runs.client_metrics import is_error
from fedsim.studies.cells.cell import cells_of
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.variants import Variant
from fedsim.studies.comparison.compare import Question, compare
from fedsim.studies.comparison.intervals import Mean, Paired, mean_interval, paired
from fedsim.studies.evidence.file import Arm, Declaration, Setting, assignments
from fedsim.studies.tuning.points import Point
from fedsim.studies.tuning.tune import SEEDS_APART, ChoiceRule, Tuned, tune, validating

NULL_BOUND = 0.01  # a null control's interval lies within so much of 0: one point of accuracy

Verdict = Literal["better", "worse", "no difference shown", "passes", "fails"]
Expect = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """One arm in one setting.

    Attributes:
        arm: The arm.
        step: The values of the grid's keys with which it was run; empty without a grid.
        mean: Over seeds.
        broken_off: So many runs broke off, and count as the study says.
        minus: The method minus this arm, by seed; None for the method itself.
        verdict: What that shows of the method; None for the method itself.
    """

    arm: Arm
    step: Sequence[str]
    mean: Mean
    broken_off: int
    minus: Paired | None
    verdict: Verdict | None


@dataclass(frozen=True)
class SettingFinding:
    """What a setting showed.

    Attributes:
        setting: The setting.
        best: Whether each arm ran at its own best step, or all at the scenario's.
        rows: The arms, the method first.
        rounds: Rounds of each run.
    """

    setting: Setting
    best: bool
    rows: Sequence[Row]
    rounds: int


@dataclass(frozen=True)
class Evidence:
    """What a study showed.

    Attributes:
        declared: The study.
        seeds: The seeds of the final runs.
        findings: What its settings showed.
        tuned: How best steps were chosen, by setting.
    """

    declared: Declaration
    seeds: Sequence[int]
    findings: Sequence[SettingFinding]
    tuned: Mapping[str, Tuned]


def gather(
    declared: Declaration,
    study: Path,
    *,
    seeds: int | None = None,
    pool: Pool,
    expect: Expect,
) -> Evidence:
    """Run what is missing of a study.

    Args:
        declared: The study.
        study: The folder of its runs.
        seeds: So many seeds instead of its own.
        pool: Runs what is missing.
        expect: Is told, before runs begin, how many are missing and how many are there.

    Raises:
        ScenarioError: If the metric is not recorded.
    """
    document = declared.document
    first = declared.variants(document.settings[0])[0].scenario.seed
    chosen = range(first, first + (seeds or document.seeds))
    findings, tuned = [], {}

    def held(setting: Setting, points: Sequence[Sequence[str]] | None) -> SettingFinding:
        variants = declared.variants(setting, points)
        cells = cells_of(variants, chosen, study)
        there = sum(cell.finished for cell in cells)
        expect(len(cells) - there, there)
        question = Question(document.metric, document.last)
        found = compare(variants, chosen, study, question, pool)
        values = [found.values(place) for place in range(len(variants))]
        arms = declared.arms_of(setting)
        steps = points or [_steps(declared, variant) for variant in variants]
        rows = _rows(
            arms,
            values,
            list(chosen),
            steps,
            broken_off=document.broken_off,
            null=setting.null,
            less=is_error(document.metric),
        )
        return SettingFinding(setting, points is not None, rows, variants[0].scenario.rounds)

    for setting in document.settings:
        findings.append(held(setting, None))
        if setting.best:
            one = _tuned(declared, setting, study, first, pool, expect)
            tuned[setting.title] = one
            points = [one.settings(method) for method in range(len(one.methods))]
            findings.append(held(setting, points))
    return Evidence(declared, list(chosen), findings, tuned)


def _tuned(
    declared: Declaration,
    setting: Setting,
    study: Path,
    first_seed: int,
    pool: Pool,
    expect: Expect,
) -> Tuned:
    """Choose the best step of each arm of a setting."""
    how = declared.document.tune
    assert how is not None
    arms, grid = declared.arms_of(setting), declared.grid()
    plain = declared.variants(setting)

    def make(method: int, point: Point) -> Variant:
        split = float(plain[method].scenario.partition.get("test_fraction") or 0)
        more = [*validating(how.set, split), *assignments(grid.keys, point)]
        made = declared.variant(setting, arms[method], more)
        labels = {**made.labels, **dict(zip(grid.keys, point, strict=True))}
        return Variant(labels, made.scenario)

    apart = range(first_seed + SEEDS_APART, first_seed + SEEDS_APART + how.seeds)
    rule = ChoiceRule(how.metric, declared.document.last)
    names = [arm.name for arm in arms]
    return tune(names, make, grid, list(apart), study, rule, pool, expect)


def _steps(declared: Declaration, variant: Variant) -> list[str]:
    """The values that a scenario gives the grid's keys."""
    if declared.document.tune is None:
        return []
    document, found = variant.scenario.resolved(), []
    for key in declared.grid().keys:
        table, _, name = key.partition(".")
        value = (document.get(table) or {}).get(name) if name else document.get(table)
        found.append(f"{key}={value}")
    return found


def _rows(
    arms: Sequence[Arm],
    values: Sequence[Mapping[int, float]],
    seeds: Sequence[int],
    steps: Sequence[Sequence[str]],
    *,
    broken_off: float,
    null: bool,
    less: bool,
) -> list[Row]:
    """Return the arms beside each other; a run without a value counts as `broken_off`."""
    full = [
        [v if math.isfinite(v := of.get(seed, math.nan)) else broken_off for seed in seeds]
        for of in values
    ]
    rows = []
    for place, arm in enumerate(arms):
        missing = sum(not math.isfinite(values[place].get(seed, math.nan)) for seed in seeds)
        minus = None if place == 0 else paired(full[0], full[place])
        verdict = None if minus is None else judged(minus, null=null, less=less)
        rows.append(Row(arm, steps[place], mean_interval(full[place]), missing, minus, verdict))
    return rows


def judged(minus: Paired, *, null: bool = False, less: bool = False) -> Verdict:
    """Return what a paired difference shows of the method.

    Args:
        minus: The method minus another.
        null: Whether nothing may differ: it passes when the interval holds 0 and lies within
            `NULL_BOUND` of it.
        less: Whether less is better.

    Example:
        >>> judged(Paired(10, 0.02, 0.01, 0.03, 0.002, 10))
        'better'
        >>> judged(Paired(10, 0.001, -0.002, 0.004, 0.4, 6), null=True)
        'passes'
    """
    if null:
        inside = -NULL_BOUND <= minus.low <= 0 <= minus.high <= NULL_BOUND
        return "passes" if inside else "fails"
    low, high = (-minus.high, -minus.low) if less else (minus.low, minus.high)
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference shown"
