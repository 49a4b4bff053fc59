"""`fedsim list`, `partition`, `doctor` and `new`."""

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.basics.errors import ScenarioError
from fedsim.cli.app import (
    FAILED,
    OK,
    REFUSED,
    CommandOutcome,
    JsonOption,
    ScenarioArgument,
    SetOption,
    app,
    finish,
)
from fedsim.cli.words import columns, number, wrapped

if TYPE_CHECKING:
    from fedsim.scenario.discovery import Entry
    from fedsim.scenario.scenario import Scenario


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

    def produce() -> CommandOutcome:
        from fedsim.scenario import discovery

        if kind is None:
            everything = {known: discovery.names(known) for known in discovery.KINDS}
            for known in everything:
                everything[known] += discovery.flower_names(known)
            return CommandOutcome(everything, _listing(everything))
        entries = discovery.describe(kind, name)
        document = {kind: [_entry_document(entry) for entry in entries]}
        lines = [line for entry in entries for line in _entry_lines(entry, name is not None)]
        return CommandOutcome(document, lines)

    finish(produce, as_json=as_json)


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

    def produce() -> CommandOutcome:
        from fedsim.scenario.load import load

        loaded = load(scenario, overrides or [])
        with loaded.named_in_refusals():
            return _partition_outcome(loaded, png)

    finish(produce, as_json=as_json)


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

    def produce() -> CommandOutcome:
        from fedsim.cli.new.project import create

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
        return CommandOutcome(document, lines)

    finish(produce, as_json=as_json)


def _partition_outcome(scenario: "Scenario", png: Path | None) -> CommandOutcome:
    from fedsim.data.partitions.statistics import draw_partition, partition_statistics
    from fedsim.data.preparation import prepare

    data = prepare(scenario.data, scenario.partition, seed=scenario.seed)
    statistics = partition_statistics(data)
    document = {**statistics, "notes": list(data.said), "manifest_sha256": data.manifest_sha256}
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
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            if isinstance(error, FileNotFoundError):
                why = f"the folder {png.parent} does not exist"
            raise ScenarioError(f"--png {png}: cannot be drawn: {why}") from error
        facts.append(("picture", str(png)))
        document["png"] = str(png)
    said = [*data.said, ""] if data.said else []
    return CommandOutcome(document, [*said, *columns(facts), "", *columns(rows)])


def _dropped_and_owned(statistics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines on a partition for things that not every partition has."""
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
    return ", ".join(f"{name} {number(value)}" for name, value in summary.items())


def _listing(everything: Mapping[str, Sequence[str]]) -> list[str]:
    width = max(map(len, everything)) + 3
    lines = []
    for kind, known in everything.items():
        lines += wrapped(", ".join(known), first=kind.ljust(width), indent=width)
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
    lines = wrapped(entry.description, first=f"{entry.name}: ", indent=4)
    settings = [
        f"{key.name}{'' if key.required else f' = {_toml(key.default)}'}"
        for key in entry.keys.values()
    ]
    if not explained:
        return (
            [*lines, *wrapped(", ".join(settings), first="    ", indent=4)] if settings else lines
        )
    for key, setting in zip(entry.keys.values(), settings, strict=True):
        required = "; must be given" if key.required else ""
        lines += ["", f"  {setting}   ({key.type_name}{required})"]
        lines += wrapped(key.description, first="      ", indent=6) if key.description else []
    return lines


def _toml(value: Any) -> str:
    """Write a default as a scenario would; what is none is left out there."""
    return "none" if value is None else json.dumps(value, default=str)
