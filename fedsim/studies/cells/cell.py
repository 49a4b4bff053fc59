"""The cells of a study: one variant with one seed, in a run folder that its content names."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.json_files import read_json, taking
from fedsim.basics.kernels import stand
from fedsim.basics.kernels_in_use import PINNED, decisive
from fedsim.basics.locks import one_at_a_time
from fedsim.basics.reads import by_now
from fedsim.basics.versions import versions
from fedsim.runs.folder import SCENARIO_FILE, SUMMARY_FILE, VERSIONS_FILE
from fedsim.runs.left_behind import reads_of
from fedsim.scenario.scenario import Scenario
from fedsim.studies.cells.variants import Variant, fingerprint

CELLS = "cells"
_DIGITS = 12  # of a scenario's hash in its folder's name


@dataclass(frozen=True)
class Cell:
    """One variant with one seed.

    Attributes:
        variant: The variant's place in the study.
        name: What messages call it.
        scenario: The scenario with the seed, computed in the process that runs it.
        folder: Its run folder.
        given: Whether the folder was given and is never run.
        code: The hash of the user's own code that it is of; empty without any.
    """

    variant: int
    name: str
    scenario: Scenario
    folder: Path
    given: bool = False
    code: str = ""

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.scenario.seed

    @property
    def finished(self) -> bool:
        """Whether it has a summary, which a run writes last, of this very scenario."""
        if self.given:
            return True
        try:
            return bool(read_json(self.folder / SUMMARY_FILE)["scenario_sha256"] == self.sha256)
        except (RunError, KeyError, TypeError):
            return False

    @property
    def begun(self) -> bool:
        """Whether it has a folder to go on from."""
        return (self.folder / SCENARIO_FILE).is_file()

    @property
    def sha256(self) -> str:
        """The hash of its scenario."""
        return self.scenario.sha256


def cells_of(variants: Sequence[Variant], seeds: Sequence[int], study: Path) -> list[Cell]:
    """Return all cells, seed by seed, so that what an interruption leaves is paired.

    Args:
        variants: What is held beside what.
        seeds: The seeds of each; variants with runs of their own have theirs.
        study: The study's folder.
    """
    made = []
    codes = [v.scenario.code.sha256 if v.code is None else v.code for v in variants]
    for seed in dict.fromkeys([*seeds, *(s for v in variants for s in v.given)]):
        for place, variant in enumerate(variants):
            name = f"{variant.name}, seed {seed}"
            scenario = in_one_process(variant.scenario, seed)
            if variant.given:
                if seed in variant.given:
                    made.append(Cell(place, name, scenario, variant.given[seed], given=True))
                continue
            digits = fingerprint(scenario, codes[place])[:_DIGITS]
            folder = study / CELLS / f"{scenario.stem}-{digits}-seed{seed}"
            if codes[place]:
                folder = _of_what_is_read(folder, scenario.folders)
            made.append(Cell(place, name, scenario, folder, code=codes[place]))
    return made


def _of_what_is_read(folder: Path, folders: Sequence[str]) -> Path:
    """The folder of a cell whose code reads files: another one once one of them has changed."""
    place, number = folder, 1
    while (read := reads_of(place)) and by_now(read, folders) != read:
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    return place


def in_one_process(scenario: Scenario, seed: int) -> Scenario:
    """Return a scenario with another seed, computed inline: the bits do not depend on where.

    The seed redraws the held-out set (where the data have none of their own), the partition, who
    takes part, the initial model and everything else that is drawn. Claims of `[expect]` are left
    out: they are about the scenario as it stands, and a variant may not record what they name.
    """
    engine = scenario.engine.model_copy(update={"kind": "inline"})
    return replace(scenario, seed=seed, engine=engine, expect={})


@contextlib.contextmanager
def locked(study: Path) -> Iterator[None]:
    """Make a study's folder and keep others from working in it; what a kill left is cleared away.

    Raises:
        ScenarioError: If the folder cannot be made.
        BusyError: If another process works in it.
    """
    if (study / SCENARIO_FILE).exists():
        raise ScenarioError(f"--out {study}: is a run's folder; name another for the study")
    try:
        (study / CELLS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScenarioError(f"--out {study}: cannot be made: {error.strerror}") from error
    lock = study / "lock"
    busy = f"{study}: another process works in this study; wait for it or end it"
    with one_at_a_time(lock, making=taking(lock), busy=busy):
        for half_made in (study / CELLS).glob(".*.tmp"):
            shutil.rmtree(half_made, ignore_errors=True)
        yield


def of_other_versions(cells: Sequence[Cell]) -> list[str]:
    """Name what runs were made under that is not installed now, such as "torch 2.12.0".

    Kernels that this process does not use itself are not compared: those of its processes are
    pinned by each scenario.
    """
    now, found = versions(), set()
    for cell in cells:
        bits = cell.scenario.engine.bits
        compared = decisive(now, bits)
        if not stand(bits):
            compared = {what: v for what, v in compared.items() if what not in PINNED}
        with contextlib.suppress(RunError):
            then = read_json(cell.folder / VERSIONS_FILE)
            found |= {
                f"{what} {then.get(what, 'unknown')}"
                for what, value in compared.items()
                if then.get(what) != value
            }
    return sorted(found)
