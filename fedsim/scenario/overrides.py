"""`--set table.key=value`: assignments to a scenario's document."""

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from fedsim.basics.errors import ScenarioError, printable
from fedsim.scenario.discovery import PARTS
from fedsim.scenario.parts import FORMER


def apply(document: dict[str, Any], overrides: Iterable[str]) -> None:
    """Assign each override to its key of the document, in place.

    Args:
        document: The scenario's tables.
        overrides: Assignments such as "engine.kind=inline"; values are TOML, bare words strings.

    Raises:
        ScenarioError: If one is no assignment.
    """
    for override in overrides:
        left, separator, right = override.partition("=")
        parts = _key_parts(left)
        if not separator or not all(parts):
            raise ScenarioError(
                f"--set {printable(override)}: must be table.key=value, such as engine.kind=inline"
            )
        value = _override_value(override, right.strip())
        parts = _where_it_is_now(document, parts)
        table: Any = document
        for depth, part in enumerate(parts[:-1], start=1):
            table = _inside(table, part)
            if not isinstance(table, dict | list):
                name = ".".join(parts[:depth])
                raise ScenarioError(
                    f"--set {printable(override)}: '{name}' is a value and has no keys"
                )
        if isinstance(table, list):
            raise ScenarioError(
                f"--set {printable(override)}: '{'.'.join(parts[:-1])}' is a list; say which of "
                f"its tables by name and key, such as {'.'.join(parts)}.key=value"
            )
        table[parts[-1]] = value


def _inside(table: Any, part: str) -> Any:
    """What lies in a table under a key, or in a list of tables under a name; made if it is new."""
    if isinstance(table, list):
        found = [each for each in table if isinstance(each, dict) and each.get("name") == part]
        if not found:
            found = [{"name": part}]
            table += found
        return found[0]
    # A table that is optional and was left out reads back as null from a run folder.
    if table.get(part) is None:
        table[part] = [] if part == PARTS else {}
    return table[part]


def _where_it_is_now(document: dict[str, Any], parts: list[str]) -> list[str]:
    """The place of a key of `[client]` that is a part's now, where that part is listed."""
    client = document.get("client")
    if parts[0] != "client" or parts[-1] not in FORMER or not isinstance(client, dict):
        return parts
    former, listed = FORMER[parts[-1]], client.get(PARTS)
    if len(parts) != 2 or not isinstance(listed, list):
        return parts
    names = [each.get("name") for each in listed if isinstance(each, dict)]
    return ["client", PARTS, former.part, former.key] if former.part in names else parts


def key_of(override: str) -> list[str]:
    """Return the parts of the key that an assignment is for.

    Example:
        >>> key_of("engine.kind=inline")
        ['engine', 'kind']
    """
    return _key_parts(override.partition("=")[0])


def at_key(document: Mapping[str, Any], key: str) -> Any:
    """Return what a document has under `table.key`, None where there is nothing."""
    found: Any = document
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def with_key(document: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a document with a value under `table.key`; the one given stays as it is.

    Example:
        >>> with_key({"data": {"name": "a"}}, "data.path", "b")
        {'data': {'name': 'a', 'path': 'b'}}
    """
    first, _, rest = key.partition(".")
    if rest:
        inside = document.get(first)
        value = with_key(inside if isinstance(inside, Mapping) else {}, rest, value)
    return {**document, first: value}


def _key_parts(text: str) -> list[str]:
    """Split a dotted key as TOML does; metric names need no quotes."""
    try:
        node: Any = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return [part.strip().strip("\"'") for part in text.split(".")]
    parts = []
    while isinstance(node, dict):
        key, node = next(iter(node.items()))
        parts.append(key)
    return parts


def _override_value(override: str, text: str) -> Any:
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            words = printable(f"--set {override}: the value is invalid TOML: {error}")
            raise ScenarioError(words) from None
        return text
    return document["value"] if len(document) == 1 else text
