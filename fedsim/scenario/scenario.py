"""The scenario: one TOML file that says everything that decides a run's result.

A scenario is validated whole before anything starts. Tables that name a factory (`[data]`,
`[strategy]`, ...) are held against that factory's signature, the fixed ones (`[engine]`, ...)
against the models below; every problem is reported, one line each, with file, table and key.
"""

import contextlib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.basics import kernels_in_use, project
from fedsim.basics.errors import ScenarioError, nearest
from fedsim.basics.import_paths import code_behind, folders_of, import_paths, is_import_path
from fedsim.basics.kernels import Bits
from fedsim.basics.sources import Code
from fedsim.federation.devices import Devices
from fedsim.scenario import discovery
from fedsim.scenario.expectations import Expectation
from fedsim.scenario.overrides import apply
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
from fedsim.scenario.validation import check_clients, validated

# What may differ between two runs which still have the same result: where and how fast it is
# computed, what is written down and what is claimed. A path says where data, a graph or code lies;
# what it holds is in the manifest's own hash, or in `code.json`.
_NO_MATTER = ("title", "source", "tier", "modules", "checkpoint", "output", "expect")
_NO_MATTER_ENGINE = (
    "kind",
    "workers",
    "client_resources",
    "address",
    "client_timeout_s",
    "round_timeout_s",
    "startup_timeout_s",
    "silence_timeout_s",
    "state_limit_mb",
)
_WITH_CODE = ("task", "data", "strategy", "client", "attack")  # may name something by import path
# keys that decide results and came later, by table: at these values a scenario has its old hash
_LATER: dict[str, dict[str, Any]] = {
    "engine": {"retries": 2, "quorum": None, "threads": 1, "bits": "fast"},
    "evaluation": {"per_client": False, "pooled": False},
    "client": {"last_batch": "keep"},
    "attack": {"fraction": None, "schedule": "fixed", "active_rate": None},
    "partition": {
        **dict.fromkeys(("rotation", "feature_noise", "feature_shift", "feature_scale"), 0.0),
        "parts": None,
    },
}
_LATER_NATURAL = {"label_noise": 0.0}  # likewise of [partition] kind = "natural"; others had it
_LATER_FOLDER = dict.fromkeys(("separator", "decimal", "encoding"))  # likewise of [data] "folder"
_LATER_GOSSIP: dict[str, Any] = {  # likewise of [strategy] where it has a graph
    **dict.fromkeys(
        ("num_byzantine", "num_selected", "clip_radius", "clip_iterations", "bucket_size",
         "clip_norm")
    ),
    "rule": "mean", "variant": "paper", "before": [],
}  # fmt: skip


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
        engine: Where and how clients are computed.
        evaluation: What is measured, and how often.
        checkpoint: How often a run can be resumed from.
        output: What is written besides metrics.
        expect: The claims, by metric.
        origin: What messages call the scenario: its file.
        modules: The folders of what is named by import path, as PYTHONPATH lists folders.
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
    engine: Engine
    evaluation: EvaluationTable
    checkpoint: CheckpointTable
    output: Output
    expect: dict[str, Expectation]
    origin: str
    modules: str = ""

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
        return [
            f"[{name}] {key} = '{value}'"
            for name, table in tables.items()
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
        check_clients(self.origin, tables, fixed, clients)

    @classmethod
    def from_resolved(cls, document: Mapping[str, Any], origin: str) -> "Scenario":
        """Read a scenario that `resolved` wrote, and validate it anew.

        Raises:
            ScenarioError: If anything in it is wrong.
        """
        if not isinstance(document, Mapping):
            raise ScenarioError(f"{origin}: is not a scenario: it must be a table")
        _pin(document)
        document = _with_folders(document, origin, None)
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
        return self.from_resolved(document, self.origin)

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
        return self.from_resolved({**self.resolved(), **tables}, self.origin)

    @property
    def sha256(self) -> str:
        """The hash of what decides the run's result, whoever computes it wherever."""
        document = {key: value for key, value in self.resolved().items() if key not in _NO_MATTER}
        document["engine"] = {
            key: value for key, value in document["engine"].items() if key not in _NO_MATTER_ENGINE
        }
        later = dict(_LATER)
        if document["partition"]["kind"] == "natural":
            later["partition"] = {**_LATER["partition"], **_LATER_NATURAL}
        if document["data"]["name"] == "folder":
            later["data"] = _LATER_FOLDER
        if "topology" in document:
            later["strategy"] = _LATER_GOSSIP
        for name in later.keys() & document.keys():
            document[name] = _without(document[name], later[name])
        if document["task"]["kind"] == "auto":
            # the data decide, whose hash is in the manifest; a kind that does not fit never runs
            document["task"] = {**document["task"], "kind": "classification"}
        for name, key in WITH_PATHS.items():
            if document.get(name, {}).get(key) is not None and name == "task":
                document[name] = {**document[name], key: "a file"}  # its hash is in the manifest
            elif name in document:
                document[name] = {k: v for k, v in document[name].items() if k != key}
        text = json.dumps(document, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read and validate a scenario file.

    Args:
        path: The file, or the name of a scenario that comes with fedsim ("quickstart").
        overrides: Assignments such as "engine.kind=inline"; values are TOML, bare words strings.

    Returns:
        The scenario, complete with defaults. When it names something by import path, its folder
        is searched for modules from now on, in place of that of a scenario before it.

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
    apply(document, overrides)
    _pin(document)
    document = _with_folders(document, origin, file.parent)
    return Scenario(**validated(document, origin=origin, folder=file.parent))


def find(path: str | Path) -> Path:
    """Return a scenario's file.

    Args:
        path: The file, or the name of a scenario that comes with fedsim.

    Raises:
        ScenarioError: If there is none.
    """
    return _find(path)[0]


def code_in(document: Mapping[str, Any], origin: str) -> Code:
    """Return the files behind what a resolved scenario names by import path; nothing is imported.

    Raises:
        ScenarioError: If the folder in which they lay is not there.
    """
    document = _with_folders(document, origin, None)
    paths = import_paths({name: document[name] for name in _WITH_CODE if name in document})
    folders = [each for each in document["modules"].split(os.pathsep) if each]
    return code_behind(paths.values(), folders)


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


def _pin(document: Mapping[str, Any]) -> None:
    """Pin this process's kernels as a scenario wants them: checking it imports torch and NumPy."""
    engine = document.get("engine")
    if isinstance(engine, Mapping) and engine.get("bits") == "portable":
        kernels_in_use.pin_portable()


def _with_folders(document: Mapping[str, Any], origin: str, folder: Path | None) -> dict[str, Any]:
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


def _without(table: Mapping[str, Any], at: Mapping[str, Any]) -> dict[str, Any]:
    """A table without the keys that have these values."""
    return {key: value for key, value in table.items() if not (key in at and value == at[key])}


def without_user(path: str) -> str:
    """Write a path below the home folder with `~`, so that no user is named."""
    home = Path(os.path.expanduser("~"))  # stays "~" where there is no home
    inside = Path(path).is_relative_to(home) and home != Path(home.anchor)
    return str(Path("~") / Path(path).relative_to(home)) if inside else path
