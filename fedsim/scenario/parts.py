"""The parts of local training in a scenario: `[client] parts`, a list of tables with a `name` each.

What is one part now was once some keys of `[client]`: these are still read, as short for the part.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedsim.basics.errors import ScenarioError, show
from fedsim.scenario.discovery import PARTS


class _Former(NamedTuple):
    """A key of `[client]` that is a part's now.

    Attributes:
        part: The part.
        key: Its key there.
        default: At this value the key says nothing.
    """

    part: str
    key: str
    default: Any


FORMER = {
    "proximal": _Former("proximal", "mu", 0.0),
    "margin": _Former("margin", "coefficient", 0.0),
    "margin_space": _Former("margin", "space", "probability"),
    "margin_reduction": _Former("margin", "reduction", "batch"),
    "guidance": _Former("guidance", "acts_on", "step"),
    "setup_epochs": _Former("exploration", "epochs", None),
    "setup_lr": _Former("exploration", "lr", None),
}


def spelled_out(table: Mapping[str, Any], own: Sequence[str] = ()) -> dict[str, Any]:
    """Return a `[client]` table whose former keys are parts.

    Args:
        table: The table as a user wrote it.
        own: The procedure's own keys, which are none of these.

    Raises:
        ScenarioError: If a part is listed and set by a former key too.

    Example:
        >>> spelled_out({"local_lr": 0.1, "proximal": 0.5})
        {'local_lr': 0.1, 'parts': [{'name': 'proximal', 'mu': 0.5}]}
    """
    given = {key: value for key, value in table.items() if key in FORMER and key not in own}
    rest = {key: value for key, value in table.items() if key not in given}
    said = [key for key, value in given.items() if value != FORMER[key].default]
    parts = rest.get(PARTS, [])
    if not said or not isinstance(parts, list):
        return rest
    parts = list(parts)
    for name in dict.fromkeys(FORMER[key].part for key in said):
        if any(isinstance(part, Mapping) and part.get("name") == name for part in parts):
            key = next(key for key in said if FORMER[key].part == name)
            raise ScenarioError(
                f"[client] {key} = {show(given[key])}: is short for {FORMER[key].key} of the part "
                f'"{name}", which parts lists too; say it there'
            )
        values = {
            former.key: given.get(key, former.default)
            for key, former in FORMER.items()
            if former.part == name
        }
        parts.append({"name": name} | {k: v for k, v in values.items() if v is not None})
    return {**rest, PARTS: parts}


def as_before(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a complete `[client]` table as it was before there were parts, if it can be.

    A scenario that needs no other parts keeps its hash, its recordings and its run folders so.
    """
    if PARTS not in table or table.keys() & FORMER.keys():
        return dict(table)
    listed = {part["name"]: part for part in table.get(PARTS, ())}
    if not listed.keys() <= {former.part for former in FORMER.values()}:
        return dict(table)
    rest = {key: value for key, value in table.items() if key != PARTS}
    return rest | {
        key: listed[former.part][former.key] if former.part in listed else former.default
        for key, former in FORMER.items()
    }


def with_settings(table: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `[client]` table with other values; "proximal.mu" is the key `mu` of that part.

    Example:
        >>> with_settings({"parts": [{"name": "proximal", "mu": 0.1}]}, {"proximal.mu": 0.5})
        {'parts': [{'name': 'proximal', 'mu': 0.5}]}
        >>> with_settings({"local_lr": 0.1, "parts": []}, {"proximal.mu": 0.5})
        {'local_lr': 0.1, 'parts': [{'name': 'proximal', 'mu': 0.5}]}
    """
    changed = dict(table)
    for setting, value in settings.items():
        name, dot, key = setting.rpartition(".")
        if not dot:
            changed[key] = value
            continue
        parts = [dict(part) for part in changed.get(PARTS, ())]
        if name not in [part["name"] for part in parts]:
            parts.append({"name": name})
        changed[PARTS] = [{**part, key: value} if part["name"] == name else part for part in parts]
    return changed
