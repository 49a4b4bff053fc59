"""Everything that a scenario can name, found by its name.

Strategies and client procedures are registered nowhere: `strategies/fedau.py` is found because it
is there, and its file name is its scenario name. Flower's strategies are `flower:FedAdam`; anything
else that can be imported is `package.module:Class`.
"""

import importlib
import importlib.resources
import importlib.util
import inspect
import pkgutil
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim import factories
from fedsim.errors import ScenarioError, unknown
from fedsim.imports import is_import_path, resolve

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from fedsim.procedure import ClientProcedure
    from fedsim.topology import Topology

_NOUNS = {
    "strategies": "a strategy",
    "clients": "a client procedure",
    "datasets": "a data set",
    "partitions": "a partition",
    "participation": "a participation rule",
    "attacks": "an attack",
    "topologies": "a topology",
    "models": "a model",
}
KINDS = (*_NOUNS, "scenarios")

FLOWER_PREFIX = "flower:"
TOPOLOGY = "topology"  # the argument of strategies that average over a graph: table [topology]

# Whoever takes part is the scenario's [participation] to say, and the names of records and metrics
# are fedsim's wire format; so fedsim fixes these arguments of Flower's strategies.
_FLOWER_FIXED: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
    "arrayrecord_key": "arrays",
    "configrecord_key": "config",
    "train_loss_key": "loss",
}


class Entry(NamedTuple):
    """One thing that a scenario can name.

    Attributes:
        name: What the scenario calls it.
        description: What it is, in one line.
        keys: Its scenario keys.
    """

    name: str
    description: str
    keys: dict[str, factories.Key]


def names(kind: str = "strategies") -> list[str]:
    """Return the scenario names of a kind.

    Args:
        kind: One of `KINDS`. Strategies and clients are found without importing them; Flower's
            strategies are apart (`flower_names`).

    Raises:
        ScenarioError: If there is no such kind.
    """
    if kind not in KINDS:
        raise ScenarioError(unknown(kind, "a kind of thing that can be listed", KINDS))
    if kind in ("strategies", "clients"):
        spec = importlib.util.find_spec(kind)
        folders = (spec.submodule_search_locations if spec else None) or []
        modules = pkgutil.iter_modules(list(folders))
        return sorted(module.name for module in modules if not module.name.startswith("_"))
    if kind == "scenarios":
        return list(shipped_scenarios())
    return list(_registry(kind))


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
    if kind == "models":
        from fedsim.models import model_factory

        return model_factory(name)
    registry = _registry(kind)
    if name not in registry:
        raise ScenarioError(unknown(name, _NOUNS[kind], registry))
    return registry[name]


def schema(kind: str, name: str) -> dict[str, factories.Key]:
    """Return the scenario keys of the thing of a kind and name."""
    return factories.keys(
        factory(kind, name), skip=given_by_fedsim(kind), foreign=is_import_path(name)
    )


def given_by_fedsim(kind: str) -> tuple[str, ...]:
    """Return the arguments of a kind's factories which fedsim passes itself: no scenario keys."""
    if kind == "strategies":
        return (TOPOLOGY,)
    if kind != "models":
        return ()
    from fedsim.models import SHAPE_ARGUMENTS

    return SHAPE_ARGUMENTS


def describe(kind: str, name: str | None = None) -> list[Entry]:
    """Return all that can be named of a kind, or the one of that name, with keys and defaults.

    Raises:
        ScenarioError: If there is no such kind or name.
    """
    known = names(kind)
    if kind == "scenarios":
        return _described_scenarios(known, name)
    if name is None and kind == "strategies":
        known = [*known, *flower_names()]
    found = []
    for each in known if name is None else [name]:
        keys = schema(kind, each)
        found.append(Entry(each, factories.summary_line(factory(kind, each)), keys))
    return found


def shipped_scenarios() -> dict[str, Path]:
    """Return the scenarios that come with fedsim: their files by name."""
    installed = Path(str(importlib.resources.files("fedsim"))) / "scenarios"
    folder = installed if installed.is_dir() else installed.parent.parent / "scenarios"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def flower_names() -> list[str]:
    """Return the scenario names of Flower's strategies, such as `flower:FedAdam`."""
    return sorted(
        FLOWER_PREFIX + name for name, cls in _flower_classes().items() if not _unfit(name, cls)
    )


def strategy_factory(name: str) -> Callable[..., "Strategy"]:
    """Return the factory of a strategy; its keyword arguments are the hyperparameters.

    Args:
        name: A module of `strategies` ("fedavg"), a strategy of Flower's ("flower:FedAdam") or an
            import path ("package.module:Class").

    Raises:
        ScenarioError: If there is none of that name; the message names the nearest.
    """
    if name.startswith(FLOWER_PREFIX):
        return _flower_factory(name)
    if is_import_path(name):
        return _imported(name, base=_flower_base(), table="strategy")
    if name not in (found := names("strategies")):
        raise ScenarioError(unknown(name, _NOUNS["strategies"], [*found, *flower_names()]))
    from fedsim.strategy import FederatedStrategy

    return _only_class(importlib.import_module(f"strategies.{name}"), FederatedStrategy)


def procedure_factory(name: str) -> "Callable[..., ClientProcedure]":
    """Return the factory of a client procedure; its keyword arguments are the hyperparameters.

    Args:
        name: A module of `clients` ("local_sgd") or an import path ("package.module:Class").

    Raises:
        ScenarioError: If there is none of that name; the message names the nearest.
    """
    from fedsim.procedure import ClientProcedure

    if is_import_path(name):
        return _imported(name, base=ClientProcedure, table="client")
    if name not in (found := names("clients")):
        raise ScenarioError(unknown(name, _NOUNS["clients"], found))
    return _only_class(importlib.import_module(f"clients.{name}"), ClientProcedure)


def make(kind: str, table: Mapping[str, Any]) -> Any:
    """Build what a validated table with a `kind` describes.

    Args:
        kind: The kind of thing, one of `KINDS`.
        table: The table.

    Raises:
        ScenarioError: If a value is impossible.
    """
    return factory(kind, table["kind"])(**_without(table, "kind"))


def make_strategy(table: Mapping[str, Any], topology: "Topology | None" = None) -> "Strategy":
    """Build the strategy of a validated `[strategy]` table.

    Args:
        table: The table.
        topology: The graph, for a strategy that averages over one.

    Raises:
        ValueError: If a hyperparameter is impossible.
    """
    given = {} if topology is None else {TOPOLOGY: topology}
    return strategy_factory(table["name"])(**_without(table, "name"), **given)


def takes_topology(name: str) -> bool:
    """Return whether the strategy of that name averages over a graph."""
    return TOPOLOGY in inspect.signature(strategy_factory(name)).parameters


def make_procedure(table: Mapping[str, Any]) -> "ClientProcedure":
    """Build the client procedure of a validated `[client]` table.

    Raises:
        ValueError: If a hyperparameter is impossible.
    """
    return procedure_factory(table["name"])(**_without(table, "name"))


def _registry(kind: str) -> dict[str, Callable[..., Any]]:
    if kind == "participation":
        from fedsim.participation import PARTICIPATION

        return dict(PARTICIPATION)
    if kind == "attacks":
        from fedsim.attacks import ATTACKS

        return dict(ATTACKS)
    if kind == "topologies":
        from fedsim.topology import TOPOLOGIES

        return dict(TOPOLOGIES)
    if kind == "models":
        from fedsim.models import MODELS

        return dict(MODELS)
    from fedsim.data import DATASETS, PARTITIONS

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


def _without(table: Mapping[str, Any], selector: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != selector}


def _only_class(module: ModuleType, base: type) -> type[Any]:
    """Return the one public class that a module defines of a kind."""
    found = [
        member
        for name, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__
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


def _flower_base() -> type:
    from flwr.serverapp.strategy import Strategy

    return Strategy


def _unfit(name: str, cls: type[Any]) -> str | None:
    """Say why a scenario cannot name a strategy of Flower's, or return None."""
    if "strategy" in inspect.signature(cls).parameters:
        return "wraps another strategy, which a scenario cannot give it"
    if name == "FedProx":
        return "leaves its proximal term to the clients; use flower:FedAvg with [client] proximal"
    if name.startswith("FedXgb"):
        return "aggregates boosted trees, where fedsim trains tensors"
    return None


def _flower_classes() -> dict[str, type[Any]]:
    """Flower's concrete strategies by class name."""
    module = importlib.import_module("flwr.serverapp.strategy")
    classes: Iterable[tuple[str, Any]] = ((name, getattr(module, name)) for name in module.__all__)
    return {
        name: member
        for name, member in classes
        if inspect.isclass(member)
        and issubclass(member, _flower_base())
        and not inspect.isabstract(member)
    }


def _flower_factory(name: str) -> Callable[..., "Strategy"]:
    classes = _flower_classes()
    cls = classes.get(name.removeprefix(FLOWER_PREFIX))
    if cls is None:
        raise ScenarioError(unknown(name, "a strategy of Flower", flower_names()))
    if reason := _unfit(cls.__name__, cls):
        raise ScenarioError(f"'{name}' {reason}")
    signature = inspect.signature(cls, eval_str=True)
    fixed = {key: value for key, value in _FLOWER_FIXED.items() if key in signature.parameters}

    def build(**hyperparameters: Any) -> "Strategy":
        strategy: Strategy = cls(**fixed, **hyperparameters)
        return strategy

    # What is left of the signature is the schema, keyword-only like that of our own factories.
    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.name not in fixed
        ]
    )
    build.__name__ = name
    build.__doc__ = inspect.getdoc(cls)
    return build
