"""What `fedsim tune` does, from its arguments to its table."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import taking, write_json_atomic
from fedsim.cli.compare_study import StudyAnswer, default_folder
from fedsim.studies.cells.cell import locked
from fedsim.studies.cells.code import said_of_code
from fedsim.studies.cells.outcome import LAST, check_metric
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.variants import (
    Variant,
    of_scenarios,
    parse_axis,
    parse_seeds,
    refuse_replaced,
)
from fedsim.studies.cells.watching import StudyProgress
from fedsim.studies.tuning.points import Grid, Point, check, draw
from fedsim.studies.tuning.report import draw_tuned, tuned_document, tuned_lines, write_tuned_csv
from fedsim.studies.tuning.tune import (
    KEPT,
    SEEDS_APART,
    WIDENINGS,
    ChoiceRule,
    check_metric_is_no_test,
    tune,
    validating,
)

GRID = "client.local_lr=0.01,0.03,0.1,0.3,1"


class TuneAsked(NamedTuple):
    """The arguments of `fedsim tune`, see there."""

    scenario: str
    grid: Sequence[str] = ()
    vary: Sequence[str] = ()
    seeds: str = "3"
    overrides: Sequence[str] = ()
    random: int | None = None
    metric: str | None = None
    last: float = LAST
    kept: float = KEPT
    widenings: int = WIDENINGS
    out: Path | None = None
    workers: int | None = None


def run_tune(asked: TuneAsked, *, width: int, quiet: bool = False) -> StudyAnswer:
    """Make the missing runs, write tables and a picture, and return the answer.

    Raises:
        ScenarioError: If anything asked is impossible; nothing has run then.
        BusyError: If another process works in the study's folder.
    """
    rule = _rule(asked)
    methods = [parse_axis(text) for text in asked.vary]
    axes = [parse_axis(text, option="--grid") for text in asked.grid or [GRID]]
    check(axes, random=asked.random is not None)
    refuse_replaced(methods, "--vary", asked.overrides, "--set")
    refuse_replaced(axes, "--grid", [method.key for method in methods], "--vary")
    if asked.grid:  # what is tried unless said otherwise is no reason to refuse anything
        refuse_replaced(axes, "--grid", asked.overrides, "--set")
    plain = of_scenarios([asked.scenario], methods, asked.overrides)
    scenario = plain[0].scenario
    seeds = parse_seeds(asked.seeds, scenario.seed + SEEDS_APART)
    grid = Grid(tuple(axes))
    if asked.random is not None:
        grid = draw(axes, asked.random, scenario.seed)

    def make(method: int, point: Point) -> Variant:
        return variant_at(asked.scenario, plain[method], asked.overrides, grid.keys, point)

    for method in range(len(plain)):
        for point in grid.points:
            make(method, point)
    study = asked.out or Path(f"{default_folder([asked.scenario])}-tune")
    try:
        with (
            locked(study),
            StudyProgress(quiet=quiet) as progress,
            Pool(study, workers=asked.workers, watch=progress) as pool,
        ):
            code = said_of_code([variant.scenario for variant in plain], study)
            names = [variant.name if variant.labels else "" for variant in plain]
            tuned = tune(names, make, grid, seeds, study, rule, pool, progress.expect)
            document = {"study": str(study), **tuned_document(tuned)}
            with taking(study / "tune.json"):
                write_json_atomic(study / "tune.json", document)
                write_tuned_csv(tuned, study / "tune.csv")
                draw_tuned(tuned, study / "tune.png")
    except KeyboardInterrupt as error:
        vars(error)["fedsim_go_on"] = "the same command"
        raise
    lines = [*code, *tuned_lines(tuned, width=width), "", f"{study}: tune.json, tune.csv, tune.png"]
    return StudyAnswer(document, lines, any(best is None for best in tuned.best))


def variant_at(
    scenario: str, method: Variant, overrides: Sequence[str], keys: Sequence[str], point: Point
) -> Variant:
    """Return a method at one point, measured on a validation split.

    Raises:
        ScenarioError: If the point is impossible.
    """
    settings = [f"{key}={value}" for key, value in zip(keys, point, strict=True)]
    assigned = [f"{key}={value}" for key, value in method.labels.items()]
    split = float(method.scenario.partition.get("test_fraction") or 0)
    (made,) = of_scenarios([scenario], [], [*validating(overrides, split), *assigned, *settings])
    labels = {**method.labels, **dict(zip(keys, point, strict=True))}
    return Variant(labels, made.scenario)


def _rule(asked: TuneAsked) -> ChoiceRule:
    if asked.metric is not None:
        check_metric(asked.metric, "--metric")
        check_metric_is_no_test(asked.metric)
    for name, value, holds, bounds in (
        ("--last", asked.last, 0 < asked.last <= 1, "in (0, 1]"),
        ("--keep", asked.kept, 0 < asked.kept <= 1, "in (0, 1]"),
        ("--widen", asked.widenings, asked.widenings >= 0, ">= 0"),
        ("--random", asked.random, asked.random is None or asked.random >= 1, ">= 1"),
    ):
        if not holds:
            raise ScenarioError(f"{name} {value:g}: must be {bounds}")
    return ChoiceRule(asked.metric, asked.last, asked.kept, asked.widenings)
