"""What a strategy's base keeps between Flower's calls, and how its cohorts are put together."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.aggregators.server_optimizers import Moments
from fedsim.basics.errors import RunError
from fedsim.messages.adapting import replies_of
from fedsim.messages.cohort import SETUP, Cohort
from fedsim.messages.flower_internals import FIRST_NODE_ID
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.replies import Replies
from fedsim.strategy.declarations import Setup, State

_log = logging.getLogger("fedsim")
_SERVER = "server:"  # begins the names of what the server optimiser remembers, beside the State's


@dataclass
class CallSession:
    """What is kept between Flower's calls; made anew when round 1 is configured.

    Attributes:
        layout: How the model's tensors lie in the flat vector.
        num_clients: N, the clients registered.
        state: The strategy's State.
        nodes: With a Grid of Flower's, the client that each node seen so far stands for.
        participants: The round's participants, int64.
        params: The model that the round was configured with, `[dim]`.
        buffers: Its buffers.
        sent: The last cohort.
        setup: Who answered the set-up exchange, without the tensors.
        moments: What the server optimiser remembers, if the strategy was given one.
    """

    layout: Layout
    num_clients: int
    state: State
    nodes: dict[int, int]
    participants: np.ndarray | None = None
    params: Tensor | None = None
    buffers: Mapping[str, Tensor] | None = None
    sent: Cohort | None = None
    setup: Replies | None = None
    moments: Moments | None = None

    def fields(self) -> dict[str, Any]:
        """Return by name what a checkpoint holds: the State, and what the optimiser remembers."""
        beside = {} if self.moments is None else self.moments._asdict()
        return {**self.state._asdict(), **{f"{_SERVER}{n}": v for n, v in beside.items()}}

    def restore(self, fields: Mapping[str, Any]) -> None:
        """Take up what `fields` returned.

        Raises:
            ValueError: If the saved fields are others.
        """
        mine = {name: v for name, v in fields.items() if not name.startswith(_SERVER)}
        self.state = restore_fields(self.state, mine)
        beside = {n.removeprefix(_SERVER): v for n, v in fields.items() if n not in mine}
        if self.moments is not None:
            self.moments = restore_fields(self.moments, beside)
        elif beside:
            raise ValueError(
                f"the saved state has {sorted(beside)} of a server optimiser, and the strategy has "
                "none; give it the one that the state was saved with"
            )

    def cohort(
        self, server_round: int, config: ConfigRecord, clients: np.ndarray, nodes: np.ndarray,
        shared: Payload, personal: Payload, buffers: Mapping[str, Tensor],
        *, message_type: str = MessageType.TRAIN,
    ) -> Cohort:  # fmt: skip
        """Return what a round sends.

        Args:
            server_round: The round.
            config: What Flower's call was given for the clients.
            clients: int64 `[K]`, in ascending order.
            nodes: Their nodes, as `present` returns them.
            shared: What all receive.
            personal: What each receives, rows `[K, ...]`.
            buffers: The model's, for those that neither payload has.
            message_type: Flower's.
        """
        return Cohort(
            client_ids=clients,
            server_round=server_round,
            layout=self.layout,
            shared=_with_buffers(shared, personal, buffers),
            personal=personal,
            config=dict(config),
            message_type=message_type,
            node_ids=None if nodes.dtype == np.int64 else nodes,
        )

    def present(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """Return the round's clients and their nodes, in client order."""
        nodes = sorted(grid.get_node_ids())
        if hasattr(grid, "num_clients"):
            ours = np.array(nodes, dtype=np.int64)
            return ours - FIRST_NODE_ID, ours
        # a grid of Flower's: node ids are random 64-bit numbers and say nothing, so clients are
        # numbered as they are first seen
        for node in nodes:
            self.nodes.setdefault(node, len(self.nodes))
        nodes.sort(key=self.nodes.__getitem__)
        clients = np.array([self.nodes[node] for node in nodes], dtype=np.int64)
        return clients, np.array(nodes, dtype=np.uint64)

    def exchange(
        self, setup: Setup, params: Tensor, buffers: Mapping[str, Tensor], config: ConfigRecord,
        grid: Grid, *, timeout: float | None,
    ) -> Replies:  # fmt: skip
        """Hold a set-up exchange and return its admitted replies; who answered is kept.

        Args:
            setup: What the strategy asks for.
            params: The initial model, `[dim]`.
            buffers: Its buffers.
            config: What Flower's call was given for the clients.
            grid: Where the clients are.
            timeout: Seconds that it may take; None waits for ever.

        Raises:
            RunError: If replies came and every one of them was refused.
        """
        shared = Payload(params, {}, setup.shared.extra)
        clients, nodes = setup.clients, setup.clients + FIRST_NODE_ID
        if not hasattr(grid, "num_clients"):  # Flower's: only the nodes seen have a number
            clients, nodes = self.present(grid)
            asked = np.isin(clients, setup.clients)
            clients, nodes = clients[asked], nodes[asked]
        cohort = self.cohort(
            0, config, clients, nodes, shared, Payload(), buffers, message_type=SETUP
        )
        admitted = _admitted(grid.send_and_receive(cohort, timeout=timeout), cohort)
        self.setup = replace(admitted, params=None, reference=None, buffers={}, extra={})
        return admitted

    def expect(self, client_ids: np.ndarray) -> None:
        """Expect replies of these clients, who may have been sent the model rounds ago.

        Args:
            client_ids: int64, ascending.
        """
        assert self.sent is not None
        self.sent = self.sent.altered(
            client_ids=client_ids, personal=Payload(), own=None, node_ids=None
        )

    def admitted(self, replies: Iterable[Message]) -> Replies:
        """Return what may pass of the replies to the last cohort.

        Raises:
            RunError: If replies came and every one of them was refused.
        """
        assert self.sent is not None
        return _admitted(replies, self.sent)


def federation_size(grid: Grid) -> int:
    """Return N, the clients registered with a grid (a round's participants may be fewer)."""
    known = getattr(grid, "num_clients", None)
    return int(known) if known is not None else len(list(grid.get_node_ids()))


def restore_fields(state: State, fields: Mapping[str, Any]) -> State:
    """Return `state` with the saved values of all its fields.

    Raises:
        ValueError: If the saved fields are not the State's.
    """
    if set(fields) != set(state._fields):
        raise ValueError(f"the saved state has {sorted(fields)}, expected {sorted(state._fields)}")
    return state._replace(**fields)


def _admitted(replies: Iterable[Message], sent: Cohort) -> Replies:
    """Admit replies, and say who was refused when nobody before has."""
    received = replies_of(replies, sent)
    if received.admitted:  # before: the failures were counted there
        return received
    admitted = received.admit()
    refused = [f for f in admitted.failures if f.cause != "absent"]
    for failure in refused:
        _log.warning("%s", failure)
    if refused and not admitted.num_clients:
        raise RunError(f"every reply was refused; the first: {refused[0]}")
    return admitted


def _with_buffers(shared: Payload, personal: Payload, buffers: Mapping[str, Tensor]) -> Payload:
    more = {
        n: t for n, t in buffers.items() if n not in shared.buffers and n not in personal.buffers
    }
    return Payload(shared.params, {**shared.buffers, **more}, shared.extra)
