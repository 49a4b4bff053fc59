"""fedsim plan: the fastest settings of the engine, measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.basics.errors import ScenarioError
from fedsim.cli.app import (
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
    tell,
)
from fedsim.cli.words import columns

if TYPE_CHECKING:
    from fedsim.studies.plan_search import Plans


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
                tell(text)

        with loaded.named_in_refusals():
            plans = plan_search.measure(loaded, rounds=rounds, workers=workers, note=note)
        if write is not None:
            plan_search.write(find(scenario), write, plans.best.settings)
        return _plan_outcome(plans, write)

    finish(produce, as_json=as_json)


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
