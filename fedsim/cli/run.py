"""`fedsim run`, `resume` and `plan`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim import __version__
from fedsim.basics.errors import ScenarioError
from fedsim.basics.text import names_of
from fedsim.cli.app import (
    BROKEN,
    OK,
    CommandOutcome,
    JsonOption,
    QuietOption,
    ScenarioArgument,
    SetOption,
    WorkersOption,
    app,
    check_workers,
    finish,
)
from fedsim.cli.words import columns, number

if TYPE_CHECKING:
    from fedsim.runs.execute import RunResult
    from fedsim.runs.profile import Profile
    from fedsim.studies.plan_search import Plans


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
        from fedsim.runs.start import start

        profile = _new_profile(begun) if profiled else None
        with loaded.named_in_refusals(), Progress(loaded.rounds, quiet=quiet) as progress:
            result = start(loaded, out=out, workers=workers, progress=progress, profile=profile)
        return _run_outcome(result, profile)

    finish(produce, as_json=as_json)


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
        from fedsim.runs.start import resume as go_on

        with loaded.named_in_refusals(), Progress(loaded.rounds, quiet=quiet) as progress:
            result = go_on(
                run_folder, workers=workers, overrides=overrides or [], progress=progress
            )
        return _run_outcome(result)

    finish(produce, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  fedsim plan my.toml
  fedsim plan my.toml --write my_fast.toml
  fedsim plan quickstart --set engine.kind=inline --rounds 3
""",
)
def plan(
    scenario: ScenarioArgument,
    overrides: SetOption = None,
    write: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the scenario with the choice in it; must not exist yet."
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Rounds to measure of every way to run; N >= 2. Default: 7.",
            show_default=False,
        ),
    ] = 7,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure which executor, chunk size, threads and workers suit a scenario.

    SCENARIO is a file, or the name of one that comes with fedsim. Its own data, strategy and
    cohorts are used, a few rounds each way, in turn. Nothing is chosen by measurement in `fedsim
    run`: the choice counts once it is in the scenario, and may change the last bits of results.
    """

    def produce() -> CommandOutcome:
        from fedsim.scenario.load import find, load

        check_workers(workers)
        if rounds < 2:
            raise ScenarioError(f"--rounds {rounds}: must be >= 2")
        if write is not None and overrides:
            raise ScenarioError("--write with --set: put the changes into the scenario first")
        if write is not None and write.exists():
            raise ScenarioError(f"--write {write}: exists already")
        if write is not None and not write.parent.is_dir():
            raise ScenarioError(f"--write {write}: there is no folder {write.parent}")
        loaded = load(scenario, overrides or [])
        from fedsim.studies import plan_search

        def note(text: str) -> None:
            if not quiet:
                typer.echo(text, err=True)

        with loaded.named_in_refusals():
            plans = plan_search.measure(loaded, rounds=rounds, workers=workers, note=note)
        if write is not None:
            plan_search.write(find(scenario), write, plans.best.settings)
        return _plan_outcome(plans, write)

    finish(produce, as_json=as_json)


def _new_profile(begun: float) -> "Profile":
    from fedsim.runs.profile import Profile

    return Profile(begun)


def _run_outcome(result: "RunResult", profile: "Profile | None" = None) -> CommandOutcome:
    summary, folder = result.summary, result.folder
    final = {str(metric): value for metric, value in summary.get("final", {}).items()}
    claims = summary.get("expect") or []
    broken = any(not claim["holds"] for claim in claims)
    facts = [
        ("run folder", str(folder)),
        ("rounds", f"{summary['rounds']}{_because(summary.get('stopped'))}"),
        ("time", f"{summary['wall_time_s']:.1f} s"),
        *((metric, number(value)) for metric, value in final.items()),
        ("params", str(summary["params_sha256"])),
        ("see", f"{folder / 'metrics.jsonl'}, {folder / 'summary.json'}"),
    ]
    lines = columns(facts)
    if never := summary.get("always_failed"):
        causes = ", ".join(sorted(set(never.values())))
        lines += ["", f"{names_of([*never], 0)} failed in every round that asked for it: {causes}"]
    if claims:
        rows = [("claim", "measured", "verdict")]
        for claim in claims:
            verdict = "holds" if claim["holds"] else "BROKEN"
            rows.append((f"{claim['metric']} {claim['claim']}", number(claim["value"]), verdict))
        lines += ["", *columns(rows)]
    code = BROKEN if broken else OK
    document = {**summary, "folder": str(folder), "exit_code": code}
    if profile is not None:
        lines += ["", *profile.lines()]
        document["profile"] = profile.report()
    return CommandOutcome(document, lines, code)


def _plan_outcome(plans: "Plans", written: Path | None) -> CommandOutcome:
    from fedsim.studies.plan_search import toml_lines

    rows = [("executor", "chunk_size", "threads", "engine", "a round", "times faster", "")]
    ways = []
    for way in plans.ways:
        faster = way.times_faster(plans.now)
        about = f"about {plans.now.median_s / way.median_s:.2f}"  # not in the same rounds
        ratio = about if faster is None else "{:.2f} ({:.2f} to {:.2f})".format(*faster)
        several = f", {way.workers} worker{'s' * (way.workers != 1)}"
        engine = way.kind + several * (way.kind == "ray")
        what = "as it is" * way.as_it_is + ", " * (way.as_it_is and way is plans.best)
        what += "to take" * (way is plans.best)
        rows.append(
            (way.executor, str(way.chunk_size), str(way.threads), engine,
             f"{way.median_s * 1000:.1f} ms", ratio, what)
        )  # fmt: skip
        ways.append(
            {**way.settings, "median_s": way.median_s, "rounds": len(way.seconds),
             "as_it_is": way.as_it_is, "times_faster": faster}
        )  # fmt: skip
    lines = columns(rows, gap="  ")
    lines += ["", *(f"executor {name}: {why}" for name, why in plans.refused.items())]
    lines += [""] * bool(plans.refused)
    if written is not None:
        lines.append(f"written to {written}")
    elif plans.best is plans.now:
        lines.append("the scenario is as it should be")
    else:
        lines += ["[engine]", *toml_lines(plans.best.settings)]
    if plans.best.kind == "inline" and plans.now.kind == "ray":
        lines += ["", "inline does not outlive a client that hangs or ends its process; ray does"]
    document = {
        "ways": ways,
        "engine": plans.best.settings,
        "refused": plans.refused,
        "written": None if written is None else str(written),
        "exit_code": OK,
    }
    return CommandOutcome(document, lines)


def _because(stopped: str | None) -> str:
    return f" ({stopped})" if stopped else ""
