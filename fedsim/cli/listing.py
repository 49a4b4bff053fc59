"""`fedsim list`: what a scenario can name."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.app import (
    CommandOutcome,
    JsonOption,
    app,
    finish,
)
from fedsim.cli.words import wrapped

if TYPE_CHECKING:
    from fedsim.scenario.discovery import Entry


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

    KIND is strategies, clients, parts, server_optimizers, datasets, partitions, participation,
    attacks, topologies, tasks, models or scenarios: it is listed with keys and defaults. With NAME,
    one of them is explained.
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
