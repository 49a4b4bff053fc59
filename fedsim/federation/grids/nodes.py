"""Nodes of a deployment: which client each of them is, and whether its Flower is the server's."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsim.basics.errors import RunError, printable
from fedsim.federation.grids.told import tell_all
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages import flower_internals as internals
from fedsim.messages.adapting import present_in
from fedsim.messages.cohort import Cohort
from fedsim.messages.failures import Failure
from fedsim.messages.parsing import ReplyForm
from fedsim.messages.records import (
    AGREED,
    DATA,
    EXPERIMENT,
    KEEPS_STATE,
    PARTITION,
    PARTITION_ID,
    SOFTWARE,
)
from fedsim.messages.replies import Replies

_log = logging.getLogger("fedsim")
_NOBODY = 0  # in place of a node that has not joined; Flower gives no node this number
_LATER_S = 60.0  # a round waits so long, once, for nodes that joined since to say what they hold


class Node(NamedTuple):
    """A node that holds a client's partition.

    Attributes:
        number: Flower's number of it.
        software: Versions and kernels of what runs there, see `basics.versions`; empty where the
            node tells none.
    """

    number: int
    software: Mapping[str, Any]


class PartitionGrid(GridWrapper):
    """Gives the nodes of Flower's grids their client ids: node `c + 2` holds partition c.

    Flower's node ids are random. At first use every node is asked for its partition with a "query"
    message, once all are there; nodes that join later are asked before the next instructions, and
    one of them takes the place of a node that is gone. A node whose Flower is of another minor
    version is refused: Flower lets it join.

    Args:
        inner: Flower's Grid.
        num_clients: N, how many nodes to wait for.
        least: With how many of them the run begins once that time is over; all when None.
        timeout_s: Seconds to wait for them.
        poll_s: Seconds between looks.
        record: Is told of all nodes, by client id, whenever one has taken a client's place.
        why_not: Says why a node with some software may take no part, or None.
        rejoin_s: Seconds that instructions wait for a node that is gone.
        bound: Which partition each of Flower's nodes holds, pairs (node, partition), whatever nodes
            say; None takes their word.
    """

    def __init__(
        self,
        inner: Grid,
        num_clients: int,
        *,
        least: int | None = None,
        timeout_s: float = 300.0,
        poll_s: float = 0.5,
        record: Callable[[Sequence[Node]], None] | None = None,
        why_not: Callable[[Mapping[str, Any]], str | None] | None = None,
        rejoin_s: float = 0.0,
        bound: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(inner)
        self._record, self._why_not = record, why_not
        self._software: dict[int, Mapping[str, Any]] = {}  # of each of Flower's nodes that answered
        self._bound = None if bound is None else dict(bound)
        self._num_clients, self._rejoin_s = num_clients, rejoin_s
        self._least = num_clients if least is None else least
        self.timeout_s, self.poll_s = timeout_s, poll_s
        self._nodes: np.ndarray | None = None
        self._stable: dict[int, int] = {}  # our node of each of Flower's
        self._asked: set[int] = set()  # nodes that were asked for their partition
        self._spare: dict[int, int] = {}  # partitions of nodes that joined beside those asked
        self._data: dict[int, Mapping[str, Any]] = {}  # what each of them says of its data
        self._said: dict[str, str] = {}  # to every node, beside its instruction
        self._keeping: set[int] = set()  # nodes whose client states outlive them
        self._declares: Callable[[Cohort], ReplyForm | None] = _nothing
        self._unfit: Callable[[int, Mapping[str, Any]], str | None] | None = None

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
            self._stable = {n: internals.node_of(c) for c, n in enumerate(nodes) if n != _NOBODY}
            self._tell()
        return self._nodes

    @property
    def data_told(self) -> list[Mapping[str, Any]]:
        """What the node of each client says of its data, by client id; empty where it says none."""
        return [self._data.get(node, {}) for node in self.nodes.tolist()]

    def agree(self, agreed: str, unfit: Callable[[int, Mapping[str, Any]], str | None]) -> None:
        """Let every instruction say what the nodes agreed on of their data.

        Args:
            agreed: That, as JSON.
            unfit: Says why a node that joins later, with some client id, does not fit, or None.
        """
        self._said[AGREED], self._unfit = agreed, unfit

    def go_on_as(self, experiment: str) -> None:
        """Let every instruction say which run it is of, however often that was gone on with."""
        self._said[EXPERIMENT] = experiment

    @property
    def all_keep_state(self) -> bool:
        """Whether every client's node keeps its state where it outlives the node and the run."""
        return self._keeping.issuperset(self.nodes.tolist())

    def hold_to(self, declares: Callable[[Cohort], ReplyForm | None]) -> None:
        """Hold replies to what procedure and task declare, and not to what most of them hold.

        Args:
            declares: Says what the replies to some instructions hold; None where it is not known.
        """
        self._declares = declares

    def record_in(self, record: Callable[[Sequence[Node]], None]) -> None:
        """Tell of all nodes now, and whenever one has taken a client's place."""
        self._record = record
        if self._nodes is not None:
            self._tell()

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies of the nodes that hold the clients' partitions.

        What Flower says in the name of a node that is gone, or of a reply that did not arrive, is
        known by the instruction that it answers. Who is not heard of is late: absent is who dropped
        out by the scenario.
        """
        self._look_again()
        self._await(cohort.client_ids[~cohort.is_absent].tolist())
        asked = present_in(cohort.altered(node_ids=self.nodes[cohort.client_ids]))
        sent = [each for each in asked if each.metadata.dst_node_id != _NOBODY]
        tell_all(self._said, sent)
        answers = list(self.inner.send_and_receive(sent, timeout=timeout)) if sent else []
        sent_to = _sent_to(sent)
        back = [self._back(each, sent_to) for each in answers if _answers_one(each, sent_to)]
        replies = Replies.from_messages(back, cohort, self._declares(cohort))
        gone = set(cohort.client_ids[cohort.is_absent].tolist())
        late = "no reply arrived" + ("" if timeout is None else f" within {timeout:g} s")
        return replace(
            replies,
            failures=tuple(
                f if f.cause != "absent" or f.client_id in gone else self._unheard(f, late)
                for f in replies.failures
            ),
        )

    def _unheard(self, failure: Failure, late: str) -> Failure:
        """What became of a client of whom nothing was heard, and who did not drop out."""
        if self.nodes[failure.client_id] == _NOBODY:
            why = f"no node holds partition {failure.client_id}"
            return failure._replace(cause="died", reason=why)
        return failure._replace(cause="late", reason=late)

    def _back(self, reply: Message, asked: Mapping[str, int]) -> Message:
        """The reply as from the client's own stable node."""
        source = reply.metadata.src_node_id
        if source not in self._stable and reply.has_error():
            source = asked.get(reply.metadata.reply_to_message_id, source)
        internals.set_source(reply, self._stable.get(source, source))
        return reply

    def _ask(self) -> np.ndarray:
        deadline = time.monotonic() + self.timeout_s
        while True:
            present = sorted(self.inner.get_node_ids())
            present = self._bound_among(present)
            if len(present) >= self._num_clients:
                break
            if time.monotonic() > deadline:
                if len(present) >= self._least:
                    break
                raise RunError(
                    f"{len(present)} of {self._num_clients} nodes joined within "
                    f"{self.timeout_s:g} s; "
                    "start the missing SuperNodes, or lower [partition] clients"
                )
            time.sleep(self.poll_s)
        found: dict[int, int] = {}
        told = self._partitions_of(present, self.timeout_s)
        for partition, node in told.held:
            if partition in found:
                raise RunError(
                    f"nodes {found[partition]} and {node} both hold partition {partition}; give "
                    "each SuperNode its own partition-id in --node-config"
                )
            found[partition] = node
        missing = sorted(set(range(self._num_clients)) - found.keys())
        if len(found) < self._least:
            why = "is --node-config 'partition-id=... num-partitions=...' set on each SuperNode?"
            if told.reasons:
                why = "; ".join(told.reasons)
            raise RunError(
                f"no node holds partition {missing[0]} ({len(missing)} of {self._num_clients} are "
                f"missing); {why}"
            )
        for reason in told.reasons:
            _log.warning("%s; it takes no part", reason)
        if missing:
            _log.warning(
                "no node holds partition %s; the run begins without, as [deployment] min_sites has "
                "it", ", ".join(map(str, missing)),
            )  # fmt: skip
        held = [found.get(client, _NOBODY) for client in range(self._num_clients)]
        return np.array(held, dtype=np.uint64)

    def _await(self, clients: Sequence[int]) -> None:
        """Wait a while for nodes of these clients that are gone: one that is restarted comes back.

        A node that died is listed by Flower until it has missed its signs of life.
        """
        deadline = time.monotonic() + self._rejoin_s
        while self._rejoin_s:
            present = set(self.inner.get_node_ids())
            gone = [client for client in clients if int(self.nodes[client]) not in present]
            if not gone:
                return
            if time.monotonic() > deadline:
                _log.warning(
                    "no node of partition %s came back within %g s",
                    ", ".join(map(str, gone)), self._rejoin_s,
                )  # fmt: skip
                return
            time.sleep(self.poll_s)
            self._look_again()

    def _bound_among(self, nodes: Iterable[int]) -> list[int]:
        """The nodes that may hold a partition: nobody else is waited for, or asked."""
        if self._bound is None:
            return list(nodes)
        clients = self._num_clients
        return [node for node in nodes if self._bound.get(node, clients) < clients]

    def _look_again(self) -> None:
        """Ask nodes that joined since; one that holds a partition whose node is gone takes over.

        A SuperNode that was restarted is another node to Flower.
        """
        nodes, present = self.nodes.tolist(), set(self.inner.get_node_ids())
        present = set(self._bound_among(present))
        if new := sorted(present - self._asked):
            told = self._partitions_of(new, min(self.timeout_s, _LATER_S))
            self._spare |= {node: partition for partition, node in told.held}
            for reason in told.reasons:
                _log.warning("%s; it takes no part", reason)
        for node, partition in sorted(self._spare.items()):
            if node not in present or nodes[partition] in present:
                continue
            before = f"node {nodes[partition]} is gone" + (
                "" if node in self._keeping else
                ", and with it what clients keep between rounds, if they keep anything"
            )  # fmt: skip
            if nodes[partition] == _NOBODY:
                before = "it has joined"
            _log.warning("partition %d is now held by node %d: %s", partition, node, before)
            self._stable.pop(nodes[partition], None)
            nodes[partition] = node
            self._stable[node] = internals.node_of(partition)
            self._nodes = np.array(nodes, dtype=np.uint64)
            self._tell()
        self._spare = {n: p for n, p in self._spare.items() if n not in nodes}

    def _tell(self) -> None:
        if self._record is not None and self._nodes is not None:
            nodes = self._nodes.tolist()
            self._record([Node(node, self._software.get(node, {})) for node in nodes])

    def _partitions_of(self, nodes: Sequence[int], timeout_s: float) -> "_Answers":
        """Ask nodes which partition each holds; no node is asked twice."""
        self._asked |= set(nodes)
        queries = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
        held: list[tuple[int, int]] = []
        reasons: list[str] = []
        silent, answers = set(nodes), list(self.inner.send_and_receive(queries, timeout=timeout_s))
        sent_to = _sent_to(queries)
        for reply in answers:
            node = reply.metadata.src_node_id
            if reply.has_error():  # Flower says so in its own name of a node that is gone
                node = sent_to.get(reply.metadata.reply_to_message_id, node)
            silent.discard(node)
            if reply.has_error():
                reasons.append(f"node {node}: {printable(str(reply.error.reason))}")
            elif PARTITION in reply.content.config_records:
                told = reply.content.config_records[PARTITION]
                partition = int(told[PARTITION_ID])  # type: ignore[arg-type]
                if self._bound is not None and self._bound[node] != partition:
                    its = self._bound[node]
                    reasons.append(f"node {node}: says partition {partition}, and holds {its}")
                    continue
                self._software[node] = software = _read(told.get(SOFTWARE))
                other = _other_flower(partition, str(software.get("flwr", "")))
                if not other and self._why_not is not None and (why := self._why_not(software)):
                    other = f"the node of partition {partition} {why}"
                if other and self._nodes is None:
                    raise RunError(other)
                if other:  # the run goes on without a node that joined later
                    reasons.append(f"node {node}: {other}")
                    continue
                if not 0 <= partition < self._num_clients:
                    reasons.append(
                        f"node {node}: holds partition {partition} of {self._num_clients}"
                    )
                    continue
                if told.get(KEEPS_STATE):
                    self._keeping.add(node)
                self._data[node] = data = _read(told.get(DATA), plain=False)
                if self._unfit is not None and (why := self._unfit(partition, data)):
                    reasons.append(f"node {node}: {why}")
                    continue
                held.append((partition, node))
        reasons += [f"node {node}: no answer within {timeout_s:g} s" for node in sorted(silent)]
        return _Answers(held, reasons)


def _sent_to(messages: Iterable[Message]) -> dict[str, int]:
    """Which node each was sent to, by the number that Flower gave it as it was sent."""
    return {m.metadata.message_id: m.metadata.dst_node_id for m in messages}


def _nothing(_: Cohort) -> ReplyForm | None:
    return None


class _Answers(NamedTuple):
    """What nodes said: (partition, node) of those that hold one, and why others hold none."""

    held: list[tuple[int, int]]
    reasons: list[str]


def _answers_one(reply: Message, asked: Mapping[str, int]) -> bool:
    """Whether a reply answers one of these instructions, and comes from the node it was for."""
    node = reply.metadata.src_node_id
    if reply.has_error() or asked.get(reply.metadata.reply_to_message_id) == node:
        return True
    _log.warning("node %d answered none of this round's instructions to it; left out", node)
    return False


def _read(told: object, *, plain: bool = True) -> Mapping[str, Any]:
    """What a node says of itself, as text where it is plain; nothing where it cannot be read."""
    try:
        found = json.loads(told) if isinstance(told, str) else {}
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    if not plain:
        return found
    return {printable(str(name)): printable(str(value)) for name, value in found.items()}


def _other_flower(partition: int, theirs: str) -> str | None:
    """Say that a node has another minor version of Flower; one that tells none is let pass."""
    ours = version("flwr")
    if not theirs or theirs.split(".")[:2] == ours.split(".")[:2]:
        return None
    return (
        f"the node of partition {partition} runs flwr {theirs} and the server flwr {ours}; "
        "start all services from images and packages of one minor version"
    )
