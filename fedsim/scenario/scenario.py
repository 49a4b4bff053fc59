"""The scenario: one TOML file that says everything that decides a run's result.

A scenario is validated whole before anything starts. Tables that name a factory (`[data]`,
`[strategy]`, ...) are held against that factory's signature, the fixed ones (`[engine]`, ...)
against the models below; every problem is reported, one line each, with file, table and key.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsim.basics import kernels_in_use, project
from fedsim.basics.errors import ScenarioError
from fedsim.basics.import_paths import code_behind, folders_of, import_paths, is_import_path
from fedsim.basics.kernels import Bits
from fedsim.basics.sources import Code
from fedsim.federation.admission_table import Admission
from fedsim.federation.clock_table import Clock
from fedsim.federation.deployment_table import WhoMustBeThere
from fedsim.federation.device_table import Devices
from fedsim.scenario.choice import KINDS_OF_TABLES, Choice
from fedsim.scenario.client_table import as_written
from fedsim.scenario.combinations import check_clients
from fedsim.scenario.expectations import Expectation
from fedsim.scenario.identity import identity_of
from fedsim.scenario.overrides import apply, with_key
from fedsim.scenario.problems import ScenarioProblems
from fedsim.scenario.tables import (
    FACTORY_TABLES,
    FIXED_TABLES,
    OPTIONAL_FIXED,
    OPTIONAL_TABLES,
    WITH_PATHS,
    CheckpointTable,
    Engine,
    EvaluationTable,
    Head,
    Output,
)
from fedsim.scenario.validation import validated

# What may differ between two runs which still have the same result: where and how fast it is
# computed, what is written down and what is claimed. A path says where data, a graph or code lies;
# what it holds is in the manifest's own hash, or in `code.json`.
_WITH_CODE = ("task", "data", "strategy", "client", "attack")  # may name something by import path


# keys that decide results and came later, by table: at these values a scenario has its old hash
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
        devices: What happens to selected clients inside a round, or None.
        admission: How far one reply may move the model, or None.
        clock: When the server aggregates in virtual time, or None.
        deployment: Which sites a run does not go on without, or None.
        engine: Where and how clients are computed.
        evaluation: What is measured, and how often.
        checkpoint: How often a run can be resumed from.
        output: What is written besides metrics.
        expect: The claims, by metric.
        origin: What messages call the scenario: its file.
        modules: The folders of what is named by import path, as PYTHONPATH lists folders.
        choices: What the tables name, by table, each looked up once; `[task]` is not among them,
            and no table that is empty.
        first_places: What a run began with under keys of its own code's files, which may have been
            moved since: the hash is of these.
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
    devices: Devices | None
    admission: Admission | None
    clock: Clock | None
    deployment: WhoMustBeThere | None
    engine: Engine
    evaluation: EvaluationTable
    checkpoint: CheckpointTable
    output: Output
    expect: dict[str, Expectation]
    origin: str
    modules: str = ""
    choices: Mapping[str, Choice] = field(default_factory=dict, repr=False, compare=False)
    first_places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Let every table have its choice: that which was checked, or one still to be looked up."""
        tables = {name: table for name in KINDS_OF_TABLES if (table := getattr(self, name))}
        choices = {
            name: found
            if (found := self.choices.get(name)) and found.table is table
            else Choice(KINDS_OF_TABLES[name], table)
            for name, table in tables.items()
        }
        object.__setattr__(self, "choices", choices)

    @property
    def stem(self) -> str:
        """The scenario's name: that of its file without folder and suffix."""
        return Path(self.origin).stem or "scenario"

    def resolved(self) -> dict[str, Any]:
        """Return the whole scenario as JSON-able tables; `from_resolved` reads them back.

        A path below the home folder is written with `~`, so that no user is named.
        """
        document: dict[str, Any] = {name: getattr(self, name) for name in Head.model_fields}
        folders = [without_user(each) for each in self.modules.split(os.pathsep) if each]
        document["modules"] = os.pathsep.join(folders)
        if not folders:
            del document["modules"]
        document |= {name: dict(getattr(self, name)) for name in FACTORY_TABLES}
        document["client"] = as_written(self.choices["client"], self.choices["strategy"])
        document |= {name: dict(t) for name in OPTIONAL_TABLES if (t := getattr(self, name))}
        fixed = {name: getattr(self, name) for name in (*OPTIONAL_FIXED, *FIXED_TABLES)}
        document |= {n: t.model_dump(mode="json") for n, t in fixed.items() if t is not None}
        document["expect"] = {
            metric: claim.model_dump(mode="json") for metric, claim in self.expect.items()
        }
        for name, key in WITH_PATHS.items():
            if isinstance(path := document.get(name, {}).get(key), str):
                document[name][key] = without_user(path)
        return document

    @property
    def own_code(self) -> list[str]:
        """What computes and is code of the user's own, such as `[task] model = 'mine:Net'`."""
        tables = {name: getattr(self, name) for name in ("task", "strategy", "client", "attack")}
        parts = self.choices["client"].parts
        return [
            f"[{name}] {key} = '{value}'"
            for name, table in [*tables.items(), *(("client.parts", part.table) for part in parts)]
            for key, value in table.items()
            if isinstance(value, str) and is_import_path(value) and not value.startswith("flower:")
        ]

    @property
    def import_paths(self) -> list[str]:
        """What is named by import path, the loader of its data too."""
        return list(import_paths({name: getattr(self, name) for name in _WITH_CODE}).values())

    @property
    def code(self) -> Code:
        """The files behind what is named by import path, as they are now."""
        return code_behind(self.import_paths, self.folders)

    @property
    def folders(self) -> list[str]:
        """The folders of what is named by import path."""
        return [each for each in self.modules.split(os.pathsep) if each]

    def open_folders(self) -> None:
        """Let this scenario's modules be found from now on, and no other project's.

        Does nothing where nothing is named by import path.
        """
        if self.import_paths:
            project.enter(self.folders)

    @property
    def promise(self) -> Bits:
        """Which promise about its bits holds: fedsim pins no GPU and no kernels of the user's."""
        pinned = self.engine.device == "cpu" and not self.own_code
        return self.engine.bits if pinned else "fast"

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

    def check_clients(self, clients: int) -> None:
        """Refuse what so many clients cannot do, where the data alone say how many there are.

        Args:
            clients: Clients registered.

        Raises:
            ScenarioError: With one line for everything that is wrong.
        """
        tables = {name: getattr(self, name) for name in (*FACTORY_TABLES, *OPTIONAL_TABLES)}
        fixed = {name: getattr(self, name) for name in (*FIXED_TABLES, *OPTIONAL_FIXED)}
        problems = ScenarioProblems(self.origin, tables)
        check_clients(problems, self.choices, fixed, clients)
        problems.raise_any()

    @classmethod
    def from_resolved(cls, document: Mapping[str, Any], origin: str) -> "Scenario":
        """Read a scenario that `resolved` wrote, and validate it anew.

        Raises:
            ScenarioError: If anything in it is wrong.
        """
        if not isinstance(document, Mapping):
            raise ScenarioError(f"{origin}: is not a scenario: it must be a table")
        pin(document)
        document = with_folders(document, origin, None)
        return cls(**validated(document, origin=origin, folder=None))

    def with_overrides(self, overrides: Sequence[str]) -> "Scenario":
        """Return this scenario with `table.key=value` assignments applied.

        Raises:
            ScenarioError: If an assignment or what comes of it is wrong.
        """
        if not overrides:
            return self
        document = self.resolved()
        apply(document, overrides)
        return self.from_resolved(document, self.origin).begun_with(self.first_places)

    def begun_with(self, places: Mapping[str, str]) -> "Scenario":
        """Return this scenario as one of a run that began with these files, by `table.key`."""
        return replace(self, first_places=places) if places else self

    def with_data(self, folder: Path | None) -> "Scenario":
        """Return this scenario with its data set read from the folder of its name in `folder`.

        It stays as it is where no folder is given, the scenario says a path itself, or its data set
        is not read from files.
        """
        if folder is None or "path" not in self.data or self.data["path"] is not None:
            return self
        return self.changed(
            data={**self.data, "path": str((folder / self.data["name"]).absolute())}
        )

    def changed(self, **tables: Any) -> "Scenario":
        """Return this scenario with whole tables, or keys outside of tables, replaced.

        Raises:
            ScenarioError: If what comes of it is wrong.
        """
        found = self.from_resolved({**self.resolved(), **tables}, self.origin)
        return found.begun_with(self.first_places)

    @property
    def sha256(self) -> str:
        """A hash of every key that can change the run's result; equal on every machine."""
        # with the parts that the strategy adds, as clients have them
        document = {**self.resolved(), "client": dict(self.client)}
        for key, value in self.first_places.items():
            document = with_key(document, key, value)
        return identity_of(document)


def code_in(document: Mapping[str, Any], origin: str) -> Code:
    """Return the files behind what a resolved scenario names by import path; nothing is imported.

    Raises:
        ScenarioError: If the folder in which they lay is not there.
    """
    document = with_folders(document, origin, None)
    paths = import_paths({name: document[name] for name in _WITH_CODE if name in document})
    folders = [each for each in document["modules"].split(os.pathsep) if each]
    return code_behind(paths.values(), folders)


def with_folders(document: Mapping[str, Any], origin: str, folder: Path | None) -> dict[str, Any]:
    """Return a document that says where what it names by import path lies, and open that."""
    document = dict(document)
    tables = {name: document[name] for name in _WITH_CODE if name in document}
    paths = import_paths(tables)
    given = document.get("modules", "")
    if not isinstance(given, str):  # is refused with all the rest
        return document
    document["modules"] = ""
    if paths:
        try:
            folders = folders_of(paths, given, folder)
        except ScenarioError as error:
            raise ScenarioError(f"{origin}: {error}") from error
        document["modules"] = os.pathsep.join(folders)
    return document


def without_user(path: str) -> str:
    """Write a path below the home folder with `~`, so that no user is named."""
    home = Path(os.path.expanduser("~"))  # stays "~" where there is no home
    inside = Path(path).is_relative_to(home) and home != Path(home.anchor)
    return str(Path("~") / Path(path).relative_to(home)) if inside else path


def pin(document: Mapping[str, Any]) -> None:
    """Pin this process's kernels as a scenario wants them: checking it imports torch and NumPy."""
    engine = document.get("engine")
    if isinstance(engine, Mapping) and engine.get("bits") == "portable":
        kernels_in_use.pin_portable()
