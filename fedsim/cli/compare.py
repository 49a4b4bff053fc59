"""`fedsim compare`, `tune` and `evidence`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.app import (
    FAILED,
    OK,
    CommandOutcome,
    DataOption,
    JsonOption,
    QuietOption,
    ScenarioArgument,
    SetOption,
    app,
    check_data,
    check_workers,
    finish,
    terminal_width,
)

if TYPE_CHECKING:
    from fedsim.cli.compare_study import StudyAnswer

AtOnceOption = Annotated[
    int | None, typer.Option(metavar="N", help="Run at most N at the same time; N >= 1.")
]
LastOption = Annotated[
    float, typer.Option(metavar="SHARE", help="Its mean over this last share of the rounds.")
]


@app.command(
    epilog="""\b
Examples:
  fedsim compare quickstart --vary partition.alpha=0.1,1 --seeds 5
  fedsim compare quickstart --vary strategy.name=fedavg,fedau --vary partition.clients=20,50
  fedsim compare mine.toml theirs.toml --seeds 10 --target test/accuracy=0.9
  fedsim compare studies/quickstart             go on, or show it again
  fedsim compare runs/first runs/second
""",
)
def compare(
    subjects: Annotated[list[str], typer.Argument(metavar="SCENARIO...", hidden=True)],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE.KEY=A,B",
            help="Compare these values; may be repeated, all combinations are run.",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N", help="So many seeds from the scenario's on, or a list: 1,2,5."),
    ] = None,
    overrides: SetOption = None,
    metric: Annotated[
        str | None, typer.Option(metavar="METRIC", help="What is compared; test/accuracy.")
    ] = None,
    last: LastOption = 0.1,
    target: Annotated[
        str | None,
        typer.Option(metavar="METRIC=VALUE", help="Say what it cost to reach this value."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="VALUE", help="The varied value that others are held against."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The study's folder. Default: studies/SCENARIO."),
    ] = None,
    workers: AtOnceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Hold scenarios, or variants of one, beside each other over several seeds.

    SCENARIO is a file, or the name of one that comes with fedsim; or folders of finished runs; or
    the folder of a study. Runs that are missing are made, as many at a time as this machine has
    room for; those that have finished never again. It prints means, paired differences and what it
    cost, and writes them as CSV, JSON and pictures. Exits with 1 when a run failed.
    """

    def produce() -> CommandOutcome:
        check_workers(workers)
        from fedsim.cli.compare_study import Asked, run_compare

        asked = Asked(
            subjects, vary or [], seeds, overrides or [], metric, last, target, baseline, out,
            workers,
        )  # fmt: skip
        return _study_outcome(run_compare(asked, width=terminal_width(), quiet=quiet))

    finish(produce, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  fedsim tune quickstart
  fedsim tune quickstart --vary strategy.name=fedavg,fedau --grid client.local_lr=0.03,0.1,0.3
  fedsim tune quickstart --random 20 --grid client.local_lr=0.001,1 --grid client.local_epochs=1,8
""",
)
def tune(
    scenario: ScenarioArgument,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE.KEY=A,B",
            help="Try these values; may be repeated. Default: client.local_lr=0.01,0.03,0.1,0.3,1.",
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE.KEY=A,B", help="The methods, each of which tries the same values."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N", help="So many seeds, from 1000 above the scenario's on.")
    ] = "3",
    overrides: SetOption = None,
    random: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw N points between the values instead of a grid."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="METRIC", help="What is best; pooled/accuracy.")
    ] = None,
    last: LastOption = 0.1,
    keep: Annotated[
        float,
        typer.Option(metavar="SHARE", help="This share of a method's points outlives each seed."),
    ] = 0.5,
    widen: Annotated[
        int, typer.Option(metavar="N", help="The grid may grow N times while the best is its edge.")
    ] = 4,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The study's folder. Default: studies/SCENARIO-tune."),
    ] = None,
    workers: AtOnceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find each method's best step size, or other keys, without looking at the test set.

    SCENARIO is a file, or the name of one that comes with fedsim. Clients keep a part of their
    samples to themselves, on which the model is judged; seeds are apart from those of final runs.
    All methods try the same values, which are widened while the best one lies on an edge. Runs that
    are there are not made again.
    """

    def produce() -> CommandOutcome:
        check_workers(workers)
        from fedsim.cli.tune_study import TuneAsked, run_tune

        asked = TuneAsked(
            scenario, grid or [], vary or [], seeds, overrides or [], random, metric, last, keep,
            widen, out, workers,
        )  # fmt: skip
        return _study_outcome(run_tune(asked, width=terminal_width(), quiet=quiet))

    finish(produce, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  fedsim evidence
  fedsim evidence fedau --seeds 3
  fedsim evidence my_study.toml --page my_evidence.md
""",
)
def evidence(
    studies: Annotated[list[str] | None, typer.Argument(metavar="[STUDY]...", hidden=True)] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page. Default: evidence.md in the study's folder."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="So many seeds instead of the study's own.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the runs.")] = Path(
        "studies/evidence"
    ),
    workers: AtOnceOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run declared studies and write what they show: each method beside what explains it.

    STUDY is a file, or the name of one that comes with fedsim; all of these when left out. A study
    says what a paper claims and what is run: at equal steps and at each one's best. Runs that are
    there are not made again.
    """

    def produce() -> CommandOutcome:
        check_workers(workers)
        check_data(data)
        from fedsim.cli.evidence_study import EvidenceAsked, run_evidence

        asked = EvidenceAsked(studies or [], page, seeds, out, workers, data)
        return _study_outcome(run_evidence(asked, width=terminal_width(), quiet=quiet))

    finish(produce, as_json=as_json)


def _study_outcome(answer: "StudyAnswer") -> CommandOutcome:
    code = FAILED if answer.failed else OK
    return CommandOutcome({**answer.document, "exit_code": code}, answer.lines, code)
