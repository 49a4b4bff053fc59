"""Replies of which only those that may pass reach a strategy."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.federation.bounds import Bounds
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages.cohort import Cohort, MessagesError, why_no_cohort
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies


class AdmissionGrid(GridWrapper):
    """Lets a reply pass only with the expected names, shapes and dtypes, finite, counted, and once.

    Args:
        inner: The Grid around which this one stands.
        layout: The model's layout.
        bounds: What one client may weigh and move; None bounds nothing.
    """

    def __init__(self, inner: Grid, layout: Layout, bounds: Bounds | None = None) -> None:
        super().__init__(inner)
        self._layout, self._bounds = layout, bounds or Bounds()

    @property
    def layout(self) -> Layout:
        """The model's layout."""
        return self._layout

    def passed_by(self, batch: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        """Refuse messages whose replies nothing can be held against.

        Raises:
            MessagesError: If there are any.
        """
        if len(batch):
            raise MessagesError(why_no_cohort(batch))
        return super().passed_by(batch, timeout)

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the admitted replies, with everybody else named."""
        replies = self.passed_on(cohort, timeout).admit()
        return self._bounds.held(replies, _buffers_sent(cohort, replies.client_ids))


def _buffers_sent(cohort: Cohort, client_ids: np.ndarray) -> dict[str, Tensor]:
    """The buffers that clients were sent, by name: shared ones, and rows for these clients."""
    own = cohort.personal.buffers
    if not own:
        return dict(cohort.shared.buffers)
    places = torch.from_numpy(np.searchsorted(cohort.client_ids, client_ids))
    return {**cohort.shared.buffers, **{name: rows[places] for name, rows in own.items()}}
