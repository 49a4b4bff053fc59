"""Averaging over all clients, absent ones with an update of zero.

The baseline "average all" of Wang and Ji, "A Lightweight Method for Tackling Unknown Participation
Statistics in Federated Averaging", ICLR 2024 (arXiv:2306.03401). It finds the minimum of
sum_n p_n F_n, where p_n is the rate at which client n takes part.

Symbols: Delta_n update of client n, eta server_lr, N all clients registered.

Deviations: none.
"""

from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, LinearStrategy, State


class Enrolled(NamedTuple):
    """How many clients there are.

    Attributes:
        clients: N.
    """

    clients: int


@final
class AverageAll(LinearStrategy):
    """Moves the model by the sum of the clients' updates over the number of all clients.

    Args:
        server_lr: eta, the factor on the step; > 0. One over the mean rate makes up for the
            absent.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({}, "fedavg", {"weighted": False}),)

    def __init__(self, *, server_lr: float = 1.0) -> None:
        require_positive("server_lr", server_lr)
        self._server_lr = server_lr

    def init(self, params: Tensor, clients: int) -> State:
        """N."""
        return Enrolled(clients)

    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """1 for everybody."""
        return torch.ones(len(client_ids), dtype=torch.float64)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Enrol new clients, then take the sum and apply it."""
        clients = max(state.clients, int(replies.client_ids.max(initial=-1)) + 1)
        return super().server_update(Enrolled(clients), params, replies)

    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + (eta / N) sum_n Delta_n; the model stays when nobody answered."""
        if not weight_sum:
            return params, state, {}
        moved = params.double() + self._server_lr * (weighted_sum / state.clients)
        return moved.to(params.dtype), state, {}
