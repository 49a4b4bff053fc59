"""Tables that name a factory, held against its signature."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.basics.errors import (
    nearest,
    show,
    unknown,
)
from fedsim.basics.import_paths import is_import_path
from fedsim.scenario import discovery, signatures
from fedsim.scenario.problems import ScenarioProblems
from fedsim.scenario.tables import (
    WITH_PATHS,
)


def factory_tables(
    problems: ScenarioProblems, tables: Mapping[str, Any], folder: Path | None
) -> dict[str, dict[str, Any] | None]:
    """Return the tables that name a factory, complete; None for one with a problem."""
    tables = {
        name: _located(table, folder, WITH_PATHS[name]) if name in WITH_PATHS else table
        for name, table in tables.items()
    }
    made = {
        "task": _task(problems, tables.get("task", {})),
        "data": _named(problems, tables, "data", "datasets", "name", None),
        "partition": _named(problems, tables, "partition", "partitions", "kind", None),
        "participation": _named(problems, tables, "participation", "participation", "kind", "full"),
        "strategy": _named(problems, tables, "strategy", "strategies", "name", "fedavg"),
        "client": _named(problems, tables, "client", "clients", "name", "local_sgd"),
        "attack": {},
        "topology": {},
    }
    if "attack" in tables:
        made["attack"] = _named(problems, tables, "attack", "attacks", "kind", None)
    strategy = made["strategy"]
    if strategy is not None and made["client"] is not None:
        made["client"] = _obeying(problems, strategy, made["client"], tables.get("client", {}))
    needs = strategy is not None and discovery.takes_topology(strategy["name"])
    if "topology" in tables or needs:
        made["topology"] = _named(problems, tables, "topology", "topologies", "kind", "ring")
    if "topology" in tables and strategy is not None and not needs:
        kind = tables["topology"].get("kind", "ring")
        problems.add(
            f"[topology] kind = {show(kind)}: [strategy] name "
            f'= "{strategy["name"]}" has a server and no graph; leave the table out'
        )
    return made


def _obeying(
    problems: ScenarioProblems,
    strategy: Mapping[str, Any],
    client: dict[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return `[client]` with what the strategy leaves to the clients; None when it cannot be."""
    name = f'[strategy] name = "{strategy["name"]}"'
    asked = discovery.asked_of_client(strategy)
    for key, value in asked.items():
        if key not in client:
            problems.add(f'[client] name = "{client["name"]}": has no {key}, which {name} needs')
            return None
        if given.get(key, value) != value:
            problems.add(
                f"[client] {key} = {show(given[key])}: must be {show(value)} "
                f"as {name} has it; leave it out"
            )
            return None
    obeying = {**client, **asked}
    made = problems.attempt(lambda: discovery.make_procedure(obeying), where="[client] ")
    return None if made is None else obeying


def _named(
    problems: ScenarioProblems,
    tables: Mapping[str, Any],
    name: str,
    kind: str,
    selector: str,
    default: str | None,
    beside: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Hold one table against the factory that its selector names; None when it has a problem.

    The factory is called once, so that it can refuse what no signature tells; data are not read.

    Args:
        problems: Where problems go.
        tables: The scenario's tables.
        name: The table.
        kind: What it names, one of `discovery.KINDS`.
        selector: Its key that names the factory.
        default: What the selector is when left out; None when it must be given.
        beside: Keys of the table that have been looked at already.
    """
    where = f"[{name}]"
    arguments = dict(tables.get(name, {}))
    choice = arguments.pop(selector, default)
    if choice is None:
        allowed = ", ".join(discovery.names(kind))
        problems.add(f"{where} '{selector}' is missing; allowed: {allowed}")
        for key in arguments:  # perhaps it is there under a slightly wrong name
            if nearest(key, [selector]):
                problems.add(f"{where} {unknown(key, f'a key of [{name}]', [selector])}")
        return None
    if not isinstance(choice, str):
        problems.add(f"{where} {selector} = {show(choice)}: must be a string")
        return None
    factory = problems.attempt(lambda: discovery.factory(kind, choice), where=f"{where} ")
    if factory is None:
        return None
    if inner := getattr(factory, "fedsim_inner", None):  # a strategy around another one
        given = arguments.get(inner, {})
        if isinstance(given, dict):
            place, default = f"{name}.{inner}", getattr(factory, "fedsim_wrapped", None)
            made = _named(problems, {place: given}, place, kind, selector, default)
            if made is None:
                return None
            arguments[inner] = made
    noun = "hyperparameter" if kind in ("strategies", "clients") else "key"
    checked = problems.attempt(
        lambda: signatures.check(
            factory,
            arguments,
            where=where,
            owner=f"a {noun} of {choice}",
            skip=discovery.given_by_fedsim(kind),
            foreign=is_import_path(choice),
            beside=(selector, *beside),
        )
    )
    if checked is None:
        return None
    # A model cannot be built before its data's shape is known, nor a strategy that counts on so
    # many clients per round before these are.
    if kind != "models" and not (kind == "strategies" and discovery.takes_cohort(choice)):
        built = problems.attempt(lambda: factory(**checked), where=f"{where} ")
        if built is None:
            return None
    return {selector: choice, **checked}


def _task(problems: ScenarioProblems, table: Mapping[str, Any]) -> dict[str, Any] | None:
    from fedsim.scenario import task_keys
    from fedsim.tasks.named import AUTO, DTYPES, TASKS

    given = dict(table)
    fixed: dict[str, Any] = {}
    for key, default, allowed in (
        ("kind", AUTO, [*TASKS, AUTO]),
        ("dtype", "float32", list(DTYPES)),
    ):
        fixed[key] = given.pop(key, default)
        named = key == "kind" and isinstance(fixed[key], str) and is_import_path(fixed[key])
        if fixed[key] not in allowed and not named:
            shown = show(fixed[key]).strip('"')
            problems.add(f"[task] {key}: {unknown(shown, f'a {key} of a task', allowed)}")
            fixed[key] = default
    keys = problems.attempt(lambda: task_keys.keys(fixed["kind"]), where="[task] ") or {}
    mine = {key: given.pop(key) for key in keys if key in given}
    own = problems.attempt(lambda: task_keys.check(fixed["kind"], mine))
    beside = [*fixed, *keys]
    model = _named(problems, {"task": given}, "task", "models", "model", "logistic", beside=beside)
    if model is None or own is None:
        return None
    for key in keys:
        if key in model:
            problems.add(
                f'[task] {key}: is a key of the task and of the model "{model["model"]}"; give the '
                "model's argument another name"
            )
    return {"kind": fixed["kind"], **model, "dtype": fixed["dtype"], **own}


def _located(table: Mapping[str, Any], folder: Path | None, key: str) -> dict[str, Any]:
    """Make a path absolute: beside the scenario file if it is there, else as it stands."""
    if not isinstance(table.get(key), str):
        return dict(table)
    path = Path(os.path.expanduser(table[key]))
    if folder is not None and os.path.exists(folder / path):  # false for what is no path at all
        path = folder / path
    return {**table, key: os.path.abspath(path)}
