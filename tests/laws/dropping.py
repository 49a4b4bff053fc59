"""Clients that were selected and drop out before they answer."""

from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper, sent_round, without
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout


class DropOutGrid(GridWrapper):
    """Lets clients that were selected drop out before they answer.

    Their slots in a chunk stay, neutral, so nobody else's bits change.

    Args:
        inner: The Grid around which this one stands.
        drops: Returns the clients that drop out in a round of training.
        layout: See `without`.
    """

    def __init__(
        self, inner: Grid, drops: Callable[[int], Iterable[int]], layout: Layout | None = None
    ) -> None:
        super().__init__(inner)
        self.drops, self.layout = drops, layout

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions to those who do not drop out."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        sent = sent_round(batch)
        if sent is not None:
            gone = np.array(sorted(self.drops(sent)), dtype=np.int64)
            batch = without(batch, gone, self.layout)
        return self.inner.send_and_receive(batch, timeout=timeout)
