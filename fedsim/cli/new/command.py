"""fedsim new."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.app import (
    OK,
    CommandOutcome,
    JsonOption,
    app,
    finish,
)

if TYPE_CHECKING:
    pass


@app.command(
    epilog="""\b
Examples:
  fedsim new demo && cd demo && fedsim run scenario.toml
  fedsim new experiments/demo --client
""",
)
def new(
    name: Annotated[Path, typer.Argument(metavar="NAME", hidden=True)],
    client: Annotated[
        bool, typer.Option("--client", help="Add a client procedure of your own, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a project with your model, your data and your strategy, which runs at once.

    NAME becomes a folder, which must not hold anything yet, and a Python package in it. Edit its
    files; the scenario names them by import path.
    """

    def produce() -> CommandOutcome:
        from fedsim.cli.new.project import create

        project = create(name, client=client)
        lines = [
            f"{project.folder}/",
            *(f"  {file}" for file in project.files),
            "",
            "run it:",
            f"  {project.next_command}",
        ]
        document = {
            "folder": str(project.folder),
            "files": project.files,
            "next": project.next_command,
            "exit_code": OK,
        }
        return CommandOutcome(document, lines)

    finish(produce, as_json=as_json)
