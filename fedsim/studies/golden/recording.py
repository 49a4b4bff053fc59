"""The golden recording of a scenario, a JSON file beside it."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.json_files import read_json, to_json, write_text_atomic

FOLDER = "golden"
_FORMAT = 1


@dataclass(frozen=True)
class MetricTrace:
    """The metrics of a scenario's first rounds, computed in float64.

    Attributes:
        rounds: The recorded rounds, ascending from 0.
        metrics: Per metric its value in each of these rounds, None where it was not recorded.
        params_sha256: The hash of the model after the last of them.
    """

    rounds: list[int]
    metrics: dict[str, list[float | None]]
    params_sha256: str


@dataclass(frozen=True)
class Recording:
    """What a scenario did.

    Attributes:
        scenario_sha256: The hash of what decides its result.
        rounds: Rounds of the whole run, which may have stopped early.
        params_sha256: The hash of the model that the whole run ended with, in its own dtype.
        participation_sha256: The hash of who was selected when.
        partition_sha256: The hash of who holds which samples.
        trace: Its first rounds in float64.
        environment: What the bits of a model depend on besides the scenario: which promise was
            kept (`bits`), the kernels in use (`fedsim.basics.kernels_in_use`; for portable bits
            without the processor), versions of torch and NumPy, `threads`, `executor` and
            `chunk_size`.
        history: Why it was recorded, oldest first: `date`, `why`, `fedsim` (the version).
        code: The hash of each file of the user's own code; empty without any, or when recorded
            before that was kept.
    """

    scenario_sha256: str
    rounds: int
    params_sha256: str
    participation_sha256: str
    partition_sha256: str
    trace: MetricTrace
    environment: dict[str, Any]
    history: list[dict[str, str]] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)


def place_of(scenario: Path) -> Path:
    """Return the file that holds the recording of a scenario's file.

    Example:
        >>> place_of(Path("scenarios/quickstart.toml")).as_posix()
        'scenarios/golden/quickstart.json'
    """
    return scenario.parent / FOLDER / f"{scenario.stem}.json"


def read(path: Path) -> Recording | None:
    """Return a recording, or None when there is none.

    Raises:
        ScenarioError: If the file is no recording, or of another format.
    """
    if not path.exists():
        return None
    try:
        found = read_json(path)
        if not isinstance(found, Mapping) or found.get("format") != _FORMAT:
            raise ScenarioError(
                f"{path}: is no recording of format {_FORMAT}; record the scenario anew"
            )
        values = {key: found[key] for key in Recording.__dataclass_fields__ if key != "code"}
        values["code"] = dict(found.get("code", {}))
        return Recording(**{**values, "trace": MetricTrace(**found["trace"])})
    except (KeyError, TypeError) as error:
        raise ScenarioError(f"{path}: is no whole recording: {error}") from None
    except RunError as error:
        raise ScenarioError(str(error)) from None


def write(path: Path, recording: Recording) -> None:
    """Write a recording.

    Raises:
        ScenarioError: If the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": _FORMAT, **asdict(recording)}
        if not recording.code:
            del document["code"]
        text = to_json(document)
        write_text_atomic(path, _in_rows(text) + "\n")
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be written: {error.strerror}") from error


def _in_rows(text: str) -> str:
    """JSON with every list of numbers in one row, so that a change is a line of a diff."""
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
