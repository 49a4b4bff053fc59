"""Replies of which only those that may pass reach a strategy."""

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages.cohort import Cohort, MessagesError, why_no_cohort
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies


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
