"""Keys of a scenario that have no effect while another has a certain value: a run names them.

They are not refused, for a comparison may switch off what they belong to and leave them there. A
strategy or procedure declares its own in `idle`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.basics.errors import show
from fedsim.basics.idle import Idle
from fedsim.basics.import_paths import is_import_path
from fedsim.client.part import ClientPart
from fedsim.scenario import discovery, signatures
from fedsim.scenario.scenario import Scenario
from fedsim.strategy.base import FederatedStrategy


def idle_keys(scenario: Scenario) -> list[str]:
    """Return a line for each key that is not at its default and has no effect."""
    strategy: Any = scenario.choices["strategy"].factory
    client = scenario.choices["client"]
    name = scenario.strategy["name"]
    declared = _declared(client.factory)
    lines = [
        *_found("[strategy]", scenario.strategy, _keys(strategy), _declared(strategy)),
        *_found("[client]", scenario.client, _keys(client.factory), declared),
    ]
    for part in client.parts:
        where, made_by = f"[client.parts] {part.name}:", part.factory
        why = f'is without effect with [strategy] name = "{name}", which'
        unsent = [] if is_import_path(name) else _unsent(made_by, getattr(strategy, "sends", ()))
        if unsent:
            lines.append(f"{where} {why} sends no {unsent[0]}")
        elif (key := _without_personal(made_by, part.table, scenario)) is not None:
            lines.append(
                f"{where} is without effect with [task] personal = []: say there which tensors "
                f"clients keep to themselves, or name them by {key}"
            )
        elif _is_of_setup(made_by) and not _holds_setup(strategy, name):
            lines.append(f"{where} {why} holds no set-up exchange")
        else:
            beside = _of_part(part.name, scenario.client, declared)
            lines += _found(where, part.table, _keys(made_by), [*_declared(made_by), *beside])
    if (server := scenario.choices["strategy"].server) is not None:
        factory = server.factory
        lines += _found("[strategy.server]", server.table, _keys(factory), _declared(factory))
    return lines


def _of_part(name: str, client: Mapping[str, Any], declared: Sequence[Idle]) -> list[Idle]:
    """What a procedure declares of a part's keys, such as "guidance.acts_on"."""
    start = f"{name}."
    found = []
    for idle in declared:
        keys = tuple(key.removeprefix(start) for key in idle.keys if key.startswith(start))
        found.append(Idle(keys, functools.partial(_beside_client, idle, client)))
    return found


def _beside_client(idle: Idle, client: Mapping[str, Any], part: Mapping[str, Any]) -> str | None:
    return idle.beside(client)


def _unsent(part: Any, sends: Sequence[str]) -> list[str]:
    """What a part uses and the strategy does not send."""
    return [name for name in getattr(part, "takes", ()) if name not in sends]


def _without_personal(part: Any, table: Mapping[str, Any], scenario: Scenario) -> str | None:
    """The key by which a part would know tensors, where it knows none; else None."""
    key: str | None = getattr(part, "names_personal", None)
    said = key is None or table.get(key) is not None or bool(scenario.task.get("personal"))
    return None if said else key


def _is_of_setup(part: Any) -> bool:
    """Whether a part says how much is trained in a set-up exchange."""
    return getattr(part, "setup_work", ClientPart.setup_work) is not ClientPart.setup_work


def _holds_setup(strategy: Any, name: str) -> bool:
    """Whether a strategy holds a set-up exchange, as far as is known."""
    if is_import_path(name):
        return True
    return getattr(strategy, "setup", FederatedStrategy.setup) is not FederatedStrategy.setup


def _declared(factory: Any) -> list[Idle]:
    """What a factory declares; the user's own may mean something else by that name."""
    declared = getattr(factory, "idle", ())
    return [each for each in declared if isinstance(each, Idle)] if type(declared) is tuple else []


def _keys(factory: Any) -> dict[str, signatures.Key]:
    return signatures.keys(factory, skip=(discovery.PARTS,))


def _found(
    where: str,
    table: Mapping[str, Any],
    keys: Mapping[str, signatures.Key],
    declared: Sequence[Idle],
) -> list[str]:
    lines: dict[str, str] = {}
    for idle in declared:
        why = idle.beside(table)
        for key in idle.keys if why else ():
            default = keys[key].default if key in table else None
            if key in table and show(table[key]) != show(default):
                text = f"{where} {key} = {show(table[key])}: is without effect with {why}"
                lines.setdefault(key, text)
    return list(lines.values())
