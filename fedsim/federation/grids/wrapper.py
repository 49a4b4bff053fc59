"""Grids around a Grid: what stands between a strategy and its clients.

Each wraps another Grid. It serves fedsim's strategies and foreign ones, `strategy.start`, fedsim's
engines and Flower's grids alike: the outermost makes cohorts of messages, the innermost replies.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsim.messages.adapting import asks_for_work, batch_of, cohort_of, replies_of
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies


class Observed(NamedTuple):
    """What wrappers have seen happen in a round's training.

    Attributes:
        metrics: Counts by the name of a metric.
        record: What the record of participation holds besides who was selected and who failed.
    """

    metrics: Mapping[str, int | float]
    record: dict[str, Any]

    def joined(self, other: "Observed") -> "Observed":
        """Return both."""
        return Observed({**self.metrics, **other.metrics}, self.record | other.record)


class GridWrapper(Grid):
    """Forwards everything to another Grid.

    Args:
        inner: The Grid around which this one stands.
    """

    def __init__(self, inner: Grid) -> None:
        self.inner = inner

    @property
    def num_clients(self) -> int:
        """N, the clients registered."""
        known = getattr(self.inner, "num_clients", None)
        return int(known) if known is not None else len(list(self.inner.get_node_ids()))

    def begin_round(self, server_round: int) -> None:
        """Tell every wrapper which round begins (the round loop does; `start` cannot)."""
        if isinstance(self.inner, GridWrapper):
            self.inner.begin_round(server_round)

    def observed(self) -> Observed:
        """Return what wrappers have seen happen since the round began."""
        return self.inner.observed() if isinstance(self.inner, GridWrapper) else Observed({}, {})

    def set_run(self, run: Any) -> None:
        """Set the run that messages belong to."""
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        """The run that messages belong to."""
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
        ttl: float | None = None,
    ) -> Message:  # fmt: skip
        """Return an instruction."""
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that a strategy may address."""
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push instructions."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies."""
        return self.inner.pull_messages(message_ids)

    @property
    def layout(self) -> Layout | None:
        """The layout of the model that foreign messages carry, where it is known."""
        known = getattr(self.inner, "layout", None)
        return known if isinstance(known, Layout) else None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions and return the replies.

        Messages that are no `Cohort` become one here, so that Grids further in see no others.

        Raises:
            MessagesError: If messages cannot be answered and checked together.
        """
        batch = batch_of(messages)
        if not asks_for_work(batch):
            return self.passed_by(batch, timeout)
        return self.answered(cohort_of(batch, self.layout), timeout)

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies to a cohort; what a wrapper does to a round is done here.

        Args:
            cohort: Of one client or more.
            timeout: Seconds that it may take; None waits for ever.
        """
        return self.passed_on(cohort, timeout)

    def passed_by(self, batch: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        """Return the replies to messages that ask for no work, such as a query."""
        return self.inner.send_and_receive(batch, timeout=timeout)

    def passed_on(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Send a cohort to the inner Grid and return the replies, stacked."""
        return replies_of(self.inner.send_and_receive(cohort, timeout=timeout), cohort)


def without(cohort: Cohort, gone: np.ndarray) -> Cohort:
    """Return a cohort in which these clients have dropped out; their slots stay, neutral.

    Args:
        cohort: The instructions.
        gone: int64, ids of clients that are asked or not.
    """
    return replace(cohort, absent=cohort.is_absent | np.isin(cohort.client_ids, gone))


def training_round(cohort: Cohort) -> int | None:
    """Return the round that a cohort trains in; None of a set-up exchange and an evaluation.

    It is None too where a foreign strategy does not tell its clients the round.
    """
    return cohort.server_round or None if cohort.message_type == MessageType.TRAIN else None
