"""Where a scenario's results now part from the recorded ones."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from fedsim.studies.golden.recording import MetricTrace, Recording

TOLERANCE = 1e-8  # of a float64 metric, relative to its size where that is above 1
_HASHES = ("partition_sha256", "participation_sha256")
_MODELS = ("params_sha256", "trace.params_sha256")


class Drift(NamedTuple):
    """One thing that is no longer as recorded.

    Attributes:
        what: The metric or hash.
        round: The first round in which it parts; None for what has no rounds.
        recorded: What it was.
        now: What it is.
        tolerance: By how much it might differ; None for what must be equal.
    """

    what: str
    round: int | None
    recorded: str
    now: str
    tolerance: float | None = None

    def __str__(self) -> str:
        where = "" if self.round is None else f" parts in round {self.round}"
        bound = "" if self.tolerance is None else f" (tolerance {self.tolerance:.1e})"
        return f"{self.what}{where}: recorded {self.recorded}, now {self.now}{bound}"


def drifts(recorded: Recording, now: Recording) -> list[Drift]:
    """Return what has drifted, the earliest metric first.

    Other hashes of models are drift where the environments are equal alone: other kernels have
    other bits. When the scenario itself was edited, that is the only thing said.
    """
    if recorded.scenario_sha256 != now.scenario_sha256:
        return [_hash("scenario_sha256", recorded.scenario_sha256, now.scenario_sha256)]
    found = [
        _hash(name, getattr(recorded, name), getattr(now, name))
        for name in _HASHES
        if getattr(recorded, name) != getattr(now, name)
    ]
    if recorded.rounds != now.rounds and same_environment(recorded, now):
        found.append(Drift("rounds", None, str(recorded.rounds), str(now.rounds)))
    found += sorted(_traces(recorded.trace, now.trace), key=_place)
    if same_environment(recorded, now):
        pairs = ((_model(recorded, name), _model(now, name)) for name in _MODELS)
        found += [_hash(n, a, b) for n, (a, b) in zip(_MODELS, pairs, strict=True) if a != b]
    return found


def same_models(recorded: Recording, now: Recording) -> bool:
    """Return whether all bits of the models are as recorded."""
    return all(_model(recorded, name) == _model(now, name) for name in _MODELS)


def same_environment(recorded: Recording, now: Recording) -> bool:
    """Return whether the bits of models must be equal."""
    return recorded.environment == now.environment


def other_environment(recorded: Recording, now: Recording) -> str:
    """Say in what the environments differ.

    Example:
        >>> old = Recording("", 1, "", "", "", MetricTrace([], {}, ""), {"torch": "2.11.0"})
        >>> new = Recording("", 1, "", "", "", MetricTrace([], {}, ""), {"torch": "2.13.0"})
        >>> other_environment(old, new)
        'torch 2.11.0, here 2.13.0'
    """
    keys = {**recorded.environment, **now.environment}
    if not recorded.environment.keys() & {"bits"} and now.environment.keys() & {"bits"}:
        return "recorded before bits could be portable"
    pairs = {key: (recorded.environment.get(key), now.environment.get(key)) for key in keys}
    return "; ".join(f"{key} {a}, here {b}" for key, (a, b) in pairs.items() if a != b)


def _traces(recorded: MetricTrace, now: MetricTrace) -> Iterator[Drift]:
    if recorded.rounds != now.rounds:
        yield Drift("rounds of the trace", None, _span(recorded.rounds), _span(now.rounds))
        return
    for name in sorted({*recorded.metrics, *now.metrics}):
        nothing: list[float | None] = [None] * len(now.rounds)
        before, after = recorded.metrics.get(name, nothing), now.metrics.get(name, nothing)
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            if not _equal(old, new):
                bound = None if old is None or new is None else _tolerance(old)
                yield Drift(name, now.rounds[place], _shown(old), _shown(new), bound)
                break


def _equal(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is new
    if math.isfinite(old) and math.isfinite(new):
        return abs(old - new) <= _tolerance(old)
    return old == new or (math.isnan(old) and math.isnan(new))


def _tolerance(old: float) -> float:
    return TOLERANCE * max(1.0, abs(old)) if math.isfinite(old) else 0.0


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.12g}"


def _span(rounds: list[int]) -> str:
    return f"{rounds[0]}..{rounds[-1]}" if rounds else "none"


def _place(drift: Drift) -> tuple[int, str]:
    return (-1 if drift.round is None else drift.round, drift.what)


def _model(recording: Recording, name: str) -> str:
    of = recording.trace if name.startswith("trace.") else recording
    return str(getattr(of, name.removeprefix("trace.")))


def _hash(name: str, recorded: str, now: str) -> Drift:
    return Drift(name, None, recorded[:12], now[:12])
