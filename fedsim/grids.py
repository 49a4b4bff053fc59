"""Grids around a Grid: whatever stands between a strategy and its clients.

Each wraps another Grid and passes cohorts and stacked replies through, so it serves fedsim's
strategies and foreign ones, `strategy.start`, fedsim's engines and Flower's grids alike.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsim import flower_internals as internals
from fedsim.client_app import FLOWER, PARTITION, PARTITION_ID
from fedsim.errors import RunError
from fedsim.layout import Layout
from fedsim.messages.cohort import Cohort, MessagesError, why_no_cohort
from fedsim.messages.failures import Failure
from fedsim.messages.replies import Replies
from fedsim.participation import Participation
from fedsim.records import ARRAYS, CONFIG, EXTRA, METRICS, SERVER_ROUND, array_record


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
            cohort_bytes(batch) if isinstance(batch, Cohort) else _sum_bytes(batch)
        )
        replies = self.inner.send_and_receive(batch, timeout=timeout)
        if isinstance(replies, Replies):
            self.uplink_bytes += replies_bytes(replies)
        else:
            replies = list(replies)
            self.uplink_bytes += _sum_bytes(replies)
        return replies


class PartitionGrid(GridWrapper):
    """Gives the nodes of Flower's grids their client ids: node `c + 2` holds partition c.

    Flower's node ids are random. At first use every node is asked for its partition with a "query"
    message, once all are there. A node whose Flower is of another minor version is refused: Flower
    lets it join.

    Args:
        inner: Flower's Grid.
        num_clients: N, how many nodes to wait for.
        timeout_s: Seconds to wait for them.
        poll_s: Seconds between looks.
    """

    def __init__(
        self, inner: Grid, num_clients: int, *, timeout_s: float = 300.0, poll_s: float = 0.5
    ) -> None:
        super().__init__(inner)
        self._num_clients = num_clients
        self.timeout_s, self.poll_s = timeout_s, poll_s
        self._nodes: np.ndarray | None = None
        self._stable: dict[int, int] = {}  # our node of each of Flower's

    @property
    def num_clients(self) -> int:
        """N, the clients of the federation."""
        return self._num_clients

    def get_node_ids(self) -> Iterable[int]:
        """Return the stable ids of all clients."""
        return range(internals.FIRST_NODE_ID, internals.FIRST_NODE_ID + self._num_clients)

    @property
    def nodes(self) -> np.ndarray:
        """Flower's node of every client, int64 `[N]` by client id."""
        if self._nodes is None:
            self._nodes = self._ask()
            nodes = self._nodes.tolist()
            self._stable = {node: internals.node_of(client) for client, node in enumerate(nodes)}
        return self._nodes

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions to the nodes that hold the clients' partitions."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        if isinstance(batch, Cohort):
            addressed = batch.altered(node_ids=self.nodes[batch.client_ids])
            stay = np.flatnonzero(~batch.is_absent).tolist()
            sent = [addressed[place] for place in stay]
            answers = self.inner.send_and_receive(sent, timeout=timeout) if sent else []
            return Replies.from_messages(map(self._back, answers), batch)
        clients = [internals.client_of(m.metadata.dst_node_id) for m in batch]
        forward = [
            Message(
                m.content,
                int(self.nodes[client]),
                m.metadata.message_type,
                ttl=m.metadata.ttl,
                group_id=m.metadata.group_id,
            )
            for m, client in zip(batch, clients, strict=True)
        ]
        answers = self.inner.send_and_receive(forward, timeout=timeout) if forward else []
        return [self._back(reply) for reply in answers]

    def _back(self, reply: Message) -> Message:
        """The reply as from the client's own stable node."""
        source = reply.metadata.src_node_id
        internals.set_source(reply, self._stable.get(source, source))
        return reply

    def _ask(self) -> np.ndarray:
        deadline = time.monotonic() + self.timeout_s
        while True:
            present = sorted(self.inner.get_node_ids())
            if len(present) >= self._num_clients:
                break
            if time.monotonic() > deadline:
                raise RunError(
                    f"{len(present)} of {self._num_clients} nodes joined within "
                    f"{self.timeout_s:g} s; "
                    "start the missing SuperNodes, or lower [partition] clients"
                )
            time.sleep(self.poll_s)
        queries = [Message(RecordDict(), node, MessageType.QUERY) for node in present]
        found: dict[int, int] = {}
        for reply in self.inner.send_and_receive(queries, timeout=self.timeout_s):
            if reply.has_content() and PARTITION in reply.content.config_records:
                told = reply.content.config_records[PARTITION]
                partition = int(told[PARTITION_ID])  # type: ignore[arg-type]
                _check_flower(partition, str(told.get(FLOWER, "")))
                if partition in found:
                    raise RunError(
                        f"nodes {found[partition]} and {reply.metadata.src_node_id} both hold "
                        "partition "
                        f"{partition}; give each SuperNode its own partition-id in --node-config"
                    )
                found[partition] = reply.metadata.src_node_id
        missing = sorted(set(range(self._num_clients)) - found.keys())
        if missing:
            raise RunError(
                f"no node holds partition {missing[0]} ({len(missing)} of {self._num_clients} are "
                "missing); is --node-config 'partition-id=... num-partitions=...' set on each "
                "SuperNode?"
            )
        return np.array([found[client] for client in range(self._num_clients)], dtype=np.uint64)


def _check_flower(partition: int, theirs: str) -> None:
    """Refuse a node with another minor version of Flower; one that tells none is let pass."""
    ours = version("flwr")
    if theirs and theirs.split(".")[:2] != ours.split(".")[:2]:
        raise RunError(
            f"the node of partition {partition} runs flwr {theirs} and the server flwr {ours}; "
            "start all services from images and packages of one minor version"
        )


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


def cohort_bytes(cohort: Cohort) -> int:
    """Return the bytes of a cohort's instructions as Flower messages; the absent get none."""
    if not len(cohort):
        return 0
    extra = dict(cohort.shared.extra)
    extra.update({name: stack[0] for name, stack in cohort.personal.extra.items()})
    records = {ARRAYS: _model_bytes(cohort.layout)}
    if extra:
        records[EXTRA] = _arrays_bytes(
            tuple((n, tuple(t.shape), t.dtype) for n, t in extra.items())
        )
    total, sent = 0, ~cohort.is_absent
    asked_alike = []
    for places, _ in cohort.alike():
        mine = np.zeros(len(cohort), dtype=bool)
        mine[slice(None) if cohort.own is None else list(places)] = True
        asked_alike += [sent & mine & ~cohort.is_partial, sent & mine & cohort.is_partial]
    for asked in asked_alike:
        if not asked.any():
            continue
        settings = cohort.config_record_of(int(np.flatnonzero(asked)[0]))
        records[CONFIG] = internals.record_bytes(settings)
        for length, count in _lengths(cohort.nodes[asked]).items():
            metadata = internals.instruction_metadata_bytes(
                length, cohort.message_type, cohort.group_id, cohort.ttl
            )
            total += count * internals.message_bytes(metadata, records)
    return total


def replies_bytes(replies: Replies) -> int:
    """Return the bytes of stacked replies as Flower messages (errors are built and measured)."""
    records: dict[str, int] = {}
    if replies.params is not None:
        records[ARRAYS] = _model_bytes(replies.layout)
    if replies.extra:
        records[EXTRA] = _arrays_bytes(
            tuple((n, tuple(t.shape[1:]), t.dtype) for n, t in replies.extra.items())
        )
    total = _sum_bytes(replies[len(replies.client_ids) :]) if replies.failures else 0
    if not len(replies.client_ids):
        return total
    counts = replies.num_examples.numpy()
    # zigzag doubles them, so that a byte holds half as much
    digits = _lengths_of(np.where(counts >= 0, counts, ~counts), _ZIGZAG_LIMITS)
    nodes = _lengths_of(replies.client_ids + internals.FIRST_NODE_ID)
    # replies differ in length by these two numbers alone
    kinds, first, many = np.unique(16 * nodes + digits, return_index=True, return_counts=True)
    for kind, place, count in zip(kinds.tolist(), first.tolist(), many.tolist(), strict=True):
        records[METRICS] = internals.record_bytes(replies.metric_record(place))
        metadata = internals.reply_metadata_bytes(
            kind // 16, replies.message_type, replies.group_id, replies.ttl
        )
        total += count * internals.message_bytes(metadata, records)
    return total


_VARINT_LIMITS = np.array([1 << 7 * length for length in range(1, 9)], dtype=np.int64)
_ZIGZAG_LIMITS = np.array([1 << 7 * length - 1 for length in range(1, 10)], dtype=np.int64)


def _lengths_of(values: np.ndarray, limits: np.ndarray = _VARINT_LIMITS) -> np.ndarray:
    """Return how many bytes protobuf takes for each number from 0 to 2^63 - 1."""
    return np.searchsorted(limits, values, side="right") + 1


def _lengths(nodes: np.ndarray) -> dict[int, int]:
    """How many nodes have ids of each protobuf length."""
    if nodes.dtype != np.int64:  # Flower's own, up to 2^64 - 1
        lengths = np.array([internals.varint_length(node) for node in nodes.tolist()])
    else:
        lengths = _lengths_of(nodes)
    found, many = np.unique(lengths, return_counts=True)
    return dict(zip(found.tolist(), many.tolist(), strict=True))


@lru_cache(maxsize=64)
def _arrays_bytes(specs: tuple[tuple[str, tuple[int, ...], Any], ...]) -> int:
    import torch

    named = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in specs}
    return internals.record_bytes(array_record(named))


def _model_bytes(layout: Layout) -> int:
    specs = {spec.name: tuple(spec) for spec in (*layout.trainable, *layout.buffers)}
    return _arrays_bytes(tuple(specs[name] for name in layout.names))


def _sum_bytes(messages: Iterable[Message]) -> int:
    return sum(internals.wire_bytes(message) for message in messages)


def sent_round(batch: Sequence[Message]) -> int | None:
    """The round of training instructions, or None for anything else."""
    if isinstance(batch, Cohort):
        return batch.server_round if batch.message_type == MessageType.TRAIN else None
    if not batch or batch[0].metadata.message_type != MessageType.TRAIN:
        return None
    config = next(iter(batch[0].content.config_records.values()), ConfigRecord())
    value = config.get(SERVER_ROUND)
    return int(value) if isinstance(value, int) else None
