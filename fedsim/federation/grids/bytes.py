"""Bytes sent and received, counted in a round."""

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages.byte_counts import cohort_bytes, replies_bytes, sum_of_bytes
from fedsim.messages.cohort import Cohort
from fedsim.messages.replies import Replies


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
