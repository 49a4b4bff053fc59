"""`fedsim run`, and the command itself."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim import __version__
from fedsim.basics.loading import loads
from fedsim.cli.app import (
    CommandOutcome,
    JsonOption,
    QuietOption,
    ScenarioArgument,
    SetOption,
    WorkersOption,
    app,
    check_workers,
    finish,
    run_outcome,
)

if TYPE_CHECKING:
    from fedsim.runs.profile import Profile


@app.callback(invoke_without_command=True)
def _fedsim(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"fedsim {__version__}")
        raise typer.Exit


@app.command(
    epilog="""\b
Examples:
  fedsim run quickstart
  fedsim run scenarios/quickstart.toml --workers 2 --out runs/first
  fedsim run quickstart --set engine.kind=inline --set rounds=5
  fedsim run quickstart --set 'partition={kind="iid", clients=20}'
  fedsim run quickstart --json | jq .final
  fedsim run quickstart --profile            where the time went
""",
)
def run(
    scenario: ScenarioArgument,
    overrides: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The run folder; must not exist yet. Default: runs/NAME-TIME-ID."
        ),
    ] = None,
    workers: WorkersOption = None,
    profiled: Annotated[
        bool, typer.Option("--profile", help="Say where the time went, and what would help.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a scenario and hold the result against its claims.

    SCENARIO is a file, or the name of one that comes with fedsim (`fedsim list scenarios`). All of
    it is checked before anything starts. The run folder that is named at the end holds the metrics
    of every round, a summary, checkpoints and the final parameters.
    """

    def produce() -> CommandOutcome:
        begun = time.perf_counter()
        from fedsim.runs.progress import Progress
        from fedsim.scenario.load import load

        check_workers(workers)
        loaded = load(scenario, overrides or [])
        with loads("a run"):
            from fedsim.runs.start import start

        profile = _new_profile(begun) if profiled else None
        with loaded.named_in_refusals(), Progress(loaded.rounds, quiet=quiet) as progress:
            result = start(loaded, out=out, workers=workers, progress=progress, profile=profile)
        return run_outcome(result, profile)

    finish(produce, as_json=as_json)


def _new_profile(begun: float) -> "Profile":
    from fedsim.runs.profile import Profile

    return Profile(begun)
