"""Clients that failed are asked again, at the same place in the same chunk."""

import time

import numpy as np
from flwr.app import MessageType
from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper, Observed, without
from fedsim.messages.cohort import Cohort
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
    """

    def __init__(self, inner: Grid, retries: int) -> None:
        super().__init__(inner)
        self.retries = retries
        self._retried: set[int] = set()

    def begin_round(self, server_round: int) -> None:
        """Forget who was asked again in the round before."""
        self._retried = set()
        super().begin_round(server_round)

    def observed(self) -> Observed:
        """Return how many were asked again to train."""
        mine = Observed({"clients/retried": len(self._retried)}, {})
        return mine.joined(super().observed())

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies, those of clients that were asked again among them."""
        until = None if timeout is None else time.monotonic() + timeout
        replies = self.passed_on(cohort, timeout)
        for _ in range(self.retries):
            again = {f.client_id for f in replies.failures if f.cause not in _FINAL}
            again -= set(replies.client_ids.tolist())
            left = None if until is None else until - time.monotonic()
            if not again or (left is not None and left <= 0):
                break
            if replies.message_type == MessageType.TRAIN:
                self._retried |= again
            others = np.setdiff1d(cohort.client_ids, sorted(again))
            later = self.passed_on(without(cohort, others).altered(), left)
            replies = replies.completed(later, again)
        return replies
