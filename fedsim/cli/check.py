"""`fedsim check`: claims and recordings of scenarios."""

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
    tell,
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
        from fedsim.cli.check_study import run_check

        def say(text: str) -> None:
            if not quiet:
                tell(text)

        answer = run_check(
            scenarios or [], tier=tier, overrides=overrides or [], say=say, data=data
        )
        code = {"holds": OK, "BROKEN": BROKEN, "failed": FAILED, "refused": REFUSED}[answer.worst]
        return CommandOutcome({**answer.document, "exit_code": code}, answer.lines, code)

    finish(produce, as_json=as_json)
