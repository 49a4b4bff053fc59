"""Many federations on one set of workers: each sees its own clients, as if there were no others."""

import contextlib
import dataclasses

from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages.flower_internals import FIRST_NODE_ID


class OneFederation(GridWrapper):
    """Offers some clients, from `first` on, as a federation of their own."""

    def __init__(self, inner, first, clients):
        super().__init__(inner)
        self._first, self.clients = first, clients

    @property
    def num_clients(self):
        return self.clients

    def get_node_ids(self):
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self.clients)

    def send_and_receive(self, messages, *, timeout=None):
        sent = messages.altered(client_ids=messages.client_ids + self._first)
        replies = self.inner.send_and_receive(sent, timeout=timeout)
        assert not replies.failures, replies.failures
        return dataclasses.replace(replies, client_ids=replies.client_ids - self._first)


@contextlib.contextmanager
def only(grid, *workers):
    """Let a grid use some of its workers, in this order."""
    everyone = grid._workers.pool
    grid._workers.pool = [everyone[number] for number in workers]
    try:
        yield grid
    finally:
        grid._workers.pool = everyone
