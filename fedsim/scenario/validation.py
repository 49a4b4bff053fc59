"""Holding a scenario's document against what its tables and factories allow.

Every problem is collected, one line each, with file, table and key.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedsim.basics.errors import (
    ScenarioError,
    is_too_large,
    largest_number,
    nearest,
    printable,
    show,
    unknown,
)
from fedsim.basics.import_paths import is_import_path
from fedsim.federation.devices import Devices
from fedsim.scenario import discovery, signatures
from fedsim.scenario.expectations import METRIC_PHASES, Expectation
from fedsim.scenario.tables import (
    FACTORY_TABLES,
    FIXED_TABLES,
    NESTED,
    OPTIONAL_FIXED,
    OPTIONAL_TABLES,
    WITH_PATHS,
    EvaluationTable,
    Head,
)

_T = TypeVar("_T")


class _ScenarioProblems:
    """The problems found so far, one line each."""

    def __init__(self, origin: str, tables: Mapping[str, Any]) -> None:
        self.origin = origin
        self.tables = tables
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        line = f"{self.origin}: {printable(text)}"
        if line not in self.lines:  # one mistake may be met in two places
            self.lines.append(line)

    def attempt(self, action: Callable[[], _T], *, where: str = "") -> _T | None:
        """Return what `action` does, or note why it refuses and return None."""
        try:
            return action()
        except ScenarioError as error:
            for line in str(error).splitlines():
                # Factories that know their table name it themselves.
                self.add(line if line.startswith("[") else f"{where}{line}")
        except (ValueError, MemoryError, OverflowError) as error:
            words = " ".join(str(error).split())
            if is_too_large(error):
                words = f"{largest_number(self.tables)}: is too large: {words}"
            self.add(words if words.startswith("[") else f"{where}{words}")
        except OSError as error:  # such as a name that is too long for a file
            self.add(f"{where}path = {show(error.filename)}: {error.strerror}")
        return None

    def raise_any(self) -> None:
        if self.lines:
            raise ScenarioError("\n".join(self.lines))


def validated(document: Mapping[str, Any], *, origin: str, folder: Path | None) -> dict[str, Any]:
    """Validate a whole document.

    Args:
        document: The scenario's keys and tables.
        origin: What messages call it.
        folder: Where relative paths are looked up first, or None.

    Returns:
        The scenario's fields by name, `origin` among them, complete with defaults.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    problems = _ScenarioProblems(origin, tables)
    allowed = [
        *Head.model_fields, *FACTORY_TABLES, *OPTIONAL_TABLES, *FIXED_TABLES, *OPTIONAL_FIXED,
        "expect",
    ]  # fmt: skip
    for key, value in document.items():
        if key not in allowed:
            what = "a table of a scenario" if isinstance(value, dict) else "a key of a scenario"
            problems.add(unknown(key, what, allowed))
        elif key not in Head.model_fields and not isinstance(value, dict):
            problems.add(f"[{key}] = {show(value)}: must be a table")

    given = {key: document[key] for key in Head.model_fields if key in document}
    head = _fixed(problems, Head, given, where="")
    fixed = {
        name: _fixed(problems, model, tables.get(name, {}), where=f"[{name}] ")
        for name, model in (FIXED_TABLES | OPTIONAL_FIXED).items()
    }
    if fixed["devices"] == Devices():  # says nothing
        fixed["devices"] = None
    expect = _expectations(problems, tables.get("expect", {}))
    made = _factory_tables(problems, tables, folder)
    _check_combinations(problems, made, fixed)
    _check_claims(problems, expect, fixed["evaluation"], made["strategy"])
    problems.raise_any()
    return {**dict(head or {}), **made, **fixed, "expect": expect, "origin": origin}


def check_clients(
    origin: str, tables: Mapping[str, Any], fixed: Mapping[str, Any], clients: int
) -> None:
    """Refuse what so many clients cannot do, where the data alone say how many there are.

    Args:
        origin: What messages call the scenario.
        tables: Its tables that name a factory.
        fixed: Its other tables.
        clients: Clients registered.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    problems = _ScenarioProblems(origin, tables)
    _check_clients(problems, tables, fixed, clients)
    problems.raise_any()


def _fixed(
    problems: _ScenarioProblems, model: type[BaseModel], table: Mapping[str, Any], *, where: str
) -> Any | None:
    if bad := signatures.find_unusable(table):
        name = next(key for key, value in table.items() if signatures.find_unusable(value))
        problems.add(f"{where}{name} = {show(table[name])}: {bad}")
        return None
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.add(where + _finding(model, detail, where))
    return None


def _finding(model: type[BaseModel], detail: ErrorDetails, where: str) -> str:
    """Word one finding about a fixed table."""
    *parents, key = [str(part) for part in detail["loc"]] or [""]
    owner: type[BaseModel] = model
    for parent in parents:
        owner = NESTED.get(parent, owner)
    place = ".".join([*parents, key])
    if detail["type"] == "extra_forbidden":
        if where.endswith('" '):  # a claim: [expect] "metric"
            return unknown(key, f"a key of {where.strip()}", owner.model_fields)
        table = ".".join(filter(None, [where.strip(" []"), *parents]))
        return unknown(key, f"a key of [{table}]", owner.model_fields)
    if detail["type"] == "missing":
        return f"'{place}' is missing"
    words = signatures.reason(detail)
    if not place:
        return words
    if detail["type"] == "value_error":
        return f"{place} {words}"
    return f"{place} = {show(detail['input'])}: {words}"


def _expectations(problems: _ScenarioProblems, table: Mapping[str, Any]) -> dict[str, Expectation]:
    expect = {}
    for metric, claim in table.items():
        where = f'[expect] "{metric}" '
        _check_metric(problems, metric, where="[expect]")
        if not isinstance(claim, dict):
            problems.add(f"{where}= {show(claim)}: must be a table such as {{ min = 0.9 }}")
            continue
        found = _fixed(problems, Expectation, claim, where=where)
        if found is not None:
            expect[metric] = found
    return expect


def _check_metric(problems: _ScenarioProblems, metric: str, *, where: str) -> None:
    phase, _, name = metric.partition("/")
    if phase not in METRIC_PHASES or not name:
        guess = nearest(phase, METRIC_PHASES)
        hint = f"did you mean '{guess}/{name or 'loss'}'? " if guess and guess != phase else ""
        problems.add(
            f"{where} '{metric}' is not a metric that a run records; {hint}metrics are "
            f"phase/name with a phase of {', '.join(METRIC_PHASES)}"
        )


def _factory_tables(
    problems: _ScenarioProblems, tables: Mapping[str, Any], folder: Path | None
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
    problems: _ScenarioProblems,
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
    problems: _ScenarioProblems,
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


def _task(problems: _ScenarioProblems, table: Mapping[str, Any]) -> dict[str, Any] | None:
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


def _check_combinations(
    problems: _ScenarioProblems, tables: Mapping[str, Any], fixed: Mapping[str, Any]
) -> None:
    """Refuse what each table allows and all together do not."""
    engine, evaluation = fixed["engine"], fixed["evaluation"]
    if engine is not None and engine.chunk_size is not None and engine.chunk_size < 2:
        problems.add(
            f"[engine] chunk_size = {engine.chunk_size}: must be at least 2 (a client that is "
            "computed alone takes other kernels and so gets other bits)"
        )
    _check_sent(problems, tables["strategy"], tables["client"])
    data, partition = tables["data"], tables["partition"]
    if data is None or partition is None:
        return
    if data["name"] == "synthetic" and partition["kind"] != "natural":
        problems.add(
            f'[partition] kind = "{partition["kind"]}" with [data] name = "synthetic": its clients '
            'are generated one by one and nothing is there to split; use kind = "natural"'
        )
    if evaluation is not None and evaluation.per_client and not evaluation.clients:
        problems.add(
            "[evaluation] per_client = true with [evaluation] clients = 0: say how many clients "
            "evaluate"
        )
    if (clients := partition.get("clients")) is not None:
        _check_clients(problems, tables, fixed, clients)


def _check_clients(
    problems: _ScenarioProblems, tables: Mapping[str, Any], fixed: Mapping[str, Any], clients: int
) -> None:
    """Refuse what so many clients cannot do."""
    engine, evaluation = fixed["engine"], fixed["evaluation"]
    if evaluation is not None and evaluation.clients > clients:
        problems.add(
            f"[evaluation] clients = {evaluation.clients} with {clients} clients: at most "
            f"{clients} can evaluate"
        )
    if attack := tables["attack"]:
        problems.attempt(lambda: discovery.make("attacks", attack).check(clients))
    if topology := tables["topology"]:
        problems.attempt(lambda: discovery.make("topologies", topology).check(clients))
    if (participation := tables["participation"]) is None:
        return
    expected = problems.attempt(lambda: _expected_cohort(participation, clients))
    if (devices := fixed["devices"]) is not None and devices.over_select > 1:
        problems.attempt(lambda: _check_over_selection(devices, participation, clients))
    strategy = tables["strategy"]
    if strategy is not None and expected is not None and discovery.takes_cohort(strategy["name"]):
        problems.attempt(
            lambda: discovery.make_strategy(strategy, cohort=expected), where="[strategy] "
        )
    cohort = participation.get("cohort_size", clients)
    if engine is not None and engine.min_replies > cohort:
        problems.add(
            f"[engine] min_replies = {engine.min_replies}: a round has at most {cohort} replies"
        )


def _check_sent(
    problems: _ScenarioProblems,
    strategy: Mapping[str, Any] | None,
    client: Mapping[str, Any] | None,
) -> None:
    """Refuse a client procedure that does not use what the strategy sends."""
    if strategy is None or client is None:
        return

    def takes(procedure: str, name: str) -> bool:
        return name in getattr(discovery.procedure_factory(procedure), "takes", ())

    for name in getattr(discovery.strategy_factory(strategy["name"]), "sends", ()):
        if not takes(client["name"], name):
            fit = [known for known in discovery.names("clients") if takes(known, name)]
            problems.add(
                f'[client] name = "{client["name"]}": does not use the {name} that [strategy] name '
                f'= "{strategy["name"]}" sends; allowed: {", ".join(fit)}'
            )


def _check_claims(
    problems: _ScenarioProblems,
    expect: Mapping[str, Expectation],
    evaluation: EvaluationTable | None,
    strategy: Mapping[str, Any] | None,
) -> None:
    """Refuse what waits for a metric that this scenario never records."""
    if evaluation is None:
        return
    name = None if strategy is None else strategy["name"]
    has_nodes = name is None or is_import_path(name) or discovery.takes_topology(name)
    watched = [("[expect]", metric) for metric in expect]
    if evaluation.stop is not None:
        watched.append(("[evaluation] stop.metric", evaluation.stop.metric))
        _check_metric(problems, evaluation.stop.metric, where="[evaluation] stop.metric")
    for where, metric in watched:
        if metric.startswith("local/") and not evaluation.clients:
            problems.add(
                f"{where} '{metric}' is never recorded with [evaluation] clients = 0: say how many "
                "clients evaluate"
            )
        if metric.startswith("pooled/") and not evaluation.pooled:
            problems.add(f"{where} '{metric}' is never recorded without [evaluation] pooled = true")
        if metric.startswith("nodes/") and not has_nodes:
            problems.add(
                f"{where} '{metric}' is never recorded with [strategy] name = \"{name}\": it has "
                'one model for all; say "test/..."'
            )


def _check_over_selection(devices: Devices, table: Mapping[str, Any], clients: int) -> None:
    larger: Any = discovery.make("participation", table).over_selected(devices.over_select)
    try:
        larger.expected_cohort(clients)
    except ScenarioError:
        size = table.get("cohort_size")
        raise ScenarioError(
            f"[devices] over_select = {devices.over_select:g}: times [participation] cohort_size "
            f"= {size} that is more than [partition] clients = {clients}; lower one of them"
        ) from None


def _expected_cohort(table: Mapping[str, Any], clients: int) -> int:
    """Ask the participation rule how many take part; it refuses what the clients cannot give."""
    return int(discovery.make("participation", table).expected_cohort(clients))
