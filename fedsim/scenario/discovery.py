"""Everything that a scenario can name, found by its name.

Strategies and client procedures are registered nowhere: `strategies/fedau.py` is found because it
is there, and its file name is its scenario name. Flower's strategies are `flower:FedAdam`; anything
else that can be imported is `package.module:Class`.
"""

import importlib
import importlib.resources
import importlib.util
import inspect
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.basics.errors import ScenarioError, nearest, unknown
from fedsim.basics.import_paths import is_import_path, names_in_source, resolve
from fedsim.scenario import signatures
from fedsim.strategy import flower as flower_strategies

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from fedsim.client.part import ClientPart
    from fedsim.client.procedure import ClientProcedure

_NOUNS = {
    "strategies": "a strategy",
    "clients": "a client procedure",
    "parts": "a part of local training",
    "server_optimizers": "a server optimiser",
    "datasets": "a data set",
    "partitions": "a partition",
    "participation": "a participation rule",
    "attacks": "an attack",
    "topologies": "a topology",
    "models": "a model",
    "tasks": "a task",
}
KINDS = (*_NOUNS, "scenarios")
# registries in modules that import torch: where, and by which name
_REGISTRIES = {
    "attacks": ("fedsim.federation.attacks.named", "ATTACKS"),
    "models": ("fedsim.tasks.models.named", "MODELS"),
    "tasks": ("fedsim.tasks.named", "TASKS"),
    "server_optimizers": ("fedsim.aggregators.server_optimizers", "SERVER_OPTIMIZERS"),
}

# what is found by the names of files: where
_FOLDERS = {"strategies": "strategies", "clients": "clients", "parts": "clients.parts"}
_INSIDE = set(_FOLDERS.values())  # packages beside the modules that are listed

TOPOLOGY = "topology"  # the argument of strategies that average over a graph: table [topology]

PARTS = "parts"  # the argument of procedures that take parts: a list of tables in [client]


class Entry(NamedTuple):
    """One thing that a scenario can name.

    Attributes:
        name: What the scenario calls it.
        description: What it is, in one line.
        keys: Its scenario keys.
    """

    name: str
    description: str
    keys: dict[str, signatures.Key]


def names(kind: str = "strategies") -> list[str]:
    """Return the scenario names of a kind.

    Args:
        kind: One of `KINDS`. Nothing that takes long is imported for them. Flower's strategies and
            partitioners are apart (`flower_names`).

    Raises:
        ScenarioError: If there is no such kind.
    """
    if kind not in KINDS:
        raise ScenarioError(unknown(kind, "a kind of thing that can be listed", KINDS))
    if kind in _FOLDERS:
        spec = importlib.util.find_spec(_FOLDERS[kind])
        folders = (spec.submodule_search_locations if spec else None) or []
        found = {name for folder in folders for name in _modules_in(folder)}
        return sorted(n for n in found if not n.startswith("_") and f"{kind}.{n}" not in _INSIDE)
    if kind == "scenarios":
        return list(shipped_scenarios())
    listed = names_in_source(*_REGISTRIES[kind]) if kind in _REGISTRIES else None
    return list(_registry(kind)) if listed is None else listed


def factory(kind: str, name: str) -> Callable[..., Any]:
    """Return what makes the thing of a kind and name; its keyword arguments are scenario keys.

    Args:
        kind: One of `KINDS` except "scenarios".
        name: A name of that kind.

    Raises:
        ScenarioError: If there is none of that name; the message names the nearest.
    """
    if kind == "strategies":
        return strategy_factory(name)
    if kind == "clients":
        return procedure_factory(name)
    if kind == "parts":
        return part_factory(name)
    if kind == "models":
        from fedsim.tasks.models.named import model_factory

        return model_factory(name)
    if kind == "tasks":
        from fedsim.tasks.named import task_class

        return task_class(name)
    if kind == "datasets" and is_import_path(name):
        from fedsim.data.preparation import dataset_factory

        return dataset_factory(name)
    if kind == "partitions" and name.startswith(flower_strategies.PREFIX):
        from fedsim.data.partitions.named import partition_factory

        return partition_factory(name)
    registry = _registry(kind)
    if name not in registry:
        raise ScenarioError(unknown(name, _NOUNS[kind], registry))
    return registry[name]


def schema(kind: str, name: str) -> dict[str, signatures.Key]:
    """Return the scenario keys of the thing of a kind and name."""
    if kind == "tasks":
        from fedsim.scenario import task_keys as task_schema

        return task_schema.keys(name) | {"dtype": task_schema.DTYPE}
    return keys_of(kind, name, factory(kind, name))


def keys_of(kind: str, name: str, made_by: Callable[..., Any]) -> dict[str, signatures.Key]:
    """Return the scenario keys of a kind and name, where its factory has been looked up."""
    return signatures.keys(made_by, skip=given_by_fedsim(kind), foreign=is_import_path(name))


def given_by_fedsim(kind: str) -> tuple[str, ...]:
    """Return the arguments of a kind's factories which fedsim passes itself: no scenario keys."""
    if kind == "strategies":
        return (TOPOLOGY, flower_strategies.COHORT)
    if kind == "clients":
        return (PARTS,)
    if kind == "tasks":
        from fedsim.tasks.named import GIVEN

        return GIVEN
    if kind != "models":
        return ()
    from fedsim.tasks.models.named import SHAPE_ARGUMENTS

    return SHAPE_ARGUMENTS


def describe(kind: str, name: str | None = None) -> list[Entry]:
    """Return all that can be named of a kind, or the one of that name, with keys and defaults.

    Raises:
        ScenarioError: If there is no such kind or name.
    """
    known = names(kind)
    if kind == "scenarios":
        return _described_scenarios(known, name)
    if name is None:
        known = [*known, *flower_names(kind)]
    found = []
    for each in known if name is None else [name]:
        keys = schema(kind, each)
        found.append(Entry(each, signatures.summary_line(factory(kind, each)), keys))
    return found


def shipped_scenarios() -> dict[str, Path]:
    """Return the scenarios that come with fedsim: their files by name."""
    installed = Path(str(importlib.resources.files("fedsim"))) / "scenarios"
    folder = installed if installed.is_dir() else installed.parent.parent / "scenarios"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def flower_names(kind: str = "strategies") -> list[str]:
    """Return the scenario names of what Flower ships of a kind, such as `flower:FedAdam`."""
    if kind == "partitions":
        from fedsim.data.partitions import flower

        return flower.names()
    return flower_strategies.names() if kind == "strategies" else []


def strategy_factory(name: str) -> Callable[..., "Strategy"]:
    """Return the factory of a strategy; its keyword arguments are the hyperparameters.

    Args:
        name: A module of `strategies` ("fedavg"), a strategy of Flower's ("flower:FedAdam") or an
            import path ("package.module:Class").

    Raises:
        ScenarioError: If there is none of that name; the message names the nearest.
    """
    if name.startswith(flower_strategies.PREFIX):
        return flower_strategies.factory(name)
    if is_import_path(name):
        from flwr.serverapp.strategy import Strategy

        try:
            cls = _imported(name, base=Strategy, table="strategy")
        except ScenarioError as error:
            meant = nearest(name.partition(":")[0], [flower_strategies.PREFIX.strip(":")])
            guess = nearest(name, flower_strategies.names()) if meant else None
            if guess is None or not isinstance(error.__cause__, ModuleNotFoundError):
                raise
            raise ScenarioError(f"{error}; or did you mean '{guess}'?") from error
        wraps = flower_strategies.inner_argument(cls) is not None
        return flower_strategies.adapted(cls, name) if wraps else cls
    if not _is_imported("strategies", name) and name not in (found := names("strategies")):
        raise ScenarioError(unknown(name, _NOUNS["strategies"], [*found, *flower_names()]))
    from fedsim.strategy.base import FederatedStrategy

    return _only_class(importlib.import_module(f"strategies.{name}"), FederatedStrategy)


def procedure_factory(name: str) -> "Callable[..., ClientProcedure]":
    """Return the factory of a client procedure; its keyword arguments are the hyperparameters.

    Args:
        name: A module of `clients` ("local_sgd") or an import path ("package.module:Class").

    Raises:
        ScenarioError: If there is none of that name; the message names the nearest.
    """
    from fedsim.client.procedure import ClientProcedure

    if is_import_path(name):
        return _imported(name, base=ClientProcedure, table="client")
    if not _is_imported("clients", name) and name not in (found := names("clients")):
        raise ScenarioError(unknown(name, _NOUNS["clients"], found))
    return _only_class(importlib.import_module(f"clients.{name}"), ClientProcedure)


def part_factory(name: str) -> "Callable[..., ClientPart]":
    """Return the factory of a part of local training; its keyword arguments are scenario keys.

    Args:
        name: A module of `clients.parts` ("proximal") or an import path ("package.module:Class").

    Raises:
        ScenarioError: If there is none of that name; the message names the nearest.
    """
    from fedsim.client.part import ClientPart

    if is_import_path(name):
        return _imported(name, base=ClientPart, table="client.parts")
    if not _is_imported("parts", name) and name not in (found := names("parts")):
        raise ScenarioError(unknown(name, _NOUNS["parts"], found))
    return _only_class(importlib.import_module(f"clients.parts.{name}"), ClientPart)


def _is_imported(kind: str, name: str) -> bool:
    """Whether `names` lists it, if its module is there already: that is quicker to find out."""
    module = f"{_FOLDERS[kind]}.{name}"
    return (
        name.isidentifier() and name[0] != "_" and module in sys.modules and module not in _INSIDE
    )


def _modules_in(folder: str) -> Iterator[str]:
    """Name the modules and packages of a folder; quicker than pkgutil, and asked for often."""
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, dot, suffix = entry.name.partition(".")
            if suffix == "py" or (not dot and os.path.isfile(os.path.join(entry, "__init__.py"))):
                yield stem


def _registry(kind: str) -> dict[str, Callable[..., Any]]:
    if kind == "participation":
        from fedsim.federation.participation.kinds import PARTICIPATION

        return dict(PARTICIPATION)
    if kind == "attacks":
        from fedsim.federation.attacks.named import ATTACKS

        return dict(ATTACKS)
    if kind == "topologies":
        from fedsim.federation.topology.named import TOPOLOGIES

        return dict(TOPOLOGIES)
    if kind == "tasks":
        from fedsim.tasks.named import TASKS

        return dict(TASKS)
    if kind == "server_optimizers":
        from fedsim.aggregators.server_optimizers import SERVER_OPTIMIZERS

        return dict(SERVER_OPTIMIZERS)
    if kind == "models":
        from fedsim.tasks.models.named import MODELS

        return dict(MODELS)
    from fedsim.data.partitions.named import PARTITIONS
    from fedsim.data.sets.formats import DATASETS

    return dict(DATASETS) if kind == "datasets" else dict(PARTITIONS)


def _described_scenarios(known: list[str], name: str | None) -> list[Entry]:
    if name is not None and name not in known:
        raise ScenarioError(unknown(name, "a scenario that comes with fedsim", known))
    files = shipped_scenarios()
    found = []
    for each in known if name is None else [name]:
        title = tomllib.loads(files[each].read_text(encoding="utf-8")).get("title", "")
        found.append(Entry(each, str(title), {}))
    return found


def _only_class(module: ModuleType, base: type) -> type[Any]:
    """Return the one public class that a module defines of a kind."""
    found = [
        member
        for name, member in sorted(vars(module).items())
        if isinstance(member, type)
        and member.__module__ == module.__name__
        and not name.startswith("_")
        and issubclass(member, base)
    ]
    if len(found) != 1:
        defined = ", ".join(member.__name__ for member in found) or "none"
        raise ScenarioError(
            f"module {module.__name__} must define exactly one public subclass of "
            f"{base.__name__}; it defines {defined}"
        )
    return found[0]


def _imported(path: str, *, base: type, table: str) -> type[Any]:
    where = f"[{table}] name"
    found = resolve(path, what=where)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ScenarioError(f"{where} = '{path}': must be a subclass of {base.__name__}")
    return found
