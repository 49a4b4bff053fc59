"""Nodes of a deployment: which client each of them is, and whether its Flower is the server's."""

import time
from collections.abc import Iterable
from importlib.metadata import version

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsim.basics.errors import RunError
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages import flower_internals as internals
from fedsim.messages.adapting import present_in
from fedsim.messages.cohort import Cohort
from fedsim.messages.records import FLOWER, PARTITION, PARTITION_ID
from fedsim.messages.replies import Replies


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

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies of the nodes that hold the clients' partitions."""
        addressed = cohort.altered(node_ids=self.nodes[cohort.client_ids])
        sent = present_in(addressed)
        answers = self.inner.send_and_receive(sent, timeout=timeout) if sent else []
        return Replies.from_messages(map(self._back, answers), cohort)

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
