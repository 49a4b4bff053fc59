"""`fedsim compare`: methods beside each other, over seeds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.app import (
    AtOnceOption,
    CommandOutcome,
    JsonOption,
    LastOption,
    QuietOption,
    SetOption,
    app,
    check_workers,
    finish,
    study_outcome,
    terminal_width,
)

if TYPE_CHECKING:
    pass


@app.command(
    epilog="""\b
Examples:
  fedsim compare quickstart --vary partition.alpha=0.1,1 --seeds 5
  fedsim compare quickstart --vary strategy.name=fedavg,fedau --vary partition.clients=20,50
  fedsim compare mine.toml theirs.toml --seeds 10 --target test/accuracy=0.9
  fedsim compare mine.toml --arm centralised --arm local --seeds 5   what is federating worth?
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
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="ARM",
            help="Beside it a reference without a federation: centralised, local; may be repeated.",
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
            workers, arms or [],
        )  # fmt: skip
        return study_outcome(run_compare(asked, width=terminal_width(), quiet=quiet))

    finish(produce, as_json=as_json)
