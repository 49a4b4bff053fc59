"""Bytes sent and received, counted in a round."""

from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages.byte_counts import cohort_bytes, replies_bytes
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

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies, counting both ways."""
        self.downlink_bytes += cohort_bytes(cohort)
        replies = self.passed_on(cohort, timeout)
        self.uplink_bytes += replies_bytes(replies)
        return replies
