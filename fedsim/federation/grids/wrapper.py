"""Grids around a Grid: whatever stands between a strategy and its clients.

Each wraps another Grid and passes cohorts and stacked replies through, so it serves fedsim's
strategies and foreign ones, `strategy.start`, fedsim's engines and Flower's grids alike.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import Cohort
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


def clients_of(batch: Sequence[Message]) -> npt.NDArray[np.int64]:
    """Return the clients that messages are for, int64 `[K]`, in their order."""
    if isinstance(batch, Cohort):
        return batch.client_ids
    nodes = [internals.client_of(m.metadata.dst_node_id) for m in batch]
    return np.array(nodes, dtype=np.int64)
