"""`[client]` and its parts, held against what they name and against the strategy."""

from collections.abc import Callable, Mapping
from typing import Any

from fedsim.basics.errors import show
from fedsim.scenario import discovery, signatures
from fedsim.scenario.choice import Choice
from fedsim.scenario.discovery import PARTS
from fedsim.scenario.parts import spelled_out, with_settings
from fedsim.scenario.problems import ScenarioProblems

# (problems, tables, a table's name, what it names, the default, ...) -> what it chooses
Named = Callable[..., Choice | None]


def client_choice(
    problems: ScenarioProblems, tables: Mapping[str, Any], named: Named, default: str
) -> Choice | None:
    """Hold `[client]` against the procedure that it names, and every part that it lists.

    Args:
        problems: Where problems go.
        tables: The scenario's tables.
        named: Holds one table against the factory that it names.
        default: The procedure where the table names none.
    """
    table = dict(tables.get("client", {}))
    name = table.get("name", default)
    found = Choice("clients", {"name": name}) if isinstance(name, str) else None
    if found is None or problems.attempt(lambda: found.factory, where="[client] ") is None:
        return named(problems, {"client": table}, "client", "clients", default)
    if not takes_parts(found):
        return named(problems, {"client": table}, "client", "clients", default, (), found)
    own = found.keys
    spelled = problems.attempt(lambda: spelled_out(table, list(own)))
    if spelled is None:
        return None
    listed = spelled.pop(PARTS, [])
    choice = named(problems, {"client": spelled}, "client", "clients", default, (PARTS,), found)
    parts = _parts(problems, listed, own, named)
    if choice is None or parts is None:
        return None
    return _made(problems, choice.having({PARTS: parts}))


def obeying(
    problems: ScenarioProblems,
    strategy: Choice,
    client: Choice,
    given: Mapping[str, Any],
    named: Named,
) -> Choice | None:
    """Return `[client]` with the parts that the strategy needs; None when it cannot be.

    Args:
        problems: Where problems go.
        strategy: The strategy.
        client: `[client]`, checked.
        given: `[client]` as it was given.
        named: As for `client_choice`.
    """
    name = f'[strategy] name = "{strategy.name}"'
    asked = strategy.asked_of_client()
    sends = getattr(strategy.factory, "sends", ())
    if not takes_parts(client):
        taken = getattr(client.factory, "takes", ())
        if asked and not (sends and all(each in taken for each in sends)):
            problems.add(
                f'[client] name = "{client.name}": takes no parts, and {name} needs '
                f"{', '.join(asked)}; leave out the name"
            )
            return None
        return client
    if not asked:
        return client
    said = {each["name"]: each for each in spelled_out(given, list(client.keys)).get(PARTS, [])}
    listed = {part["name"]: part for part in client.table[PARTS]}
    for part, values in asked.items():
        for key, value in values.items():
            if said.get(part, {}).get(key, value) != value:
                problems.add(
                    f"[client.parts] {part}: {key} = {show(said[part][key])}: must be "
                    f"{show(value)} as {name} has it; leave it out"
                )
                return None
        complete = _part(problems, {**said.get(part, {}), "name": part, **values}, named)
        if complete is None:
            return None
        listed[part] = complete
    return _made(problems, client.having({PARTS: list(listed.values())}))


def as_written(client: Choice, strategy: Choice) -> dict[str, Any]:
    """Return a complete `[client]` table without what the strategy adds by itself.

    These are parts at the end of the list, and keys of others. So another strategy, or another
    value of its hyperparameters, adds its own in their place.
    """
    if not client.table.get(PARTS):
        return dict(client.table)
    asked = strategy.asked_of_client()
    added = [_complete({"name": part, **values}) for part, values in asked.items()]
    listed = list(client.table[PARTS])
    while listed and listed[-1] in added:
        listed.pop()
    own = [
        {key: value for key, value in part.items() if key not in asked.get(part["name"], {})}
        for part in listed
    ]
    return {**client.table, PARTS: own}


def with_values(client: Choice, settings: Mapping[str, Any]) -> Choice:
    """Return `[client]` with some keys at other values, those of parts as "proximal.mu".

    Raises:
        ScenarioError: If a part cannot have such a value.
    """
    table = with_settings(client.table, settings)
    if PARTS in table:
        table[PARTS] = [_complete(part) for part in table[PARTS]]
    return client.having(table)


def _complete(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part's table with its defaults."""
    given = {key: value for key, value in part.items() if key != "name"}
    factory = discovery.part_factory(part["name"])
    return {"name": part["name"]} | signatures.check(factory, given, where="[client.parts]")


def takes_parts(client: Choice) -> bool:
    """Tell whether a procedure takes parts."""
    return client.takes(PARTS)


def _parts(
    problems: ScenarioProblems, listed: Any, own: Mapping[str, Any], named: Named
) -> list[dict[str, Any]] | None:
    """The complete tables of all parts, None when one has a problem."""
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        problems.add(
            f"[client] parts = {show(listed)}: must be a list of tables such as "
            '[{ name = "proximal", mu = 0.1 }]'
        )
        return None
    found = [_part(problems, each, named) for each in listed]
    complete = [each for each in found if each is not None]
    for each, given in zip(found, listed, strict=True):
        if each is None and (key := next((k for k in given if k in own), None)) is not None:
            problems.add(f"[client.parts] {key}: is a key of [client]; write it there")
    return complete if len(complete) == len(found) else None


def _part(
    problems: ScenarioProblems, table: Mapping[str, Any], named: Named
) -> dict[str, Any] | None:
    choice = named(problems, {"client.parts": table}, "client.parts", "parts", None)
    return None if choice is None else dict(choice.table)


def _made(problems: ScenarioProblems, choice: Choice) -> Choice | None:
    """The choice, if its procedure can be made with its parts."""
    return None if problems.attempt(choice.make, where="[client] ") is None else choice
