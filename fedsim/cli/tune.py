"""fedsim tune: each method with the best of the values tried."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.app import (
    AtOnceOption,
    CommandOutcome,
    JsonOption,
    LastOption,
    QuietOption,
    ScenarioArgument,
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
        return study_outcome(run_tune(asked, width=terminal_width(), quiet=quiet))

    finish(produce, as_json=as_json)
