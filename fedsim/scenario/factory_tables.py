"""Tables that name a factory, held against its signature."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.basics.errors import (
    nearest,
    show,
    unknown,
)
from fedsim.basics.import_paths import is_import_path
from fedsim.scenario import discovery, signatures
from fedsim.scenario.choice import SERVER, Choice, inner_of, selector_of
from fedsim.scenario.client_table import client_choice, obeying
from fedsim.scenario.problems import ScenarioProblems
from fedsim.scenario.tables import (
    WITH_PATHS,
)
from fedsim.strategy.flower import COHORT

_ALGORITHMS = ("strategies", "clients", "parts")  # what they take are hyperparameters


def factory_tables(
    problems: ScenarioProblems, tables: Mapping[str, Any], folder: Path | None
) -> tuple[dict[str, Any] | None, dict[str, Choice]]:
    """Hold the tables that name a factory against it.

    Args:
        problems: Where problems go.
        tables: The scenario's tables.
        folder: Where relative paths are looked up first, or None.

    Returns:
        `[task]`, complete, None when it has a problem; and what the other tables choose, without
        those that have a problem and those that are left out.
    """
    tables = {
        name: _located(table, folder, WITH_PATHS[name]) if name in WITH_PATHS else table
        for name, table in tables.items()
    }
    task = _task(problems, tables.get("task", {}))
    found = {
        "data": _named(problems, tables, "data", "datasets", None),
        "partition": _named(problems, tables, "partition", "partitions", None),
        "participation": _named(problems, tables, "participation", "participation", "full"),
        "strategy": _named(problems, tables, "strategy", "strategies", "fedavg"),
        "client": client_choice(problems, tables, _named, "local_sgd"),
    }
    if "attack" in tables:
        found["attack"] = _named(problems, tables, "attack", "attacks", None)
    strategy = found["strategy"]
    if strategy is not None and found["client"] is not None:
        given = tables.get("client", {})
        found["client"] = obeying(problems, strategy, found["client"], given, _named)
    needs = strategy is not None and strategy.takes(discovery.TOPOLOGY)
    if "topology" in tables or needs:
        found["topology"] = _named(problems, tables, "topology", "topologies", "ring")
    if "topology" in tables and strategy is not None and not needs:
        kind = tables["topology"].get("kind", "ring")
        problems.add(
            f"[topology] kind = {show(kind)}: [strategy] name "
            f'= "{strategy.name}" has a server and no graph; leave the table out'
        )
    return task, {name: choice for name, choice in found.items() if choice is not None}


def _named(
    problems: ScenarioProblems,
    tables: Mapping[str, Any],
    name: str,
    kind: str,
    default: str | None,
    beside: Sequence[str] = (),
    looked_up: Choice | None = None,
) -> Choice | None:
    """Hold one table against the factory that it names; None when it has a problem.

    The factory is called once, so that it can refuse what no signature tells; data are not read.

    Args:
        problems: Where problems go.
        tables: The scenario's tables.
        name: The table.
        kind: What it names, one of `discovery.KINDS`.
        default: What it names when it says nothing; None when it must say it.
        beside: Keys of the table that have been looked at already.
        looked_up: The choice of its name, where that has been made already.
    """
    where, selector = f"[{name}]", selector_of(kind)
    arguments = dict(tables.get(name, {}))
    named = arguments.pop(selector, default)
    if named is None:
        _missing(problems, name, kind, arguments)
        return None
    if not isinstance(named, str):
        problems.add(f"{where} {selector} = {show(named)}: must be a string")
        return None
    choice = looked_up or Choice(kind, {selector: named})
    factory = problems.attempt(lambda: choice.factory, where=f"{where} ")
    if factory is None:
        return None
    inside = None
    if inner := inner_of(factory):  # a strategy around another one
        given = arguments.get(inner, {})
        if isinstance(given, dict):
            place, default = f"{name}.{inner}", getattr(factory, "fedsim_wrapped", None)
            inside = _named(problems, {place: given}, place, kind, default)
            if inside is None:
                return None
            arguments[inner] = inside.table
    beside, server = list(beside), None
    if kind == "strategies" and not choice.takes(SERVER):
        refusal = _why_no_server(factory)
        beside += [] if refusal else [SERVER]
        if SERVER in arguments:
            server = _server(problems, name, choice, arguments.pop(SERVER), refusal)
            if server is None:
                return None
    noun = "hyperparameter" if kind in _ALGORITHMS else "key"
    checked = problems.attempt(
        lambda: signatures.check(
            factory,
            arguments,
            where=where,
            owner=f"a {noun} of {named}",
            skip=discovery.given_by_fedsim(kind),
            foreign=is_import_path(named),
            beside=(selector, *beside),
        )
    )
    if checked is None:
        return None
    choice = choice.having(checked, inside, server)
    # A model cannot be built before its data's shape is known, nor a strategy that counts on so
    # many clients per round before these are.
    later = kind == "models" or (kind == "strategies" and choice.takes(COHORT))
    built = later or problems.attempt(choice.make, where=f"{where} ") is not None
    return choice if built else None


def _missing(
    problems: ScenarioProblems, name: str, kind: str, arguments: Mapping[str, Any]
) -> None:
    """Say that a table names nothing."""
    where, selector = f"[{name}]", selector_of(kind)
    allowed = ", ".join(discovery.names(kind))
    problems.add(f"{where} '{selector}' is missing; allowed: {allowed}")
    for key in arguments:  # perhaps it is there under a slightly wrong name
        if nearest(key, [selector]):
            problems.add(f"{where} {unknown(key, f'a key of [{name}]', [selector])}")


def _why_no_server(factory: Callable[..., Any]) -> str | None:
    from fedsim.strategy.linear import why_no_server_optimizer

    return why_no_server_optimizer(factory)


def _server(
    problems: ScenarioProblems, name: str, strategy: Choice, given: Any, refusal: str | None
) -> Choice | None:
    """Hold the table of a strategy's server optimiser against it; None when it has a problem."""
    if not isinstance(given, dict):
        problems.add(
            f"[{name}] {SERVER} = {show(given)}: must be a table such as "
            '{ name = "adam", lr = 0.1 }'
        )
        return None
    place = f"{name}.{SERVER}"
    if refusal is not None:
        fit = [
            each
            for each in discovery.names("strategies")
            if _why_no_server(discovery.strategy_factory(each)) is None
        ]
        problems.add(
            f'[{place}]: [{name}] name = "{strategy.name}" {refusal}; a server optimiser goes with '
            f"{', '.join(fit)}"
        )
        return None
    return _named(problems, {place: given}, place, "server_optimizers", None)


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
    chosen = _named(problems, {"task": given}, "task", "models", "logistic", beside=beside)
    if chosen is None or own is None:
        return None
    model = chosen.table
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
