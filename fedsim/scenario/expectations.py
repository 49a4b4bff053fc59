"""The claims of `[expect]`, and what a run's metrics make of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The first parts of the metric names that a run can record.
METRIC_PHASES = (
    "clients", "clock", "comm", "finetuned", "local", "nodes", "personal", "pooled", "robust",
    "server", "test", "time", "train",
)  # fmt: skip
VIRTUAL_TIME = "time/virtual_s"  # of all times the one that no machine decides
# those that measure the models after a round
MODEL_PHASES = ("test", "robust", "pooled", "local", "finetuned", "personal", "nodes")
BY_CAUSE = "clients/failed/"  # counts that are recorded where they are not 0


def failed_by(cause: str) -> str:
    """Return the name, below `clients/`, of the count of clients that failed by a cause.

    Example:
        >>> failed_by("not finite")
        'failed/not_finite'
    """
    return f"failed/{cause.replace(' ', '_')}"


class Expectation(BaseModel):
    """One claim of `[expect]`: bounds on the mean of a metric's last recorded values."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

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
        none = 0 if metric.startswith(BY_CAUSE) else None
        found = [record.get(metric, none) for record in history]
        recorded = [float(value) for value in found if value is not None]
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
