"""Grids around a Grid: whatever stands between a strategy and its clients.

Each wraps another Grid and passes cohorts and stacked replies through, so it serves fedsim's
strategies and foreign ones, `strategy.start`, fedsim's engines and Flower's grids alike.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsim.federation.participation.kinds import Participation
from fedsim.messages import flower_internals as internals
from fedsim.messages.byte_counts import cohort_bytes, replies_bytes, sum_of_bytes
from fedsim.messages.cohort import Cohort, MessagesError, why_no_cohort
from fedsim.messages.failures import Failure
from fedsim.messages.layout import Layout
from fedsim.messages.records import SERVER_ROUND
from fedsim.messages.replies import Replies


def sent_again(message: Message, content: RecordDict) -> Message:
    """Return a new instruction to the same node, with this content."""
    return Message(
        content,
        message.metadata.dst_node_id,
        message.metadata.message_type,
        ttl=message.metadata.ttl,
        group_id=message.metadata.group_id,
    )


class Observed(NamedTuple):
    """What wrappers have seen happen in a round's training.

    Attributes:
        metrics: Counts by the name of a metric.
        record: What the record of participation holds besides who was selected and who failed.
    """

    metrics: dict[str, int]
    record: dict[str, Any]

    def joined(self, other: "Observed") -> "Observed":
        """Return both."""
        return Observed(self.metrics | other.metrics, self.record | other.record)


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

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions and return the replies."""
        return self.inner.send_and_receive(messages, timeout=timeout)


class ParticipationGrid(GridWrapper):
    """Offers the round's participants as its nodes.

    Under `strategy.start`, which names no rounds, a round ends with the replies to its training.

    Args:
        inner: The Grid with all clients.
        participation: Who takes part when.
        seed: The scenario's seed.
    """

    def __init__(self, inner: Grid, participation: Participation, *, seed: int) -> None:
        super().__init__(inner)
        self.participation, self.seed = participation, seed
        self.server_round = 1

    def begin_round(self, server_round: int) -> None:
        """Set the round whose participants are offered."""
        self.server_round = server_round
        super().begin_round(server_round)

    def participants(self) -> np.ndarray:
        """Return the round's participants, int64 client ids in ascending order."""
        return self.participation.participants(
            self.server_round, num_clients=self.num_clients, seed=self.seed
        )

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the round's participants."""
        return [internals.node_of(client) for client in self.participants().tolist()]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions; after training the next round's participants are offered."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        replies = self.inner.send_and_receive(batch, timeout=timeout)
        sent = sent_round(batch)
        if sent is not None:
            self.server_round = sent + 1
        return replies


class SubsetGrid(GridWrapper):
    """Offers some clients only.

    Args:
        inner: The Grid with all clients.
        client_ids: The clients offered.
    """

    def __init__(self, inner: Grid, client_ids: np.ndarray) -> None:
        super().__init__(inner)
        self.client_ids = np.sort(client_ids)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of these clients."""
        return [internals.node_of(client) for client in self.client_ids.tolist()]


class AdmissionGrid(GridWrapper):
    """Lets a reply pass only with the expected names, shapes and dtypes, finite, counted, and once.

    Args:
        inner: The Grid around which this one stands.
        layout: The model's layout.
    """

    def __init__(self, inner: Grid, layout: Layout) -> None:
        super().__init__(inner)
        self.layout = layout

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions and return the admitted replies, with everybody else named."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        replies = self.inner.send_and_receive(batch, timeout=timeout)
        if isinstance(replies, Replies):
            return replies.admit()
        sent = batch if isinstance(batch, Cohort) else Cohort.from_messages(batch, self.layout)
        if sent is None:
            if not batch:
                return replies
            raise MessagesError(why_no_cohort(batch))
        return Replies.from_messages(replies, sent).admit()


class ByteCountingGrid(GridWrapper):
    """Counts the bytes of instructions and replies as Flower messages, without building them.

    Args:
        inner: The Grid around which this one stands.
    """

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner)
        self.downlink_bytes = 0
        self.uplink_bytes = 0

    def take(self) -> tuple[int, int]:
        """Return (downlink, uplink) bytes since the last call."""
        counted = self.downlink_bytes, self.uplink_bytes
        self.downlink_bytes = self.uplink_bytes = 0
        return counted

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions and return the replies, counting both."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        self.downlink_bytes += (
            cohort_bytes(batch) if isinstance(batch, Cohort) else sum_of_bytes(batch)
        )
        replies = self.inner.send_and_receive(batch, timeout=timeout)
        if isinstance(replies, Replies):
            self.uplink_bytes += replies_bytes(replies)
        else:
            replies = list(replies)
            self.uplink_bytes += sum_of_bytes(replies)
        return replies


def without(
    batch: Cohort | list[Message], gone: np.ndarray, layout: Layout | None
) -> Cohort | list[Message]:
    """Return the instructions as if these clients had dropped out.

    Args:
        batch: A cohort or messages.
        gone: int64, ids of clients that are asked or not.
        layout: The model's layout, when messages go to an engine that trains in chunks: they are
            made a cohort then, in which those who dropped out keep their neutral slots.
    """
    nodes = set((gone + internals.FIRST_NODE_ID).tolist())
    cohort = batch if isinstance(batch, Cohort) else None
    if cohort is None and layout is not None and nodes:
        cohort = Cohort.from_messages(batch, layout)
    if cohort is None:
        return [m for m in batch if m.metadata.dst_node_id not in nodes]
    return replace(cohort, absent=cohort.is_absent | np.isin(cohort.client_ids, gone))


def failures_of(replies: Iterable[Message]) -> tuple[Failure, ...]:
    """Return who failed, for replies that went through an `AdmissionGrid`."""
    return replies.failures if isinstance(replies, Replies) else ()


def sent_round(batch: Sequence[Message]) -> int | None:
    """The round of training instructions, or None for anything else."""
    if isinstance(batch, Cohort):
        return batch.server_round if batch.message_type == MessageType.TRAIN else None
    if not batch or batch[0].metadata.message_type != MessageType.TRAIN:
        return None
    config = next(iter(batch[0].content.config_records.values()), ConfigRecord())
    value = config.get(SERVER_ROUND)
    return int(value) if isinstance(value, int) else None
