"""fedsim golden: recordings made anew."""

from typing import Annotated

import typer

from fedsim.cli.app import (
    OK,
    CommandOutcome,
    DataOption,
    JsonOption,
    SetOption,
    app,
    check_data,
    finish,
)


@app.command(
    epilog="""\b
Examples:
  fedsim golden scenarios                    what is recorded, and why
  fedsim golden --update scenarios/mine.toml --why "cutoff counts from round 1 now"
""",
)
def golden(
    scenarios: Annotated[list[str], typer.Argument(metavar="SCENARIO...", hidden=True)],
    update: Annotated[bool, typer.Option("--update", help="Run them and record anew.")] = False,
    why: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The reason; the recording keeps it.")
    ] = None,
    overrides: SetOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the recordings of scenarios, or record them anew with a reason.

    SCENARIO is a file, a folder of them or the name of one that comes with fedsim. Nothing else
    moves a recording, and none is made of a scenario whose claims are broken.
    """

    def produce() -> CommandOutcome:
        check_data(data)
        from fedsim.cli.check_study import run_golden

        answer = run_golden(scenarios, update=update, why=why, overrides=overrides or [], data=data)
        return CommandOutcome({**answer.document, "exit_code": OK}, answer.lines)

    finish(produce, as_json=as_json)
