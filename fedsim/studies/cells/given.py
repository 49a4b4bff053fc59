"""Runs that are there already, as variants: those that differ in nothing but the seed are one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsim.basics.errors import ScenarioError, show
from fedsim.runs.folder import SCENARIO_FILE, SUMMARY_FILE, open_existing, resuming
from fedsim.runs.left_behind import code_sha256_of
from fedsim.scenario.scenario import Scenario
from fedsim.studies.cells.variants import Variant, fingerprint

RUN_AXIS = "run"
_MOST_AXES = 3  # keys that may tell runs apart; beyond that the folders' names do
_NO_AXIS = (
    "title",
    "source",
    "seed",
    "tier",
    "modules",
    "engine",
    "checkpoint",
    "output",
    "expect",
)


def is_run(path: str) -> bool:
    """Return whether a path is a run's folder."""
    return (Path(path) / SCENARIO_FILE).is_file()


def of_runs(paths: Sequence[str]) -> list[Variant]:
    """Return finished runs as variants, called by the keys that tell them apart.

    Raises:
        ScenarioError: If a run is not finished or two are of the same scenario and seed.
    """
    found: dict[str, tuple[Scenario, str, dict[int, Path]]] = {}
    for path in map(Path, paths):
        scenario = open_existing(path).scenario()
        if not (path / SUMMARY_FILE).is_file():
            raise ScenarioError(f"{path}: is not finished; `{resuming(path)}` goes on with it")
        code = code_sha256_of(path)
        alike = fingerprint(replace(scenario, seed=0), code)
        _, _, folders = found.setdefault(alike, (scenario, code, {}))
        if scenario.seed in folders:
            raise ScenarioError(
                f"{path}: is of the same scenario and seed as {folders[scenario.seed]}"
            )
        folders[scenario.seed] = path
    groups = list(found.values())
    keys = _telling([scenario for scenario, _, _ in groups])
    return [
        Variant(_labels(scenario, folders, keys), scenario, folders, code)
        for scenario, code, folders in groups
    ]


def _labels(scenario: Scenario, folders: Mapping[int, Path], keys: Sequence[str]) -> dict[str, str]:
    if not keys:
        return {RUN_AXIS: next(iter(folders.values())).name}
    flat = _flat(scenario)
    return {key: _plain(flat.get(key)) for key in keys}


def _telling(scenarios: Sequence[Scenario]) -> list[str]:
    """The keys whose values tell the scenarios apart, those that name something first."""
    flats = [_flat(scenario) for scenario in scenarios]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    differ = [key for key in keys if len({show(flat.get(key)) for flat in flats}) > 1]
    named = [key for key in differ if key.endswith((".name", ".kind"))]
    # what only some choices have (a strategy's own hyperparameters) tells nothing more
    everywhere = [key for key in differ if all(key in flat for flat in flats)]
    telling = list(dict.fromkeys([*named, *everywhere]))
    labels = {tuple(show(flat.get(key)) for key in telling) for flat in flats}
    if not telling or len(telling) > _MOST_AXES or len(labels) < len(flats):
        return []
    return telling


def _flat(scenario: Scenario) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for table, content in scenario.resolved().items():
        if table in _NO_AXIS:
            continue
        if isinstance(content, Mapping):
            flat |= {f"{table}.{key}": value for key, value in content.items()}
        else:
            flat[table] = content
    return flat


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else show(value)
