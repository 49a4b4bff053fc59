"""Federated data: a data set by name, divided among clients by a named rule.

`prepare` is the way in. Data sets are listed in `DATASETS`, rules of division in `PARTITIONS`; a
factory's keyword arguments are its keys in a scenario.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedsim.data.cache import default_root
from fedsim.data.datasets import DATASETS
from fedsim.data.partition import PARTITIONS
from fedsim.data.source import Arrays, ClientRows, FederatedData, Recipe
from fedsim.errors import ScenarioError, unknown

__all__ = ["DATASETS", "PARTITIONS", "Arrays", "ClientRows", "FederatedData", "prepare"]

Made = TypeVar("Made")


def prepare(
    data: Mapping[str, Any],
    partition: Mapping[str, Any],
    *,
    seed: int,
    cache_dir: Path | None = None,
) -> FederatedData:
    """Load a data set once per machine and divide it among clients.

    Args:
        data: A scenario's [data] table: `name` and the data set's keys.
        partition: A scenario's [partition] table: `kind` and the rule's keys.
        seed: The scenario's seed; decides the held-out set, the partition and synthetic samples.
        cache_dir: Where arrays are written once and mapped from; None takes `$FEDSIM_CACHE`, or
            `~/.cache/fedsim`.

    Raises:
        ScenarioError: If a name is unknown, a value impossible, or the two do not go together.
        RunError: If the data cannot be had, or the cache cannot be written.
    """
    data, source = _made(DATASETS, data, "name", "data", "a data set")
    partition, division = _made(PARTITIONS, partition, "kind", "partition", "a partition")
    root = default_root() if cache_dir is None else Path(cache_dir).absolute()
    return source.federate(division, Recipe(data, partition, seed, root))


def _made(
    factories: Mapping[str, Callable[..., Made]],
    table: Mapping[str, Any],
    key: str,
    where: str,
    what: str,
) -> tuple[dict[str, Any], Made]:
    """Return the table, completed by the factory's defaults, and what the factory makes of it."""
    arguments = dict(table)
    name = arguments.pop(key, None)
    if name not in factories:
        raise ScenarioError(f"[{where}] {key}: {unknown(str(name), what, factories)}")
    factory = factories[name]
    if arguments.get("path") is not None:
        # the recipe travels to processes with other working directories
        arguments["path"] = str(Path(arguments["path"]).expanduser().absolute())
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(factory).parameters.values()
    }
    return {key: name, **defaults, **arguments}, factory(**arguments)
