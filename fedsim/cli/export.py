"""`fedsim export`: a finished run's model, for use without fedsim."""

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.app import CommandOutcome, JsonOption, SetOption, app, finish
from fedsim.cli.words import columns


@app.command(
    epilog="""\b
Examples:
  fedsim export runs/quickstart-20260101T120000Z-1a2b --to model
  fedsim export runs/first --best --to model     with [evaluation] keep_best
  fedsim export runs/first --to model --set data.path=/new/place/data.csv
""",
)
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", hidden=True)],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="The folder to make; must not exist yet.")
    ],
    best: Annotated[
        bool, typer.Option("--best", help="The best model ([evaluation] keep_best), not the last.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a finished run's model for use without fedsim.

    RUN is the folder of a run. The new folder holds the weights under torch's names, the network,
    the classes' names, what is done to a sample before, and a README with the lines of torch that
    use them. The run's data must be at hand; `--set` says where they lie now.
    """

    def produce() -> CommandOutcome:
        from fedsim.runs.export import export as write

        done = write(run_folder, to, best=best, overrides=overrides or [])
        document = {
            "folder": str(done.folder),
            "files": list(done.files),
            "round": done.round,
            "params_sha256": done.params_sha256,
        }
        facts = [
            ("folder", str(done.folder)),
            ("files", ", ".join(done.files)),
            ("model", f"after round {done.round}{', the best' if best else ''}"),
            ("params", done.params_sha256),
            ("see", str(done.folder / "README.md")),
        ]
        return CommandOutcome(document, columns(facts))

    finish(produce, as_json=as_json)
