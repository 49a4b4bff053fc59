"""The command line: `fedsim run`, `resume`, `plan`, `compare`, `tune`, `list` and others.

Results go to standard output (with `--json` exactly one JSON document), everything else to standard
error. Exit codes: 0 done, 1 failed, 2 refused, 3 a claim of `[expect]` is broken, 130 interrupted,
143 terminated.

Nothing heavy is imported before a command needs it, so that `--help` comes at once.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedsim import __version__
from fedsim.errors import FedsimError, ScenarioError

if TYPE_CHECKING:
    from fedsim.discovery import Entry
    from fedsim.planning import Plans
    from fedsim.profile import Profile
    from fedsim.run import RunResult
    from fedsim.scenario import Scenario
    from fedsim.studies.command import Answer

OK, FAILED, REFUSED, BROKEN, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

app = typer.Typer(
    name="fedsim",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    suggest_commands=False,
    pretty_exceptions_enable=False,
    help="""Federated learning experiments that come out the same twice.

A scenario file says what is run: data, partition, participation, strategy, client, engine.

\b
  fedsim run quickstart                      a scenario that comes with fedsim
  fedsim run my.toml --set strategy.name=fedavg --set rounds=5
  fedsim resume runs/my-20260101T120000Z-1a2b
  fedsim plan my.toml                        the fastest way to run it here
  fedsim compare my.toml --vary strategy.name=fedavg,fedau --seeds 10
  fedsim tune my.toml --grid client.local_lr=0.01,0.1,1
  fedsim check scenarios                     do they still do what was recorded?
  fedsim evidence                            the papers' claims, and what is seen of them
  fedsim list strategies fedavg              its hyperparameters and defaults
  fedsim partition my.toml --png who.png     who holds what, before training
  fedsim new demo                            a project with your model, data and strategy
  fedsim doctor                              what this machine has, and what it lacks

Exit codes: 0 done, 1 failed, 2 refused, 3 a claim of [expect] is broken, 130 interrupted,
143 terminated.
""",
)


class _Outcome(NamedTuple):
    """What a command has to say: a document for programs, lines for people, an exit code.

    What `ended_early` says goes to standard error: it is no result.
    """

    document: Mapping[str, Any]
    lines: Sequence[str]
    code: int = OK
    ended_early: bool = False


# Arguments are explained in the text of their commands: whether typer lists their help depends on
# the version of click beside it.
ScenarioArgument = Annotated[str, typer.Argument(metavar="SCENARIO", hidden=True)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Override a scenario value; may be repeated. Values are TOML, bare words are strings.",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(metavar="N", help="Use at most N workers; N >= 1.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Read data sets from the folders of their names in DIR."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


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

    def produce() -> _Outcome:
        begun = time.perf_counter()
        from fedsim.progress import Progress
        from fedsim.scenario import load

        _check_workers(workers)
        loaded = load(scenario, overrides or [])
        from fedsim.run import start

        profile = _new_profile(begun) if profiled else None
        with loaded.named_in_refusals(), Progress(loaded.rounds, quiet=quiet) as progress:
            result = start(loaded, out=out, workers=workers, progress=progress, profile=profile)
        return _run_outcome(result, profile)

    _finish(produce, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  fedsim resume runs/quickstart-20260101T120000Z-1a2b
  fedsim resume runs/first --workers 1 --set engine.kind=inline
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
    result may be set anew, such as the engine that computes it.
    """

    def produce() -> _Outcome:
        from fedsim.progress import Progress
        from fedsim.run_folder import open_existing

        _check_workers(workers)
        loaded = open_existing(run_folder).scenario().with_overrides(overrides or [])
        from fedsim.run import resume as go_on

        with loaded.named_in_refusals(), Progress(loaded.rounds, quiet=quiet) as progress:
            result = go_on(
                run_folder, workers=workers, overrides=overrides or [], progress=progress
            )
        return _run_outcome(result)

    _finish(produce, as_json=as_json)


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

    def produce() -> _Outcome:
        from fedsim.scenario import find, load

        _check_workers(workers)
        if rounds < 2:
            raise ScenarioError(f"--rounds {rounds}: must be >= 2")
        if write is not None and overrides:
            raise ScenarioError("--write with --set: put the changes into the scenario first")
        if write is not None and write.exists():
            raise ScenarioError(f"--write {write}: exists already")
        loaded = load(scenario, overrides or [])
        from fedsim import planning

        def note(text: str) -> None:
            if not quiet:
                typer.echo(text, err=True)

        with loaded.named_in_refusals():
            plans = planning.measure(loaded, rounds=rounds, workers=workers, note=note)
        if write is not None:
            planning.write(find(scenario), write, plans.best.settings)
        return _plan_outcome(plans, write)

    _finish(produce, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  fedsim compare quickstart --vary partition.alpha=0.1,1 --seeds 5
  fedsim compare quickstart --vary strategy.name=fedavg,fedau --vary partition.clients=20,50
  fedsim compare mine.toml theirs.toml --seeds 10 --target test/accuracy=0.9
  fedsim compare studies/quickstart             go on, or show it again
  fedsim compare runs/first runs/second
""",
)
def compare(
    subjects: Annotated[list[str], typer.Argument(metavar="SCENARIO...", hidden=True)],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE.KEY=A,B",
            help="Compare these values; may be repeated, all combinations are run.",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N", help="So many seeds from the scenario's on, or a list: 1,2,5."),
    ] = None,
    overrides: SetOption = None,
    metric: Annotated[
        str | None, typer.Option(metavar="METRIC", help="What is compared; test/accuracy.")
    ] = None,
    last: Annotated[
        float, typer.Option(metavar="SHARE", help="Its mean over this last share of the rounds.")
    ] = 0.1,
    target: Annotated[
        str | None,
        typer.Option(metavar="METRIC=VALUE", help="Say what it cost to reach this value."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="VALUE", help="The varied value that others are held against."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The study's folder. Default: studies/SCENARIO."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Run at most N at the same time; N >= 1.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Hold scenarios, or variants of one, beside each other over several seeds.

    SCENARIO is a file, or the name of one that comes with fedsim; or folders of finished runs; or
    the folder of a study. Runs that are missing are made, as many at a time as this machine has
    room for; those that have finished never again. It prints means, paired differences and what it
    cost, and writes them as CSV, JSON and pictures. Exits with 1 when a run failed.
    """

    def produce() -> _Outcome:
        from fedsim.studies.command import Asked, run_compare

        asked = Asked(
            subjects, vary or [], seeds, overrides or [], metric, last, target, baseline, out,
            workers,
        )  # fmt: skip
        return _study_outcome(run_compare(asked, width=_terminal_width(), quiet=quiet))

    _finish(produce, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  fedsim tune quickstart
  fedsim tune quickstart --vary strategy.name=fedavg,fedau --grid client.local_lr=0.03,0.1,0.3
  fedsim tune quickstart --random 20 --grid client.local_lr=0.001,1 --grid client.local_epochs=1,8
""",
)
def tune(
    scenario: ScenarioArgument,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE.KEY=A,B",
            help="Try these values; may be repeated. Default: client.local_lr=0.01,0.03,0.1,0.3,1.",
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE.KEY=A,B", help="The methods, each of which tries the same values."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N", help="So many seeds, from 1000 above the scenario's on.")
    ] = "3",
    overrides: SetOption = None,
    random: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw N points between the values instead of a grid."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="METRIC", help="What is best; pooled/accuracy.")
    ] = None,
    last: Annotated[
        float, typer.Option(metavar="SHARE", help="Its mean over this last share of the rounds.")
    ] = 0.1,
    keep: Annotated[
        float,
        typer.Option(metavar="SHARE", help="This share of a method's points outlives each seed."),
    ] = 0.5,
    widen: Annotated[
        int, typer.Option(metavar="N", help="The grid may grow N times while the best is its edge.")
    ] = 4,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The study's folder. Default: studies/SCENARIO-tune."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Run at most N at the same time; N >= 1.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find each method's best step size, or other keys, without looking at the test set.

    SCENARIO is a file, or the name of one that comes with fedsim. Clients keep a part of their
    samples to themselves, on which the model is judged; seeds are apart from those of final runs.
    All methods try the same values, which are widened while the best one lies on an edge. Runs that
    are there are not made again.
    """

    def produce() -> _Outcome:
        from fedsim.studies.tune_command import TuneAsked, run_tune

        asked = TuneAsked(
            scenario, grid or [], vary or [], seeds, overrides or [], random, metric, last, keep,
            widen, out, workers,
        )  # fmt: skip
        return _study_outcome(run_tune(asked, width=_terminal_width(), quiet=quiet))

    _finish(produce, as_json=as_json)


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

    SCENARIO is a file, a folder of them or the name of one that comes with fedsim. Each is run as
    it stands, and its first rounds in float64, in this process; a recording is `golden/NAME.json`
    beside the file. Exits with 3 when a claim is broken or something has drifted, with 1 when a run
    failed, with 2 when a scenario is refused. `pytest FOLDER` does the same.
    """

    def produce() -> _Outcome:
        from fedsim.checking.command import run_check

        def say(text: str) -> None:
            if not quiet:
                typer.echo(text, err=True)

        answer = run_check(
            scenarios or [], tier=tier, overrides=overrides or [], say=say, data=data
        )
        code = {"holds": OK, "BROKEN": BROKEN, "failed": FAILED, "refused": REFUSED}[answer.worst]
        return _Outcome({**answer.document, "exit_code": code}, answer.lines, code)

    _finish(produce, as_json=as_json)


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

    def produce() -> _Outcome:
        from fedsim.checking.command import run_golden

        answer = run_golden(scenarios, update=update, why=why, overrides=overrides or [], data=data)
        return _Outcome({**answer.document, "exit_code": OK}, answer.lines)

    _finish(produce, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  fedsim evidence
  fedsim evidence fedau --seeds 3
  fedsim evidence my_study.toml --page my_evidence.md
""",
)
def evidence(
    studies: Annotated[list[str] | None, typer.Argument(metavar="[STUDY]...", hidden=True)] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page. Default: evidence.md in the study's folder."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="So many seeds instead of the study's own.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the runs.")] = Path(
        "studies/evidence"
    ),
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Run at most N at the same time; N >= 1.")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run declared studies and write what they show: each method beside what explains it.

    STUDY is a file, or the name of one that comes with fedsim; all of these when left out. A study
    says what a paper claims and what is run: at equal steps and at each one's best. Runs that are
    there are not made again.
    """

    def produce() -> _Outcome:
        from fedsim.studies.evidence_command import EvidenceAsked, run_evidence

        asked = EvidenceAsked(studies or [], page, seeds, out, workers, data)
        return _study_outcome(run_evidence(asked, width=_terminal_width(), quiet=quiet))

    _finish(produce, as_json=as_json)


@app.command(
    name="list",
    epilog="""\b
Examples:
  fedsim list
  fedsim list partitions
  fedsim list strategies flower:FedAdam
""",
)
def list_(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", hidden=True)] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", hidden=True)] = None,
    as_json: JsonOption = False,
) -> None:
    """List what a scenario can name, and its keys.

    KIND is strategies, clients, datasets, partitions, participation, attacks, topologies, tasks,
    models or scenarios: it is listed with keys and defaults. With NAME, one of them is explained.
    """

    def produce() -> _Outcome:
        from fedsim import discovery

        if kind is None:
            everything = {known: discovery.names(known) for known in discovery.KINDS}
            for known in everything:
                everything[known] += discovery.flower_names(known)
            return _Outcome(everything, _listing(everything))
        entries = discovery.describe(kind, name)
        document = {kind: [_entry_document(entry) for entry in entries]}
        lines = [line for entry in entries for line in _entry_lines(entry, name is not None)]
        return _Outcome(document, lines)

    _finish(produce, as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  fedsim partition quickstart
  fedsim partition quickstart --set partition.alpha=0.05 --png skewed.png
""",
)
def partition(
    scenario: ScenarioArgument,
    overrides: SetOption = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw who holds what into this file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show who holds what, without training.

    SCENARIO is a file, or the name of one that comes with fedsim.
    """

    def produce() -> _Outcome:
        from fedsim.scenario import load

        loaded = load(scenario, overrides or [])
        with loaded.named_in_refusals():
            return _partition_outcome(loaded, png)

    _finish(produce, as_json=as_json)


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

    def produce() -> _Outcome:
        from fedsim.doctor import examine

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
        return _Outcome({**report.document(), "exit_code": code}, lines, code)

    _finish(produce, as_json=as_json)


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

    def produce() -> _Outcome:
        from fedsim.new import create

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
        return _Outcome(document, lines)

    _finish(produce, as_json=as_json)


def main() -> None:
    """Run the command line of this process."""
    # Import paths in a scenario may name modules beside it; what is installed comes first.
    sys.path.append(os.getcwd())
    app()


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise ScenarioError(f"--workers {workers}: must be >= 1")


def _terminal_width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


# What commands have to say.


def _new_profile(begun: float) -> "Profile":
    from fedsim.profile import Profile

    return Profile(begun)


def _study_outcome(answer: "Answer") -> _Outcome:
    code = FAILED if answer.failed else OK
    return _Outcome({**answer.document, "exit_code": code}, answer.lines, code)


def _run_outcome(result: "RunResult", profile: "Profile | None" = None) -> _Outcome:
    summary, folder = result.summary, result.folder
    final = {str(metric): value for metric, value in summary.get("final", {}).items()}
    claims = summary.get("expect") or []
    broken = any(not claim["holds"] for claim in claims)
    facts = [
        ("run folder", str(folder)),
        ("rounds", f"{summary['rounds']}{_because(summary.get('stopped'))}"),
        ("time", f"{summary['wall_time_s']:.1f} s"),
        *((metric, _number(value)) for metric, value in final.items()),
        ("params", str(summary["params_sha256"])),
        ("see", f"{folder / 'metrics.jsonl'}, {folder / 'summary.json'}"),
    ]
    lines = _columns(facts)
    if claims:
        rows = [("claim", "measured", "verdict")]
        for claim in claims:
            verdict = "holds" if claim["holds"] else "BROKEN"
            rows.append((f"{claim['metric']} {claim['claim']}", _number(claim["value"]), verdict))
        lines += ["", *_columns(rows)]
    code = BROKEN if broken else OK
    document = {**summary, "folder": str(folder), "exit_code": code}
    if profile is not None:
        lines += ["", *profile.lines()]
        document["profile"] = profile.report()
    return _Outcome(document, lines, code)


def _plan_outcome(plans: "Plans", written: Path | None) -> _Outcome:
    from fedsim.planning import toml_lines

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
    lines = _columns(rows, gap="  ")
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
    return _Outcome(document, lines)


def _because(stopped: str | None) -> str:
    return f" ({stopped})" if stopped else ""


def _partition_outcome(scenario: "Scenario", png: Path | None) -> _Outcome:
    from fedsim.data import prepare
    from fedsim.data.statistics import draw_partition, partition_statistics

    data = prepare(scenario.data, scenario.partition, seed=scenario.seed)
    statistics = partition_statistics(data)
    document = {**statistics, "manifest_sha256": data.manifest_sha256}
    counted = "" if statistics["complete"] else f" (the first {statistics['counted']} are counted)"
    tested = data.manifest["local_test"].get("samples")
    kind = statistics["label_kind"]
    plural = {"class": "classes", "tenth": "tenths"}[kind]
    facts = [
        ("clients", f"{statistics['clients']}{counted}"),
        (
            "samples",
            f"{statistics['samples']} in training, {statistics['held_out']} held out"
            + (f", {tested} in local test splits" if tested else ""),
        ),
        *_dropped_and_owned(statistics),
        ("samples per client", _spread(statistics["sizes"])),
        (f"{plural} per client", _spread(statistics["classes_per_client"])),
        ("total variation", _spread(statistics["total_variation"]) + " (0 is IID, 1 disjoint)"),
        ("manifest", data.manifest_sha256),
    ]
    named = any(row["name"] != str(row["label"]) for row in statistics["labels"])
    head = (statistics["label_kind"], *(["name" if kind == "class" else "targets"] * named))
    rows: list[tuple[str, ...]] = [(*head, "samples", "share", "clients")]
    for row in statistics["labels"]:
        name = [row["name"]] * named
        cells = (row["label"], *name, row["samples"], f"{row['share']:.3f}", row["clients"])
        rows.append(tuple(map(str, cells)))
    if png is not None:
        try:
            draw_partition(data, png)
        except (OSError, ValueError) as error:
            raise ScenarioError(f"--png {png}: cannot be drawn: {error}") from error
        facts.append(("picture", str(png)))
        document["png"] = str(png)
    return _Outcome(document, [*_columns(facts), "", *_columns(rows)])


def _dropped_and_owned(statistics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What of a partition is worth a line only where it happens."""
    facts = []
    if statistics["dropped"]["samples"]:
        facts.append(
            ("dropped", f"{statistics['dropped']['samples']}: {statistics['dropped']['reason']}")
        )
    if owners := statistics["owners"]:
        names = [f"{client}: {name}" for client, name in enumerate(owners["of_first_clients"][:5])]
        more = "; ..." if statistics["clients"] > len(names) else ""
        facts.append(("owners", f"{owners['with_a_client']} of {owners['in_data']} have a client"))
        facts.append(("clients are", "; ".join(names) + more))
    if skew := statistics["feature_skew"]:
        facts.append(
            ("features differ", ", ".join(f"{key} {value}" for key, value in skew.items()))
        )
    return facts


def _spread(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in summary.items())


def _listing(everything: Mapping[str, Sequence[str]]) -> list[str]:
    width = max(map(len, everything)) + 3
    lines = []
    for kind, known in everything.items():
        lines += _wrapped(", ".join(known), first=kind.ljust(width), indent=width)
    return [
        *lines,
        "",
        "`fedsim list KIND` shows keys and defaults, `fedsim list KIND NAME` explains",
    ]


def _entry_document(entry: "Entry") -> dict[str, Any]:
    return {
        "name": entry.name,
        "description": entry.description,
        "keys": {
            key.name: {
                "type": key.type_name,
                "required": key.required,
                "default": key.default,
                "description": key.description,
            }
            for key in entry.keys.values()
        },
    }


def _entry_lines(entry: "Entry", explained: bool) -> list[str]:
    lines = _wrapped(entry.description, first=f"{entry.name}: ", indent=4)
    settings = [
        f"{key.name}{'' if key.required else f' = {_toml(key.default)}'}"
        for key in entry.keys.values()
    ]
    if not explained:
        return (
            [*lines, *_wrapped(", ".join(settings), first="    ", indent=4)] if settings else lines
        )
    for key, setting in zip(entry.keys.values(), settings, strict=True):
        required = "; must be given" if key.required else ""
        lines += ["", f"  {setting}   ({key.type_name}{required})"]
        lines += _wrapped(key.description, first="      ", indent=6) if key.description else []
    return lines


def _toml(value: Any) -> str:
    """Write a default as a scenario would; what is none is left out there."""
    return "none" if value is None else json.dumps(value, default=str)


def _wrapped(text: str, *, first: str, indent: int) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
    ) or [first.rstrip()]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Sequence[str]], *, gap: str = "   ") -> list[str]:
    """Align rows of cells; the last cell of a row is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


# How a command ends.


def _finish(produce: Callable[[], _Outcome], *, as_json: bool) -> None:
    """Do a command's work, print what came of it, and exit with its code."""
    try:
        with _terminable(), _only_results_on_stdout() if as_json else contextlib.nullcontext():
            outcome = produce()
    except _Terminated as error:
        outcome = _failure(TERMINATED, "terminated", error)
    except KeyboardInterrupt as error:
        outcome = _failure(INTERRUPTED, "interrupted", error)
    except ScenarioError as error:
        outcome = _failure(REFUSED, str(error), error)
    except FedsimError as error:
        outcome = _failure(FAILED, str(error), error)
    except Exception as error:
        outcome = _failure(FAILED, f"{type(error).__name__}: {error}", error)
    if as_json:
        from fedsim.run_folder import to_json

        typer.echo(to_json(outcome.document))
    if outcome.ended_early or not as_json:
        typer.echo("\n".join(outcome.lines), err=outcome.ended_early)
    raise typer.Exit(outcome.code)


def _failure(code: int, message: str, error: BaseException) -> _Outcome:
    from fedsim.run_folder import LOG_FILE, folder_of

    folder = folder_of(error)
    lines = [f"fedsim: {line}" for line in message.splitlines()]
    document: dict[str, Any] = {"error": message, "exit_code": code}
    if folder is not None:
        document["folder"] = str(folder)
        resume_command = f"fedsim resume {shlex.quote(str(folder))}"
        if code == FAILED:
            lines.append(f"fedsim: the traceback is in {folder / LOG_FILE}")
        if code != REFUSED and getattr(error, "resumable", True):
            lines.append(f"fedsim: `{resume_command}` goes on from the last checkpoint")
    elif go_on := vars(error).get("fedsim_go_on"):
        lines.append(f"fedsim: {go_on} goes on; what has finished is not run again")
    elif code == FAILED and not isinstance(error, FedsimError):
        lines.append(f"fedsim: the traceback is in {_write_traceback(error)}")
    return _Outcome(document, lines, code, ended_early=True)


class _Terminated(KeyboardInterrupt):
    """The process was asked to end, as batch systems do; it ends as one that was interrupted."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End on SIGTERM as on an interrupt: with a line that says how to go on."""

    def terminate(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_traceback(error: BaseException) -> str:
    """Keep the traceback of what failed before there was a run folder to log it in."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="fedsim-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    return file.name


@contextlib.contextmanager
def _only_results_on_stdout() -> Iterator[None]:
    """Send to standard error what libraries and worker processes print meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
