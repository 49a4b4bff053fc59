"""`fedsim check` and `golden`."""

from typing import Annotated

import typer

from fedsim.cli.app import (
    BROKEN,
    FAILED,
    OK,
    REFUSED,
    CommandOutcome,
    DataOption,
    JsonOption,
    QuietOption,
    SetOption,
    app,
    check_data,
    finish,
)


@app.command(
    epilog="""\b
Examples:
  fedsim check                               the fast ones of ./scenarios
  fedsim check scenarios --tier all --data /data   with /data/mnist in it
  fedsim check quickstart --json
""",
)
def check(
    scenarios: Annotated[
        list[str] | None, typer.Argument(metavar="[SCENARIO...]", hidden=True)
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            metavar="TIER", help="Of folders, check these: fast (default), slow, gpu, deploy, all."
        ),
    ] = None,
    overrides: SetOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Hold scenarios against their claims and their recordings.

    SCENARIO is a file, a folder of them or the name of one that comes with fedsim; left out, the
    folder `scenarios`, or those that come with fedsim where there is none. Each is run as it
    stands, and its first rounds in float64, with portable bits; a recording is
    `golden/NAME.json` beside the file. Exits with 3 when a claim is broken or something has
    drifted, with 1 when a run failed, with 2 when a scenario is refused. `pytest FOLDER` does the
    same.
    """

    def produce() -> CommandOutcome:
        check_data(data)
        from fedsim.cli.check import run_check

        def say(text: str) -> None:
            if not quiet:
                typer.echo(text, err=True)

        answer = run_check(
            scenarios or [], tier=tier, overrides=overrides or [], say=say, data=data
        )
        code = {"holds": OK, "BROKEN": BROKEN, "failed": FAILED, "refused": REFUSED}[answer.worst]
        return CommandOutcome({**answer.document, "exit_code": code}, answer.lines, code)

    finish(produce, as_json=as_json)


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
        from fedsim.cli.check import run_golden

        answer = run_golden(scenarios, update=update, why=why, overrides=overrides or [], data=data)
        return CommandOutcome({**answer.document, "exit_code": OK}, answer.lines)

    finish(produce, as_json=as_json)
