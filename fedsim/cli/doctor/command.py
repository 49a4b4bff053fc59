"""fedsim doctor."""

import math
import shutil
import sys
from pathlib import Path
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
    from fedsim.cli.doctor.examination import Report


@app.command(
    epilog="""\b
Examples:
  fedsim doctor
  fedsim doctor --ray
  fedsim doctor my.toml --set engine.device=cuda
  fedsim doctor --json | jq .ready
  fedsim doctor --deployment --superlink superlink:8000 --root-certificates ca.crt
  fedsim doctor --deployment --site /etc/fedsim/site.toml --scenario my.toml
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
    deployment: Annotated[
        bool, typer.Option("--deployment", help="Look at a node of a deployment instead.")
    ] = False,
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Its SuperLink: port, TLS, clock.")
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The authority of its certificate.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="The SuperLink speaks no TLS.")
    ] = False,
    site: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The node's site file and its places.")
    ] = None,
    of_scenario: Annotated[
        str | None,
        typer.Option("--scenario", metavar="FILE", help="What the server would be told of data."),
    ] = None,
    partition: Annotated[
        int | None, typer.Option(metavar="N", help="The node's partition-id, 0 by default.")
    ] = None,
    certificates: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Days left of each, and who reads keys.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, what is missing, and how to get it.

    With SCENARIO, a file or the name of one that comes with fedsim: whether it can be run here.
    Nothing is downloaded or trained. Exits with 1 when something needed is missing. With
    --deployment, what a node needs before any run, and what its site would tell the server.
    """

    def produce() -> CommandOutcome:
        from fedsim.cli.doctor.preflight.look import NodeOptions, prepare

        node = NodeOptions(
            superlink, root_certificates, insecure, site, of_scenario, overrides or [], partition,
            certificates,
        )  # fmt: skip
        if not deployment:
            for option in node.given():
                raise ScenarioError(f"{option}: needs --deployment")
            return _told(_examined(scenario, overrides or [], start_ray, timeout))
        if start_ray:
            raise ScenarioError("--ray: a node of a deployment starts no Ray; leave it out")
        if scenario is not None and of_scenario is not None:
            raise ScenarioError(f"--scenario {of_scenario}: {scenario} is named too; name one")
        return _told(prepare(node._replace(scenario=of_scenario or scenario)))

    finish(produce, as_json=as_json)


def _examined(
    scenario: str | None, overrides: list[str], start_ray: bool, timeout_s: float
) -> "Report":
    """Look at this machine.

    Raises:
        ScenarioError: If the options do not go together.
    """
    from fedsim.cli.doctor.examination import examine

    if not 0 < timeout_s < math.inf:
        raise ScenarioError(f"--timeout {timeout_s:g}: must be > 0 and finite")
    if overrides and scenario is None:
        raise ScenarioError(f"--set {overrides[0]}: needs a SCENARIO to change")
    return examine(scenario, overrides=overrides, start_ray=start_ray, timeout_s=timeout_s)


def _told(report: "Report") -> CommandOutcome:
    code = REFUSED if report.refused else OK if report.ready else FAILED
    width = min(shutil.get_terminal_size().columns, 100)
    lines = report.lines(width=width, colour=sys.stdout.isatty())
    return CommandOutcome({**report.document(), "exit_code": code}, lines, code)
