"""What a round came to, and who is told of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import ArrayRecord

from fedsim.messages.failures import Failure


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round.

    Attributes:
        server_round: The round; 0 is the model before training and a set-up exchange.
        arrays: The model after the round.
        metrics: Metrics by name, `phase/name`.
        selected: The clients asked, ascending.
        failures: Who gave no admissible reply.
        record: What else the record of participation holds of the round.
        local: What each client measured on its own data, when clients evaluated, see
            `client_metrics.client_metrics`.
    """

    server_round: int
    arrays: ArrayRecord
    metrics: dict[str, Any]
    selected: tuple[int, ...]
    failures: tuple[Failure, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    local: tuple[Mapping[str, Any], ...] = ()

    @property
    def failed(self) -> tuple[Failure, ...]:
        """Failures other than drop-out."""
        return tuple(f for f in self.failures if f.cause != "absent")


class Hook(Protocol):
    """Something that is told of every round, in the order of the rounds."""

    def round_ended(self, report: RoundReport) -> None:
        """Take note of a round."""
