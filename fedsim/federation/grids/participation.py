"""Who is there in a round, as a rule of participation has it."""

from collections.abc import Iterable

import numpy as np
from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper, training_round
from fedsim.federation.participation.kinds import Participation
from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import Cohort
from fedsim.messages.replies import Replies


class ParticipationGrid(GridWrapper):
    """Offers the round's participants as its nodes.

    Under `strategy.start`, which names no rounds, a round ends with the replies to its training.

    Args:
        inner: The Grid with all clients.
        participation: Who takes part when.
        seed: The scenario's seed.
    """

    def __init__(self, inner: Grid, participation: Participation, *, seed: int) -> None:
        super().__init__(inner)
        self.participation, self.seed = participation, seed
        self.server_round = 1

    def begin_round(self, server_round: int) -> None:
        """Set the round whose participants are offered."""
        self.server_round = server_round
        super().begin_round(server_round)

    def participants(self) -> np.ndarray:
        """Return the round's participants, int64 client ids in ascending order."""
        return self.participation.participants(
            self.server_round, num_clients=self.num_clients, seed=self.seed
        )

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the round's participants."""
        return [internals.node_of(client) for client in self.participants().tolist()]

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies; after training the next round's participants are offered."""
        replies = self.passed_on(cohort, timeout)
        if (sent := training_round(cohort)) is not None:
            self.server_round = sent + 1
        return replies


class SubsetGrid(GridWrapper):
    """Offers some clients only.

    Args:
        inner: The Grid with all clients.
        client_ids: The clients offered.
    """

    def __init__(self, inner: Grid, client_ids: np.ndarray) -> None:
        super().__init__(inner)
        self.client_ids = np.sort(client_ids)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of these clients."""
        return [internals.node_of(client) for client in self.client_ids.tolist()]
