"""The scenario: one TOML file that says everything that decides a run's result.

A scenario is validated whole before anything starts. Tables that name a factory (`[data]`,
`[strategy]`, ...) are held against that factory's signature, the fixed ones (`[engine]`, ...)
against the models below; every problem is reported, one line each, with file, table and key.
"""

import contextlib
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fedsim import discovery, factories
from fedsim.errors import ScenarioError, nearest, unknown
from fedsim.imports import is_import_path

_T = TypeVar("_T")

# The first parts of the metric names that a run can record.
METRIC_PHASES = ("clients", "comm", "local", "nodes", "server", "test", "time", "train")

_FACTORY_TABLES = ("task", "data", "partition", "participation", "strategy", "client")
_OPTIONAL_TABLES = ("attack", "topology")  # factory tables that a scenario may leave out
_WITH_PATHS = ("data", "topology")

# What may differ between two runs which still have the same result: where and how fast it is
# computed, what is written down and what is claimed. A path says where data or a graph lies; what
# it holds is in the manifest's own hash.
_NO_MATTER = ("title", "source", "tier", "checkpoint", "output", "expect")
_NO_MATTER_ENGINE = (
    "kind",
    "workers",
    "client_resources",
    "address",
    "client_timeout_s",
    "round_timeout_s",
    "startup_timeout_s",
)


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ClientResources(_Table):
    """What one worker takes of the machine, as Flower's `client_resources`."""

    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)


class Engine(_Table):
    """`[engine]`: where and how clients are computed."""

    kind: Literal["ray", "inline"] = "ray"
    workers: int | None = Field(default=None, ge=1)
    chunk_size: int | None = None
    executor: Literal["auto", "vmap", "loop"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    deterministic: bool = True
    client_resources: ClientResources = ClientResources()
    address: str | None = None
    client_timeout_s: float | None = Field(default=None, gt=0)
    round_timeout_s: float | None = Field(default=None, gt=0)
    startup_timeout_s: float = Field(default=120.0, gt=0)
    on_failure: Literal["skip", "stop"] = "skip"
    min_replies: int = Field(default=1, ge=1)


class Stop(_Table):
    """`[evaluation.stop]`: when a run ends before its last round."""

    metric: str = "test/accuracy"
    target: float | None = None
    patience: int | None = Field(default=None, ge=1)
    mode: Literal["max", "min"] = "max"

    @model_validator(mode="after")
    def _has_a_reason(self) -> Self:
        if self.target is None and self.patience is None:
            raise ValueError("needs a 'target', a 'patience' or both")
        return self


class Evaluation(_Table):
    """`[evaluation]`: what is measured, and how often."""

    every: int = Field(default=1, ge=1)
    clients: int = Field(default=0, ge=0)
    batch_size: int = Field(default=1000, ge=1)
    stop: Stop | None = None


class Checkpoint(_Table):
    """`[checkpoint]`: how often a run can be resumed from, and how many such points are kept."""

    every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=1)


class Output(_Table):
    """`[output]`: what is written besides `metrics.jsonl`."""

    tensorboard: bool = False


class Expectation(_Table):
    """One claim of `[expect]`: bounds on the mean of a metric's last recorded values."""

    min: float | None = None
    max: float | None = None
    last: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _claims_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("needs a 'min', a 'max' or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min:g} is above max = {self.max:g}")
        return self


class _Head(_Table):
    """The keys outside every table."""

    title: str = ""
    source: str = ""
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=10, ge=1)
    tier: Literal["fast", "slow", "gpu", "deploy"] = "fast"


_FIXED_TABLES: dict[str, type[_Table]] = {
    "engine": Engine,
    "evaluation": Evaluation,
    "checkpoint": Checkpoint,
    "output": Output,
}


@dataclass(frozen=True)
class Scenario:
    """A validated scenario, complete with defaults.

    Attributes:
        title: One line for people.
        source: What it reproduces.
        seed: The seed of every draw.
        rounds: The number of rounds.
        tier: When tests run it.
        task: `kind`, `model`, `dtype` and the model's keys.
        data: `name` and the data set's keys.
        partition: `kind`, `clients` and the partition's keys.
        participation: `kind` and its keys.
        strategy: `name` and the hyperparameters.
        client: `name` of the client procedure and its hyperparameters.
        attack: `kind` and its keys; empty without attackers.
        topology: `kind` and its keys; empty for strategies that need no graph.
        engine: Where and how clients are computed.
        evaluation: What is measured, and how often.
        checkpoint: How often a run can be resumed from.
        output: What is written besides metrics.
        expect: The claims, by metric.
        origin: What messages call the scenario: its file.
    """

    title: str
    source: str
    seed: int
    rounds: int
    tier: str
    task: dict[str, Any]
    data: dict[str, Any]
    partition: dict[str, Any]
    participation: dict[str, Any]
    strategy: dict[str, Any]
    client: dict[str, Any]
    attack: dict[str, Any]
    topology: dict[str, Any]
    engine: Engine
    evaluation: Evaluation
    checkpoint: Checkpoint
    output: Output
    expect: dict[str, Expectation]
    origin: str

    @property
    def stem(self) -> str:
        """The scenario's name: that of its file without folder and suffix."""
        return Path(self.origin).stem or "scenario"

    def resolved(self) -> dict[str, Any]:
        """Return the whole scenario as JSON-able tables; `from_resolved` reads them back.

        A path below the home folder is written with `~`, so that no user is named.
        """
        document: dict[str, Any] = {name: getattr(self, name) for name in _Head.model_fields}
        document |= {name: dict(getattr(self, name)) for name in _FACTORY_TABLES}
        document |= {name: dict(t) for name in _OPTIONAL_TABLES if (t := getattr(self, name))}
        document |= {name: getattr(self, name).model_dump(mode="json") for name in _FIXED_TABLES}
        document["expect"] = {
            metric: claim.model_dump(mode="json") for metric, claim in self.expect.items()
        }
        for name in _WITH_PATHS:
            if isinstance(path := document.get(name, {}).get("path"), str):
                document[name]["path"] = _without_user(path)
        return document

    @contextlib.contextmanager
    def named_in_refusals(self) -> Iterator[None]:
        """Put this scenario's file before every refusal inside that names only a table.

        Some values show to be impossible when data are read or a model is built; their refusal then
        reads like those found while loading.
        """
        try:
            yield
        except ScenarioError as error:
            message = str(error)
            if message.startswith("["):
                lines = [f"{self.origin}: {line}" for line in message.splitlines()]
                error.args = ("\n".join(lines),)
            raise

    @classmethod
    def from_resolved(cls, document: Mapping[str, Any], origin: str) -> "Scenario":
        """Read a scenario that `resolved` wrote, and validate it anew.

        Raises:
            ScenarioError: If anything in it is wrong.
        """
        if not isinstance(document, Mapping):
            raise ScenarioError(f"{origin}: is not a scenario: it must be a table")
        return _validated(document, origin=origin, folder=None)

    def with_overrides(self, overrides: Sequence[str]) -> "Scenario":
        """Return this scenario with `table.key=value` assignments applied.

        Raises:
            ScenarioError: If an assignment or what comes of it is wrong.
        """
        if not overrides:
            return self
        document = self.resolved()
        _apply(document, overrides)
        return self.from_resolved(document, self.origin)

    @property
    def sha256(self) -> str:
        """The hash of what decides the run's result, whoever computes it wherever."""
        document = {key: value for key, value in self.resolved().items() if key not in _NO_MATTER}
        document["engine"] = {
            key: value for key, value in document["engine"].items() if key not in _NO_MATTER_ENGINE
        }
        for name in _WITH_PATHS:
            if name in document:
                document[name] = {k: v for k, v in document[name].items() if k != "path"}
        text = json.dumps(document, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read and validate a scenario file.

    Args:
        path: The file, or the name of a scenario that comes with fedsim ("quickstart").
        overrides: Assignments such as "engine.kind=inline"; values are TOML, bare words strings.

    Returns:
        The scenario, complete with defaults.

    Raises:
        ScenarioError: With one line for everything that is wrong.
    """
    file, origin = _find(path)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"{origin}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{origin}: is not UTF-8 text (at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        raise ScenarioError(f"{origin}: invalid TOML: {message[:1].lower()}{message[1:]}") from None
    _apply(document, overrides)
    return _validated(document, origin=origin, folder=file.parent)


def check_expectations(
    expect: Mapping[str, Expectation], history: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Hold recorded metrics against the scenario's claims.

    Args:
        expect: The claims by metric.
        history: One mapping per record, in the order of rounds, which holds the metrics recorded
            then by name.

    Returns:
        Per claim `metric`, `claim` (in words), `value` (the mean of the last values, of fewer if
        there are fewer; nan when one of them is not finite; None when the metric was never
        recorded) and `holds`, false for nan and None.

    Example:
        >>> claims = {"test/accuracy": Expectation(min=0.8, last=2)}
        >>> check_expectations(claims, [{"test/accuracy": a} for a in (0.1, 0.8, 0.9)])[0]["holds"]
        True
    """
    outcomes = []
    for metric, claim in expect.items():
        recorded = [float(record[metric]) for record in history if record.get(metric) is not None]
        last = recorded[-claim.last :]
        value = None
        if last:
            finite = all(map(math.isfinite, last))
            value = math.fsum(last) / len(last) if finite else math.nan
        words = _in_words(claim) + ("" if recorded else " (never recorded)")
        holds = value is not None and _within(claim, value)
        outcomes.append({"metric": metric, "claim": words, "value": value, "holds": holds})
    return outcomes


def _within(claim: Expectation, value: float) -> bool:
    lowest = -math.inf if claim.min is None else claim.min
    highest = math.inf if claim.max is None else claim.max
    return lowest <= value <= highest  # false for nan


def _in_words(claim: Expectation) -> str:
    subject = f"mean of the last {claim.last} " if claim.last > 1 else ""
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">=", claim.min), ("<=", claim.max))
        if bound is not None
    ]
    return subject + " and ".join(bounds)


# Finding the file and applying overrides.


def _find(path: str | Path) -> tuple[Path, str]:
    """Return a scenario's file, and what messages call it."""
    file = Path(path)
    try:
        if file.is_file():
            return file, str(file)
    except OSError as error:  # such as a name that is too long
        raise ScenarioError(f"{file}: cannot be read: {error.strerror}") from error
    if file.is_dir():
        raise ScenarioError(f"{file}: is a folder; name one of its .toml files")
    known = discovery.shipped_scenarios()
    if file.parent == Path() and file.name.removesuffix(".toml") in known:
        return known[file.name.removesuffix(".toml")], file.name
    beside = {f.stem: f for f in file.parent.glob("*.toml")} if file.parent.is_dir() else {}
    guess = nearest(file.stem, {**known, **beside})
    hint = f"; did you mean '{beside.get(guess, guess)}'?" if guess else ""
    raise ScenarioError(
        f"{file}: there is no such scenario file{hint} (`fedsim list scenarios` names those that "
        "come with fedsim)"
    )


def _apply(document: dict[str, Any], overrides: Iterable[str]) -> None:
    for override in overrides:
        left, separator, right = override.partition("=")
        parts = _key_parts(left)
        if not separator or not all(parts):
            raise ScenarioError(
                f"--set {override}: must be table.key=value, such as engine.kind=inline"
            )
        value = _override_value(override, right.strip())
        table = document
        for depth, part in enumerate(parts[:-1], start=1):
            # A table that is optional and was left out reads back as null from a run folder.
            if table.get(part) is None:
                table[part] = {}
            table = table[part]
            if not isinstance(table, dict):
                name = ".".join(parts[:depth])
                raise ScenarioError(f"--set {override}: '{name}' is a value and has no keys")
        table[parts[-1]] = value


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
            raise ScenarioError(f"--set {override}: the value is invalid TOML: {error}") from None
        return text
    return document["value"] if len(document) == 1 else text


# Validating a document.


class _Problems:
    """The problems found so far, one line each."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        self.lines.append(f"{self.origin}: {text}")

    def attempt(self, action: Callable[[], _T], *, where: str = "") -> _T | None:
        """Return what `action` does, or note why it refuses and return None."""
        try:
            return action()
        except ScenarioError as error:
            for line in str(error).splitlines():
                # Factories that know their table name it themselves.
                self.add(line if line.startswith("[") else f"{where}{line}")
        except ValueError as error:
            self.add(f"{where}{' '.join(str(error).split())}")
        return None

    def raise_any(self) -> None:
        if self.lines:
            raise ScenarioError("\n".join(self.lines))


def _validated(document: Mapping[str, Any], *, origin: str, folder: Path | None) -> Scenario:
    """Validate a whole document; `folder` is where relative paths are looked up first."""
    problems = _Problems(origin)
    allowed = [
        *_Head.model_fields, *_FACTORY_TABLES, *_OPTIONAL_TABLES, *_FIXED_TABLES, "expect"
    ]  # fmt: skip
    for key, value in document.items():
        if key not in allowed:
            what = "a table of a scenario" if isinstance(value, dict) else "a key of a scenario"
            problems.add(unknown(key, what, allowed))
        elif key not in _Head.model_fields and not isinstance(value, dict):
            problems.add(f"[{key}] = {factories.show(value)}: must be a table")
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}

    given = {key: document[key] for key in _Head.model_fields if key in document}
    head = _fixed(problems, _Head, given, where="")
    fixed = {
        name: _fixed(problems, model, tables.get(name, {}), where=f"[{name}] ")
        for name, model in _FIXED_TABLES.items()
    }
    expect = _expectations(problems, tables.get("expect", {}))
    made = _factory_tables(problems, tables, folder)
    _check_combinations(problems, made, fixed)
    _check_claims(problems, expect, fixed["evaluation"], made["strategy"])
    problems.raise_any()
    values: dict[str, Any] = {**dict(head or {}), **made, **fixed}
    return Scenario(**values, expect=expect, origin=origin)


def _fixed(
    problems: _Problems, model: type[_Table], table: Mapping[str, Any], *, where: str
) -> Any | None:
    if bad := factories.find_unusable(table):
        name = next(key for key, value in table.items() if factories.find_unusable(value))
        problems.add(f"{where}{name} = {factories.show(table[name])}: {bad}")
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
        owner = _NESTED.get(parent, owner)
    place = ".".join([*parents, key])
    if detail["type"] == "extra_forbidden":
        table = ".".join(filter(None, [where.strip(" []"), *parents]))
        return unknown(key, f"a key of [{table}]", owner.model_fields)
    if detail["type"] == "missing":
        return f"'{place}' is missing"
    words = factories.reason(detail)
    if not place:
        return words
    if detail["type"] == "value_error":
        return f"{place} {words}"
    return f"{place} = {factories.show(detail['input'])}: {words}"


_NESTED: dict[str, type[BaseModel]] = {"client_resources": ClientResources, "stop": Stop}


def _expectations(problems: _Problems, table: Mapping[str, Any]) -> dict[str, Expectation]:
    expect = {}
    for metric, claim in table.items():
        where = f'[expect] "{metric}" '
        _check_metric(problems, metric, where="[expect]")
        if not isinstance(claim, dict):
            problems.add(
                f"{where}= {factories.show(claim)}: must be a table such as {{ min = 0.9 }}"
            )
            continue
        found = _fixed(problems, Expectation, claim, where=where)
        if found is not None:
            expect[metric] = found
    return expect


def _check_metric(problems: _Problems, metric: str, *, where: str) -> None:
    phase, _, name = metric.partition("/")
    if phase not in METRIC_PHASES or not name:
        guess = nearest(phase, METRIC_PHASES)
        hint = f"did you mean '{guess}/{name or 'loss'}'? " if guess and guess != phase else ""
        problems.add(
            f"{where} '{metric}' is not a metric that a run records; {hint}metrics are "
            f"phase/name with a phase of {', '.join(METRIC_PHASES)}"
        )


def _factory_tables(
    problems: _Problems, tables: Mapping[str, Any], folder: Path | None
) -> dict[str, dict[str, Any] | None]:
    """Return the tables that name a factory, complete; None for one with a problem."""
    tables = {
        **tables, **{n: _located(tables.get(n, {}), folder) for n in _WITH_PATHS}
    }  # fmt: skip
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
    if tables.get("attack"):
        made["attack"] = _named(problems, tables, "attack", "attacks", "kind", None)
    strategy = made["strategy"]
    needs = strategy is not None and discovery.takes_topology(strategy["name"])
    if tables["topology"] or needs:
        made["topology"] = _named(problems, tables, "topology", "topologies", "kind", "ring")
    if tables["topology"] and strategy is not None and not needs:
        problems.add(
            f"[topology] kind = {factories.show(tables['topology'].get('kind'))}: [strategy] name "
            f'= "{strategy["name"]}" has a server and no graph; leave the table out'
        )
    return made


def _named(
    problems: _Problems,
    tables: Mapping[str, Any],
    name: str,
    kind: str,
    selector: str,
    default: str | None,
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
    """
    where = f"[{name}]"
    arguments = dict(tables.get(name, {}))
    choice = arguments.pop(selector, default)
    if choice is None:
        allowed = ", ".join(discovery.names(kind))
        problems.add(f"{where} '{selector}' is missing; allowed: {allowed}")
        return None
    if not isinstance(choice, str):
        problems.add(f"{where} {selector} = {factories.show(choice)}: must be a string")
        return None
    factory = problems.attempt(lambda: discovery.factory(kind, choice), where=f"{where} ")
    if factory is None:
        return None
    noun = "hyperparameter" if kind in ("strategies", "clients") else "key"
    checked = problems.attempt(
        lambda: factories.check(
            factory,
            arguments,
            where=where,
            owner=f"a {noun} of {choice}",
            skip=discovery.given_by_fedsim(kind),
            foreign=is_import_path(choice),
        )
    )
    if checked is None:
        return None
    # A model cannot be built before its data's shape is known.
    if kind != "models":
        built = problems.attempt(lambda: factory(**checked), where=f"{where} ")
        if built is None:
            return None
    return {selector: choice, **checked}


def _task(problems: _Problems, table: Mapping[str, Any]) -> dict[str, Any] | None:
    from fedsim.tasks import DTYPES, TASKS

    given = dict(table)
    fixed: dict[str, Any] = {}
    for key, default, allowed in (
        ("kind", "classification", list(TASKS)),
        ("dtype", "float32", list(DTYPES)),
    ):
        fixed[key] = given.pop(key, default)
        if fixed[key] not in allowed:
            shown = factories.show(fixed[key]).strip('"')
            problems.add(f"[task] {key}: {unknown(shown, f'a {key} of a task', allowed)}")
    model = _named(problems, {"task": given}, "task", "models", "model", "logistic")
    return None if model is None else {"kind": fixed["kind"], **model, "dtype": fixed["dtype"]}


def _located(table: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """Make a data path absolute: beside the scenario file if it is there, else as it stands."""
    if not isinstance(table.get("path"), str):
        return dict(table)
    path = Path(os.path.expanduser(table["path"]))
    if folder is not None and (folder / path).exists():
        path = folder / path
    return {**table, "path": os.path.abspath(path)}


def _without_user(path: str) -> str:
    home = Path(os.path.expanduser("~"))  # stays "~" where there is no home
    inside = Path(path).is_relative_to(home) and home != Path(home.anchor)
    return str(Path("~") / Path(path).relative_to(home)) if inside else path


def _check_combinations(
    problems: _Problems, tables: Mapping[str, Any], fixed: Mapping[str, Any]
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
    generated, natural = data["name"] == "synthetic", partition["kind"] == "natural"
    if generated and not natural:
        problems.add(
            f'[partition] kind = "{partition["kind"]}" with [data] name = "synthetic": its clients '
            'are generated one by one and nothing is there to split; use kind = "natural"'
        )
    if natural and not generated:
        problems.add(
            f'[partition] kind = "natural" with [data] name = "{data["name"]}": the data set does '
            'not say whose samples are whose; use kind = "iid" or "dirichlet"'
        )
    clients = partition["clients"]
    if evaluation is not None and evaluation.clients > clients:
        problems.add(
            f"[evaluation] clients = {evaluation.clients} with [partition] clients = {clients}: "
            f"at most {clients} can evaluate"
        )
    if attack := tables["attack"]:
        problems.attempt(lambda: discovery.make("attacks", attack).check(clients))
    if topology := tables["topology"]:
        problems.attempt(lambda: discovery.make("topologies", topology).check(clients))
    if (participation := tables["participation"]) is None:
        return
    problems.attempt(lambda: _expected_cohort(participation, clients))
    cohort = participation.get("cohort_size", clients)
    if engine is not None and engine.min_replies > cohort:
        problems.add(
            f"[engine] min_replies = {engine.min_replies}: a round has at most {cohort} replies"
        )


def _check_sent(
    problems: _Problems, strategy: Mapping[str, Any] | None, client: Mapping[str, Any] | None
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
    problems: _Problems,
    expect: Mapping[str, Expectation],
    evaluation: Evaluation | None,
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
        if metric.startswith("nodes/") and not has_nodes:
            problems.add(
                f"{where} '{metric}' is never recorded with [strategy] name = \"{name}\": it has "
                'one model for all; say "test/..."'
            )


def _expected_cohort(table: Mapping[str, Any], clients: int) -> int:
    """Ask the participation rule how many take part; it refuses what the clients cannot give."""
    return int(discovery.make("participation", table).expected_cohort(clients))
