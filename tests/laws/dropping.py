"""Clients that were selected and drop out before they answer."""

from collections.abc import Callable, Iterable

import numpy as np
from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper, training_round, without
from fedsim.messages.cohort import Cohort
from fedsim.messages.replies import Replies


class DropOutGrid(GridWrapper):
    """Lets clients that were selected drop out before they answer.

    Their slots in a chunk stay, neutral, so nobody else's bits change.

    Args:
        inner: The Grid around which this one stands.
        drops: Returns the clients that drop out in a round of training.
    """

    def __init__(self, inner: Grid, drops: Callable[[int], Iterable[int]]) -> None:
        super().__init__(inner)
        self.drops = drops

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies of those who do not drop out."""
        if (sent := training_round(cohort)) is not None:
            gone = np.array(sorted(self.drops(sent)), dtype=np.int64)
            cohort = without(cohort, gone)
        return self.passed_on(cohort, timeout)
