"""fedsim doctor."""

import math
import shutil
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.basics.errors import ScenarioError
from fedsim.cli.app import (
    FAILED,
    OK,
    REFUSED,
    CommandOutcome,
    JsonOption,
    SetOption,
    app,
    finish,
)

if TYPE_CHECKING:
    pass


@app.command(
    epilog="""\b
Examples:
  fedsim doctor
  fedsim doctor --ray
  fedsim doctor my.toml --set engine.device=cuda
  fedsim doctor --json | jq .ready
""",
)
def doctor(
    scenario: Annotated[str | None, typer.Argument(metavar="[SCENARIO]", hidden=True)] = None,
    overrides: SetOption = None,
    start_ray: Annotated[
        bool, typer.Option("--ray", help="Really start Ray and one worker, and end both.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Seconds that --ray may take; > 0.")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, what is missing, and how to get it.

    With SCENARIO, a file or the name of one that comes with fedsim: whether it can be run here.
    Nothing is downloaded or trained. Exits with 1 when something needed is missing.
    """

    def produce() -> CommandOutcome:
        from fedsim.cli.doctor.examination import examine

        if not 0 < timeout < math.inf:
            raise ScenarioError(f"--timeout {timeout:g}: must be > 0 and finite")
        if overrides and scenario is None:
            raise ScenarioError(f"--set {overrides[0]}: needs a SCENARIO to change")
        report = examine(
            scenario, overrides=overrides or [], start_ray=start_ray, timeout_s=timeout
        )
        code = REFUSED if report.refused else OK if report.ready else FAILED
        width = min(shutil.get_terminal_size().columns, 100)
        lines = report.lines(width=width, colour=sys.stdout.isatty())
        return CommandOutcome({**report.document(), "exit_code": code}, lines, code)

    finish(produce, as_json=as_json)
