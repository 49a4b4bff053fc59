"""Federated data: a data set by name, divided among clients by a named rule.

`prepare` is the way in. Data sets are listed in `DATASETS`, rules of division in `PARTITIONS`; a
factory's keyword arguments are its keys in a scenario. A user's own data set is a function that
returns a `DataSet`, named by import path.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedsim.basics.errors import RunError, ScenarioError, unknown
from fedsim.basics.home import cache_root, expanded
from fedsim.basics.import_paths import is_import_path
from fedsim.data.centralised import CentralisedData
from fedsim.data.federated import Arrays, ClientRows, DataRecipe, FederatedData
from fedsim.data.loaded import PooledSource
from fedsim.data.partitions.named import PARTITIONS, partition_factory
from fedsim.data.partitions.partition import Partition
from fedsim.data.pooled import PooledData
from fedsim.data.sets.formats import DATASETS
from fedsim.data.sets.user import DataSet, user_factory
from fedsim.data.sites.source import NAME as SITES
from fedsim.data.sites.source import SiteSource, over_files
from fedsim.data.synthetic import GeneratedSource, SyntheticData

__all__ = ["DATASETS", "PARTITIONS", "Arrays", "ClientRows", "DataSet", "FederatedData", "prepare"]

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
    return federate(data, partition, seed=seed, cache_dir=cache_dir)


def federate(
    data: Mapping[str, Any],
    partition: Mapping[str, Any],
    *,
    seed: int,
    cache_dir: Path | None,
    content: str | None = None,
) -> FederatedData:
    """Do as `prepare` does, where another process may have read the data already.

    Args:
        data: See `prepare`.
        partition: See `prepare`.
        seed: See `prepare`.
        cache_dir: See `prepare`.
        content: See `DataRecipe`.
    """
    source, division, recipe = asked_for(data, partition, seed=seed, cache_dir=cache_dir)
    recipe = recipe._replace(content=content)
    divided: FederatedData
    if isinstance(source, PooledSource):
        divided = PooledData(source, division, recipe)
    elif isinstance(source, SiteSource):
        divided = over_files(source, recipe)
    else:
        divided = SyntheticData(source, division, recipe)
    return CentralisedData(divided, divided.recipe) if division.centralised else divided


def asked_for(
    data: Mapping[str, Any],
    partition: Mapping[str, Any],
    *,
    seed: int,
    cache_dir: Path | None = None,
) -> tuple[PooledSource | GeneratedSource | SiteSource, Partition, DataRecipe]:
    """Return what the tables name, and what the data are had with; nothing is read yet.

    Args:
        data: See `prepare`.
        partition: See `prepare`.
        seed: See `prepare`.
        cache_dir: See `prepare`.

    Raises:
        ScenarioError: If a name is unknown, or a value impossible.
    """
    data, source = _made(dataset_factory, data, "name")
    partition, division = _made(partition_factory, partition, "kind")
    root = cache_root() if cache_dir is None else Path(cache_dir).absolute()
    return source, division, DataRecipe(data, partition, seed, root, reopen)


def reopen(recipe: tuple[Any, ...], manifest_sha256: str) -> FederatedData:
    """Have the data again that another process has, perhaps on another machine.

    Args:
        recipe: The fields of its `DataRecipe` but this function, in their order.
        manifest_sha256: The hash of its manifest.

    Raises:
        RunError: If the data are others here.
    """
    data, partition, seed, cache_dir, content = recipe
    # another machine need not have that folder: there the default one serves
    here = cache_dir if cache_dir.is_dir() else None
    federated = federate(data, partition, seed=seed, cache_dir=here, content=content)
    if federated.manifest_sha256 != manifest_sha256:
        raise RunError(
            f"the data of [data] name = '{data['name']}' prepared here differ from those of the "
            f"process that sent them (manifest {federated.manifest_sha256[:12]}, expected "
            f"{manifest_sha256[:12]}): give every machine the same files and package versions"
        )
    return federated


def dataset_factory(name: str) -> Callable[..., PooledSource | GeneratedSource | SiteSource]:
    """Return the factory of a data set; its keyword arguments are scenario keys.

    Args:
        name: One of `DATASETS`, or the import path of a function that returns a `DataSet`.

    Raises:
        ScenarioError: If there is none of that name, or what the path names cannot be called.
    """
    if is_import_path(name):
        return user_factory(name)
    if name not in DATASETS:
        raise ScenarioError(
            f"[data] name: {unknown(name, 'a data set', DATASETS)}, or 'package.module:function'"
        )
    return DATASETS[name]


def _made(
    find: Callable[[str], Callable[..., Made]], table: Mapping[str, Any], key: str
) -> tuple[dict[str, Any], Made]:
    """Return the table, completed by the factory's defaults, and what the factory makes of it."""
    arguments = dict(table)
    name = str(arguments.pop(key, None))
    factory = find(name)
    for key_of_path in ("path", "sites", "test") if name == SITES else ("path",):
        if arguments.get(key_of_path) is not None:
            # the recipe travels to processes with other working directories
            arguments[key_of_path] = str(expanded(arguments[key_of_path]).absolute())
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    }
    return {key: name, **defaults, **arguments}, factory(**arguments)
