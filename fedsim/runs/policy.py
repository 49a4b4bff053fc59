"""What a round must hold to stand, and when a run stops before its last round."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedsim.basics.errors import RunError
from fedsim.basics.ties import exceeds
from fedsim.messages.failures import Failure


@dataclass(frozen=True)
class Policy:
    """What becomes of a round in which clients fail.

    Attributes:
        on_failure: "skip" goes on without them, and so does "retry" when asking them again (see
            `RetryGrid`) has not helped; "stop" ends the run at the first one.
        min_replies: Fewer admissible replies than this, when clients failed, end the run.
        quorum: When a client fails, the round stands only if at least this share of the clients
            that did not drop out gave an admissible reply; in (0, 1], None switches the check off.
        required: Clients whose failure ends the run.
    """

    on_failure: Literal["skip", "retry", "stop"] = "skip"
    min_replies: int = 1
    quorum: float | None = None
    required: frozenset[int] = frozenset()

    def judge(self, report_round: int, selected: int, failures: Sequence[Failure]) -> None:
        """Raise when the round cannot stand.

        Raises:
            RunError: Naming the round, the clients and their causes.
        """
        failed = [failure for failure in failures if failure.cause != "absent"]
        if not failed:
            return
        if self.on_failure == "stop":
            raise RunError(f"{failed[0]}; [engine] on_failure = 'stop'")
        needed = [f for f in failed if missing([f]) & self.required]
        if needed:
            raise RunError(
                f"{needed[0]}; client {needed[0].client_id} is among [deployment] required"
            )
        replied = selected - len(missing(failures))
        if replied < self.min_replies:
            raise RunError(
                f"round {report_round}: {replied} of {selected} clients replied, [engine] "
                f"min_replies = {self.min_replies}; the first failure was {failed[0]}"
            )
        asked = replied + len({failure.client_id for failure in failed} & missing(failures))
        if self.quorum is not None and replied < self.quorum * asked * (1 - 1e-12):
            raise RunError(
                f"round {report_round}: {replied} of {asked} clients replied that did not drop "
                f"out, [engine] quorum = {self.quorum:g}; the first failure was {failed[0]}"
            )


@dataclass(frozen=True)
class EarlyStop:
    """When to end before the last round; decided from recorded metrics alone.

    Attributes:
        metric: The metric watched.
        target: Stop when it is reached.
        patience: Stop after so many recorded values without a new best; what is better by rounding
            alone is none.
        mode: Whether "max" or "min" is better.
    """

    metric: str
    target: float | None = None
    patience: int | None = None
    mode: Literal["max", "min"] = "max"

    def reason(self, history: Iterable[Mapping[str, Any]]) -> str | None:
        """Return why to stop after these records, or None."""
        sign = 1.0 if self.mode == "max" else -1.0
        values = [float(r[self.metric]) for r in history if r.get(self.metric) is not None]
        if not values:
            return None
        known = not math.isnan(values[-1])
        if self.target is not None and known and not exceeds(sign * self.target, sign * values[-1]):
            return f"{self.metric} = {values[-1]:.6g} reached the target {self.target:g}"
        if self.patience is not None:
            # what is not defined is never the best
            scores = [-math.inf if math.isnan(value) else sign * value for value in values]
            best = 0
            for place, score in enumerate(scores):
                best = place if exceeds(score, scores[best]) else best
            if len(values) - 1 - best >= self.patience:
                return f"{self.metric} has not improved for {self.patience} evaluations"
        return None


def missing(failures: Sequence[Failure]) -> set[int]:
    """Return the clients of whom no reply counts (a second reply leaves the first one standing)."""
    return {f.client_id for f in failures if f.cause not in ("twice", "stranger")}
