"""Holding one scenario against its claims and its recording."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.sources import changes
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario
from fedsim.studies.golden.drift import (
    Drift,
    drifts,
    other_environment,
    same_environment,
    same_models,
)
from fedsim.studies.golden.measure import Measured, Measurer
from fedsim.studies.golden.recording import Recording, place_of, read, write

_SHOWN = 8  # drifts of one scenario that are told in full


@dataclass(frozen=True)
class Verdict:
    """What came of checking a scenario.

    Attributes:
        scenario: Its file.
        claims: What its metrics make of `[expect]`.
        drifts: What is no longer as recorded; None when there is no recording.
        seconds: How long its runs took.
        note: What is otherwise and no drift, and why; or that there is no recording.
        edited: Whether the scenario is another than was recorded.
        altered: Whether assignments on the command line were made to it.
        changed: What became of files of the user's own code since then, in words.
    """

    scenario: Path
    claims: list[dict[str, Any]]
    drifts: list[Drift] | None
    seconds: float
    note: str = ""
    edited: bool = False
    altered: bool = False
    changed: str = ""

    @property
    def remark(self) -> str:
        """The note, and what became of the code where nothing has drifted all the same."""
        kept = self.changed and not self.drifts
        code = f"{self.changed} since it was recorded; results are the same" if kept else ""
        return "; ".join(filter(None, (self.note, code)))

    @property
    def holds(self) -> bool:
        """Whether every claim holds and nothing has drifted."""
        return all(claim["holds"] for claim in self.claims) and not self.drifts

    def lines(self) -> list[str]:
        """Return what is wrong, in words, each line with the scenario's name."""
        name = self.scenario.stem
        found = [
            f"{name}: {claim['metric']} {claim['claim']}: measured {_number(claim['value'])}"
            for claim in self.claims
            if not claim["holds"]
        ]
        if self.edited and self.altered:
            return [*found, f"{name}: --set makes it another scenario than was recorded"]
        if self.edited:
            return [*found, f"{name}: was edited since it was recorded; {_update(self.scenario)}"]
        apart = self.drifts or []
        if apart and self.changed:
            found.append(f"{name}: {self.changed} since it was recorded")
        found += [f"{name}: {drift}" for drift in apart[:_SHOWN]]
        if len(apart) > _SHOWN:
            found.append(f"{name}: and {len(apart) - _SHOWN} more")
        if apart:
            found.append(f"{name}: if that is meant: {_update(self.scenario)}")
        return found


def check(
    scenario: Path,
    overrides: Sequence[str] = (),
    *,
    data: Path | None = None,
    measurer: Measurer | None = None,
) -> Verdict:
    """Run a scenario and hold it against its claims and its recording.

    Args:
        scenario: Its file.
        overrides: Assignments such as "data.path=/data/mnist"; those that change results make it
            another scenario than the recorded one.
        data: A folder with a folder for each data set that can be read from files, by its name.
        measurer: What runs it; None makes one for this scenario alone.

    Raises:
        ScenarioError: If the scenario or its recording is refused.
        RunError: If a run fails.
    """
    loaded = load(scenario, overrides).with_data(data)
    golden = read(place_of(scenario))
    now, claims, seconds = _measured(loaded, measurer)
    if golden is None:
        note = "not recorded" if overrides else f"not recorded; {_update(scenario)}"
        return Verdict(scenario, claims, None, seconds, note)
    apart = drifts(golden, now)
    note = ""
    if not same_environment(golden, now) and not same_models(golden, now):
        note = f"hashes of models differ, and may: {other_environment(golden, now)}"
    edited = golden.scenario_sha256 != now.scenario_sha256
    changed = changes(golden.code, now.code) if golden.code else ""
    return Verdict(scenario, claims, apart, seconds, note, edited, bool(overrides), changed)


def record(
    scenario: Path,
    why: str,
    overrides: Sequence[str] = (),
    *,
    data: Path | None = None,
    measurer: Measurer | None = None,
) -> tuple[Recording, list[Drift] | None, bool]:
    """Record what a scenario does now, with the reason.

    A recording that stands for the same is left as it is, its history too.

    Args:
        scenario: Its file.
        why: What moved it, for readers of the history.
        overrides: Assignments such as "data.path=/data/mnist".
        data: As for `check`.
        measurer: As for `check`.

    Returns:
        The recording; what was otherwise before, None when there was no recording; and whether it
        was written, which it is where nothing drifted but the environment or the code is another.

    Raises:
        ScenarioError: If the scenario is refused, or its claims do not hold.
        RunError: If a run fails.
    """
    loaded = load(scenario, overrides).with_data(data)
    before = read(place_of(scenario))
    now, claims, _ = _measured(loaded, measurer)
    if broken := [claim["metric"] for claim in claims if not claim["holds"]]:
        raise ScenarioError(
            f"{scenario}: is not recorded while its claim on {broken[0]} is broken; change the "
            "claim or what broke it first"
        )
    moved = None if before is None else drifts(before, now)
    same = before is not None and same_environment(before, now) and before.code == now.code
    if before is not None and not moved and same:
        return before, [], False
    reason = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "why": " ".join(why.split()),
        "fedsim": fedsim.__version__,
    }
    made = replace(now, history=[*([] if before is None else before.history), reason])
    write(place_of(scenario), made)
    return made, moved, True


def _measured(scenario: Scenario, measurer: Measurer | None) -> Measured:
    with scenario.named_in_refusals():
        if measurer is not None:
            return measurer.measure(scenario)
        with Measurer() as alone:
            return alone.measure(scenario)


def _update(scenario: Path) -> str:
    return f'fedsim golden --update {scenario} --why "..."'


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.6g}"
