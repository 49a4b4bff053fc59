"""Keys of a scenario that have no effect while another has a certain value: a run names them.

They are not refused, for a comparison may switch off what they belong to and leave them there. A
strategy or procedure declares its own in `idle`.
"""

from collections.abc import Mapping
from typing import Any

from fedsim.basics.errors import show
from fedsim.basics.idle import Idle
from fedsim.basics.import_paths import is_import_path
from fedsim.client.procedure import GUIDANCE
from fedsim.scenario import signatures
from fedsim.scenario.scenario import Scenario
from fedsim.strategy.base import FederatedStrategy


def idle_keys(scenario: Scenario) -> list[str]:
    """Return a line for each key that is not at its default and has no effect."""
    strategy: Any = scenario.choices["strategy"].factory
    client: Any = scenario.choices["client"].factory
    name = scenario.strategy["name"]
    found = _found("strategy", scenario.strategy, strategy, _declared(strategy))
    declared = _declared(client)
    if GUIDANCE in getattr(client, "takes", ()) and not is_import_path(name):
        why = f'[strategy] name = "{name}", which'
        if GUIDANCE not in strategy.sends:
            declared.insert(0, Idle((GUIDANCE,), lambda _: f"{why} sends none"))
        if strategy.setup is FederatedStrategy.setup:
            keys = ("setup_epochs", "setup_lr")
            declared.append(Idle(keys, lambda _: f"{why} holds no set-up exchange"))
    if (server := scenario.choices["strategy"].server) is not None:
        factory = server.factory
        found += _found("strategy.server", server.table, factory, _declared(factory))
    return [*found, *_found("client", scenario.client, client, declared)]


def _declared(factory: Any) -> list[Idle]:
    """What a factory declares; the user's own may mean something else by that name."""
    declared = getattr(factory, "idle", ())
    return [each for each in declared if isinstance(each, Idle)] if type(declared) is tuple else []


def _found(name: str, table: Mapping[str, Any], factory: Any, declared: Any) -> list[str]:
    lines: dict[str, str] = {}
    for idle in declared:
        why = idle.beside(table)
        for key in idle.keys if why else ():
            default = signatures.keys(factory)[key].default if key in table else None
            if key in table and show(table[key]) != show(default):
                text = f"[{name}] {key} = {show(table[key])}: is without effect with {why}"
                lines.setdefault(key, text)
    return list(lines.values())
