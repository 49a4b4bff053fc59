"""fedsim partition: who holds what, before anything is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.basics.errors import ScenarioError
from fedsim.cli.app import (
    CommandOutcome,
    JsonOption,
    ScenarioArgument,
    SetOption,
    app,
    finish,
)
from fedsim.cli.words import columns, number

if TYPE_CHECKING:
    from fedsim.scenario.scenario import Scenario


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
