"""What `fedsim compare` does, from its arguments to its tables."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import taking, write_json_atomic
from fedsim.runs.arms import LOCAL
from fedsim.studies.cells import given as given_
from fedsim.studies.cells.arms import with_arms
from fedsim.studies.cells.cell import cells_of, locked
from fedsim.studies.cells.code import said_of_code
from fedsim.studies.cells.declared import Declared, is_study, recall, remember
from fedsim.studies.cells.outcome import LAST, check_metric, parse_target
from fedsim.studies.cells.pool import Pool
from fedsim.studies.cells.variants import (
    Variant,
    of_scenarios,
    parse_axis,
    parse_seeds,
    refuse_replaced,
)
from fedsim.studies.cells.watching import StudyProgress
from fedsim.studies.comparison.compare import Comparison, Question, compare, document_of
from fedsim.studies.comparison.pictures import draw_curves, draw_differences
from fedsim.studies.comparison.tables import comparison_lines, write_csv

FOLDER = Path("studies")


class Asked(NamedTuple):
    """The arguments of `fedsim compare`, see there."""

    subjects: Sequence[str]
    vary: Sequence[str] = ()
    seeds: str | None = None
    overrides: Sequence[str] = ()
    metric: str | None = None
    last: float = LAST
    target: str | None = None
    baseline: str | None = None
    out: Path | None = None
    workers: int | None = None
    arms: Sequence[str] = ()


class StudyAnswer(NamedTuple):
    """The answer of a study.

    Attributes:
        document: For programs.
        lines: For people.
        failed: Whether a run failed.
    """

    document: dict[str, Any]
    lines: list[str]
    failed: bool


def run_compare(asked: Asked, *, width: int, quiet: bool = False) -> StudyAnswer:
    """Make the missing runs, write tables and pictures, and return the answer.

    Args:
        asked: What was asked.
        width: Of the terminal.
        quiet: Show no progress.

    Raises:
        ScenarioError: If anything asked is impossible; nothing has run then.
        BusyError: If another process works in the study's folder.
    """
    question = _question(asked)
    declared, study = _declared(asked)
    try:
        with (
            locked(study),
            StudyProgress(quiet=quiet) as progress,
            Pool(study, workers=asked.workers, watch=progress) as pool,
        ):
            remember(declared, study)
            code = said_of_code([v.scenario for v in declared.variants if not v.given], study)
            cells = cells_of(declared.variants, declared.seeds, study)
            there = sum(cell.finished for cell in cells)
            progress.expect(len(cells) - there, there)
            found = compare(*declared, study, question, pool)
            files = write_files(found, study)
    except KeyboardInterrupt as error:
        place = shlex.quote(str(study.absolute()))
        vars(error)["fedsim_go_on"] = f"`fedsim compare {place}`"
        raise
    document = {**document_of(found), "code": code, "files": [str(file) for file in files]}
    lines = [*code, *comparison_lines(found, width=width), "", _see(study, files)]
    return StudyAnswer(document, lines, bool(found.failures))


def write_files(comparison: Comparison, study: Path) -> list[Path]:
    """Write a comparison's tables and pictures into its study's folder; returns their paths."""
    with taking(study / "compare.json"):
        write_json_atomic(study / "compare.json", document_of(comparison))
        files = [study / "compare.json", *write_csv(comparison, study)]
        if any(outcome.curve for of in comparison.outcomes for outcome in of.values()):
            draw_curves(comparison, study / "curves.png")
            files.append(study / "curves.png")
        if any(difference.paired.n for difference in comparison.differences):
            draw_differences(comparison, study / "differences.png")
            files.append(study / "differences.png")
    return files


def default_folder(subjects: Sequence[str]) -> Path:
    """Return where a study lies unless said otherwise: the same for the same subjects."""
    first = Path(subjects[0]).name.removesuffix(".toml")
    more = f"-and-{len(subjects) - 1}-more" if len(subjects) > 1 else ""
    return FOLDER / f"{first}{more}"


def _see(study: Path, files: Sequence[Path]) -> str:
    return f"{study}: {', '.join(file.name for file in files)}"


def _question(asked: Asked) -> Question:
    if not 0 < asked.last <= 1:
        raise ScenarioError(f"--last {asked.last:g}: must be in (0, 1]")
    if asked.metric is not None:
        check_metric(asked.metric, "--metric")
    target = None if asked.target is None else parse_target(asked.target)
    return Question(asked.metric, asked.last, target, asked.baseline)


def _declared(asked: Asked) -> tuple[Declared, Path]:
    """Return what is compared, and in which folder."""
    subjects = asked.subjects
    folders = [s for s in subjects if is_study(s)]
    runs = [s for s in subjects if given_.is_run(s)]
    if folders or runs:
        for option, value in (
            ("--vary", asked.vary), ("--set", asked.overrides), ("--seeds", asked.seeds),
            ("--arm", asked.arms),
        ):  # fmt: skip
            if value:
                raise ScenarioError(
                    f"{option}: changes scenarios, and {(folders or runs)[0]} is there already; "
                    "name scenarios instead"
                )
        if len(folders or runs) < len(subjects) or len(folders) > 1:
            raise ScenarioError(
                f"{', '.join(subjects)}: must be scenarios, or folders of runs, or one study's "
                "folder"
            )
    if folders:
        return recall(Path(folders[0])), asked.out or Path(folders[0])
    if runs:
        variants = given_.of_runs(runs)
        return Declared(variants, []), asked.out or default_folder(runs)
    return _of_scenarios(asked)


def _of_scenarios(asked: Asked) -> tuple[Declared, Path]:
    axes = [parse_axis(text) for text in asked.vary]
    refuse_replaced(axes, "--vary", asked.overrides, "--set")
    variants: list[Variant] = of_scenarios(asked.subjects, axes, asked.overrides)
    _check_measured(asked)
    variants = with_arms(variants, asked.arms)
    first = variants[0].scenario.seed
    seeds = (first,) if asked.seeds is None else parse_seeds(asked.seeds, first)
    return Declared(variants, seeds), asked.out or default_folder(asked.subjects)


def _check_measured(asked: Asked) -> None:
    """Refuse a metric of the server's where clients have models that only they can measure."""
    target = None if asked.target is None else asked.target.partition("=")[0]
    for option, metric in (("--metric", asked.metric), ("--target", target)):
        phase, _, name = (metric or "").partition("/")
        if LOCAL in asked.arms and phase in ("test", "pooled", "nodes"):
            raise ScenarioError(
                f"{option} {metric}: with --arm {LOCAL} every client has a model of its own, which "
                f"only clients measure; say local/{name}_mean"
            )
