"""Clients that failed are asked again, at the same place in the same chunk."""

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper, Observed, sent_again
from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies

# nobody to ask again: who dropped out, whose time is over, and replies beside one that counts
_FINAL = ("absent", "late", "twice", "stranger")


class RetryGrid(GridWrapper):
    """Asks clients that failed again, in the same cohort with everybody else absent.

    So a client that succeeds has the bits that it would have had at once. What it remembers is
    committed once, for what failed has committed nothing.

    Args:
        inner: The Grid around which this one stands; it returns admitted `Replies`.
        retries: How often a client is asked again, at most.
        layout: The model's layout, when the engine trains in chunks.
    """

    def __init__(self, inner: Grid, retries: int, layout: Layout | None) -> None:
        super().__init__(inner)
        self.retries, self.layout = retries, layout
        self._retried: set[int] = set()

    def begin_round(self, server_round: int) -> None:
        """Forget who was asked again in the round before."""
        self._retried = set()
        super().begin_round(server_round)

    def observed(self) -> Observed:
        """Return how many were asked again to train."""
        mine = Observed({"clients/retried": len(self._retried)}, {})
        return mine.joined(super().observed())

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions, and those that failed again while there is time."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        until = None if timeout is None else time.monotonic() + timeout
        replies = self.inner.send_and_receive(batch, timeout=timeout)
        for _ in range(self.retries):
            if not isinstance(replies, Replies):
                break
            again = {f.client_id for f in replies.failures if f.cause not in _FINAL}
            again -= set(replies.client_ids.tolist())
            left = None if until is None else until - time.monotonic()
            if not again or (left is not None and left <= 0):
                break
            if replies.message_type == MessageType.TRAIN:
                self._retried |= again
            ids = np.array(sorted(again), dtype=np.int64)
            later = self.inner.send_and_receive(self._only(batch, ids), timeout=left)
            if not isinstance(later, Replies):
                break
            replies = replies.completed(later, again)
        return replies

    def _only(self, batch: Cohort | list[Message], ids: np.ndarray) -> Cohort | list[Message]:
        """The instructions to these clients."""
        cohort = batch if isinstance(batch, Cohort) else None
        if cohort is None and self.layout is not None:
            cohort = Cohort.from_messages(batch, self.layout)
        if cohort is not None:
            absent = cohort.is_absent | ~np.isin(cohort.client_ids, ids)
            return replace(cohort, absent=absent, _built={})
        nodes = {internals.node_of(client) for client in ids.tolist()}
        return [
            sent_again(message, message.content)
            for message in batch
            if message.metadata.dst_node_id in nodes
        ]
