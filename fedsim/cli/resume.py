"""fedsim resume: a run that was interrupted goes on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.basics.loading import loads
from fedsim.cli.app import (
    CommandOutcome,
    JsonOption,
    QuietOption,
    SetOption,
    WorkersOption,
    app,
    check_workers,
    finish,
    run_outcome,
)

if TYPE_CHECKING:
    pass


@app.command(
    epilog="""\b
Examples:
  fedsim resume runs/quickstart-20260101T120000Z-1a2b
  fedsim resume runs/first --workers 1 --set engine.kind=inline
  fedsim resume runs/first --set data.path=/new/place/data.csv --set modules=/new/place/project
""",
)
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", hidden=True)],
    overrides: SetOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Go on with an interrupted run, to the same bits.

    RUN is the folder of a run; it goes on from its last checkpoint. Only what cannot change the
    result may be set anew, such as the engine that computes it, or where files lie that were moved.
    """

    def produce() -> CommandOutcome:
        from fedsim.runs.folder import open_existing
        from fedsim.runs.progress import Progress

        check_workers(workers)
        folder = open_existing(run_folder)
        from fedsim.runs.left_behind import take_up

        loaded = take_up(folder, overrides or [])
        with loads("a run"):
            from fedsim.runs.start import resume as go_on

        with loaded.named_in_refusals(), Progress(loaded.rounds, quiet=quiet) as progress:
            result = go_on(
                run_folder, workers=workers, overrides=overrides or [], progress=progress
            )
        return run_outcome(result)

    finish(produce, as_json=as_json)
