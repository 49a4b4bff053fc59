"""A compose file, read as a description of processes."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.basics.errors import ScenarioError, unknown
from fedsim.basics.home import expanded

# A command and a health check are one sentence each: an overlay replaces them whole, while other
# lists (volumes, networks) grow.
_REPLACED = frozenset({"command", "entrypoint", "test"})
_CONTAINER_HOME = "/app/"


class Service(NamedTuple):
    """One service of a compose file, as far as a process can follow it.

    Attributes:
        command: Entrypoint and arguments.
        environment: Variables that the file sets.
        volumes: Where a mount comes from, by its path below the working folder: a path of this
            machine, or the name of a volume, which services may share.
        memory: Folders below the working folder that begin empty.
        needs: Services that must be healthy before this one starts.
        health: Command that exits with 0 when the service is healthy.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    volumes: Mapping[str, Path | str]
    memory: tuple[str, ...]
    needs: tuple[str, ...]
    health: tuple[str, ...]


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `overlay` put over it, as `docker compose -f base -f overlay` does.

    Example:
        >>> merge({"command": ["a"], "volumes": ["x"]}, {"command": ["b"], "volumes": ["y"]})
        {'command': ['b'], 'volumes': ['x', 'y']}
    """
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        elif isinstance(old, list) and isinstance(value, list) and key not in _REPLACED:
            merged[key] = [*old, *value]
        else:
            merged[key] = value
    return merged


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Return `text` with variables replaced, and `$$` by `$`.

    What may stand for a variable: `${NAME}`, `${NAME:-default}`, and `${NAME:?what it is}` for one
    that must be set.

    Raises:
        ScenarioError: If a variable that must be set is not.

    Example:
        >>> interpolate("${DATA:-./data}:/app/data", {})
        './data:/app/data'
        >>> interpolate("echo $${HOME}", {})
        'echo ${HOME}'
    """

    def value(found: re.Match[str]) -> str:
        name, kind, words = found.groups()
        if name is None:
            return "$"
        if not variables.get(name) and kind == ":?":
            raise ScenarioError(f"the variable {name} is not set: it {words}")
        return variables.get(name) or words or ""

    return re.sub(r"\$\$|\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, text)


def read_services(compose_file: Path, overlays: Sequence[Path] = ()) -> dict[str, Service]:
    """Return the services of a compose file with its overlays, by name.

    Args:
        compose_file: The base file; the paths of all files are relative to its folder.
        overlays: Further files, each put over what came before.

    Raises:
        ScenarioError: If a file is missing or holds what a process cannot follow.
    """
    import yaml  # type: ignore[import-untyped]

    document: dict[str, Any] = {}
    for path in (compose_file, *overlays):
        if not path.is_file():
            raise ScenarioError(f"{path} is not a file; expected a compose file")
        document = merge(document, yaml.safe_load(path.read_text(encoding="utf-8")))
    root = compose_file.resolve().parent
    services = {
        name: _service(name, table, root) for name, table in document.get("services", {}).items()
    }
    for name, service in services.items():
        for need in service.needs:
            if need not in services:
                raise ScenarioError(
                    f"{compose_file}: service {name} depends on "
                    f"{unknown(need, 'a service of the file', services)}"
                )
    return services


def _service(name: str, table: Mapping[str, Any], root: Path) -> Service:
    words = [*table.get("entrypoint", ()), *table.get("command", ())]
    test = table.get("healthcheck", {}).get("test", [])
    if "entrypoint" not in table or not isinstance(table["entrypoint"], list):
        raise ScenarioError(
            f"service {name} has no entrypoint as a list, such as [flower-superlink]"
        )
    if test[:1] != ["CMD"]:
        raise ScenarioError(f"service {name} has no healthcheck of the form [CMD, ...]")
    volumes: dict[str, Path | str] = {}
    for mount in table.get("volumes", ()):
        source, target = interpolate(mount, os.environ).split(":")[:2]
        if not f"{target}/".startswith(_CONTAINER_HOME):
            raise ScenarioError(
                f"service {name} mounts {target}: a process sees what is below {_CONTAINER_HOME}"
            )
        is_path = source.startswith((".", "/", "~"))
        inside = f"{target}/".removeprefix(_CONTAINER_HOME).rstrip("/")
        volumes[inside or "."] = root / expanded(source) if is_path else source
    memory = [interpolate(place, os.environ).split(":")[0] for place in table.get("tmpfs", ())]
    return Service(
        command=tuple(interpolate(str(word), os.environ) for word in words),
        environment={key: str(value) for key, value in table.get("environment", {}).items()},
        volumes=volumes,
        memory=tuple(
            place.removeprefix(_CONTAINER_HOME)
            for place in memory
            if place.startswith(_CONTAINER_HOME)
        ),
        needs=tuple(table.get("depends_on", ())),
        health=tuple(interpolate(str(word), os.environ) for word in test[1:]),
    )
