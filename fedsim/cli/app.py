"""Shared by all commands: the app, common options, and how a command ends with which exit code."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedsim.basics.errors import FedsimError, ScenarioError
from fedsim.basics.text import names_of
from fedsim.cli.words import columns, number

if TYPE_CHECKING:
    from fedsim.cli.compare_study import StudyAnswer
    from fedsim.runs.execute import RunResult
    from fedsim.runs.profile import Profile

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
  fedsim export runs/my-1a2b --to model      its model for use without fedsim
  fedsim plan my.toml                        the fastest way to run it here
  fedsim compare my.toml --vary strategy.name=fedavg,fedau --seeds 10
  fedsim tune my.toml --grid client.local_lr=0.01,0.1,1
  fedsim check scenarios                     do they still do what was recorded?
  fedsim evidence                            the papers' claims, and what is seen of them
  fedsim list strategies fedavg              its hyperparameters and defaults
  fedsim partition my.toml --png who.png     who holds what, before training
  fedsim metrics runs                        what Prometheus is told of runs
  fedsim new demo                            a project with your model, data and strategy
  fedsim doctor                              what this machine has, and what it lacks

Exit codes: 0 done, 1 failed, 2 refused, 3 a claim of [expect] is broken, 130 interrupted,
143 terminated.
""",
)


class CommandOutcome(NamedTuple):
    """The answer of a command: a document for programs, lines for people, an exit code.

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


def check_workers(workers: int | None) -> None:
    """Refuse a number of workers below one.

    Raises:
        ScenarioError: Naming the option.
    """
    if workers is not None and workers < 1:
        raise ScenarioError(f"--workers {workers}: must be >= 1")


def check_data(folder: Path | None) -> None:
    """Refuse a folder of data sets that is not there.

    Raises:
        ScenarioError: Naming the option.
    """
    if folder is not None and not folder.is_dir():
        raise ScenarioError(f"--data {folder}: there is no such folder")


def terminal_width() -> int:
    """Return how wide tables may be."""
    return min(shutil.get_terminal_size().columns, 120)


def finish(produce: Callable[[], CommandOutcome], *, as_json: bool) -> None:
    """Do a command's work, print what came of it, and exit with its code."""
    terminated = threading.Event()
    try:
        with (
            _terminable(terminated),
            _only_results_on_stdout() if as_json else contextlib.nullcontext(),
        ):
            outcome = produce()
    except KeyboardInterrupt as error:
        # Ray, and other libraries, raise an interrupt of their own in place of the one that came
        if terminated.is_set():
            outcome = _failure(TERMINATED, "terminated", error)
        else:
            outcome = _failure(INTERRUPTED, "interrupted", error)
    except ScenarioError as error:
        outcome = _failure(REFUSED, str(error), error)
    except FedsimError as error:
        outcome = _failure(FAILED, str(error), error)
    except Exception as error:
        outcome = _failure(FAILED, f"{type(error).__name__}: {error}", error)
    if as_json:
        from fedsim.basics.json_files import to_json

        _result(to_json(outcome.document), outcome)
    if outcome.ended_early:
        tell("\n".join(outcome.lines))
    elif not as_json:
        _result("\n".join(outcome.lines), outcome)
    raise typer.Exit(outcome.code)


def tell(text: str) -> None:
    """Write lines to standard error; they are lost where it is full or closed."""
    with contextlib.suppress(OSError, ValueError):
        typer.echo(text, err=True)


def _result(text: str, outcome: CommandOutcome) -> None:
    """Write a result to standard output.

    Raises:
        Exit: If it takes nothing; a pipe that nobody reads any more is typer's to end.
    """
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        folder = outcome.document.get("folder")
        tell(unwritten(error) + (f"; the result is in {folder}" if folder else ""))
        raise typer.Exit(outcome.code or FAILED) from None


def unwritten(error: OSError) -> str:
    """Say that standard output takes nothing; what is left of it is thrown away."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return f"fedsim: standard output cannot be written: {error.strerror or error}"


def _failure(code: int, message: str, error: BaseException) -> CommandOutcome:
    from fedsim.runs.folder import LOG_FILE, folder_of, resuming

    folder = folder_of(error)
    lines = [f"fedsim: {line}" for line in message.splitlines()]
    document: dict[str, Any] = {"error": message, "exit_code": code}
    if folder is not None:
        document["folder"] = str(folder)
        if code == FAILED:
            lines.append(f"fedsim: the traceback is in {folder / LOG_FILE}")
        if code != REFUSED and getattr(error, "resumable", True):
            lines.append(f"fedsim: `{resuming(folder)}` goes on from the last checkpoint")
    elif go_on := vars(error).get("fedsim_go_on"):
        lines.append(f"fedsim: {go_on} goes on; what has finished is not run again")
    elif code == FAILED and not isinstance(error, FedsimError):
        lines.append(f"fedsim: the traceback is in {_write_traceback(error)}")
    return CommandOutcome(document, lines, code, ended_early=True)


@contextlib.contextmanager
def _terminable(terminated: threading.Event) -> Iterator[None]:
    """End on SIGTERM as on an interrupt: with a line that says how to go on.

    Args:
        terminated: Is set where SIGTERM came, as batch systems send it.
    """

    def terminate(*_: object) -> None:
        terminated.set()
        raise KeyboardInterrupt

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


def run_outcome(result: "RunResult", profile: "Profile | None" = None) -> CommandOutcome:
    """Return what a command says of a run that ended.

    Args:
        result: What it came to.
        profile: Where the time went, if that was asked for.
    """
    summary, folder = result.summary, result.folder
    final = {str(metric): value for metric, value in summary.get("final", {}).items()}
    claims = summary.get("expect") or []
    broken = any(not claim["holds"] for claim in claims)
    facts = [
        ("run folder", str(folder)),
        ("rounds", f"{summary['rounds']}{_because(summary.get('stopped'))}"),
        ("time", f"{summary['wall_time_s']:.1f} s"),
        *((metric, number(value)) for metric, value in final.items()),
        *_best(summary.get("best")),
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


def _best(best: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if best is None:
        return []
    return [("best", f"round {best['round']}: {best['metric']} {number(best['value'])}")]


def _because(stopped: str | None) -> str:
    return f" ({stopped})" if stopped else ""


AtOnceOption = Annotated[
    int | None, typer.Option(metavar="N", help="Run at most N at the same time; N >= 1.")
]


LastOption = Annotated[
    float, typer.Option(metavar="SHARE", help="Its mean over this last share of the rounds.")
]


def study_outcome(answer: "StudyAnswer") -> CommandOutcome:
    """Return what a command says of a study."""
    code = FAILED if answer.failed else OK
    return CommandOutcome({**answer.document, "exit_code": code}, answer.lines, code)
