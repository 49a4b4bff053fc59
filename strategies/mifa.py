"""MIFA: averaging over the latest update of every client.

Gu, Huang, Zhang and Huang, "Fast Federated Learning in the Presence of Arbitrary Device
Unavailability", NeurIPS 2021 (arXiv:2106.04159), Algorithm 1. The server remembers N x d numbers.

Symbols: Delta_n update of client n, y_n updates (its latest one), eta server_lr, N all clients.

Deviations:
- As in IBM/fedau, updates are remembered as they are, the paper's divided by the round's local
  step size: the same thing while that is constant.
- Who has not taken part yet counts with an update of zero, as in IBM/fedau; in the paper everybody
  takes part in the first round.
"""

from typing import ClassVar, final

import torch
from torch import Tensor

from fedsim.aggregators.latest_updates import LatestUpdates, nothing_sent, writable
from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, State, weighted_sum


@final
class MIFA(FederatedStrategy):
    """Moves the model by the mean of all clients' latest updates, in rounds without replies too.

    Args:
        server_lr: eta, the factor on the mean; > 0.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

    linear: ClassVar[bool] = True
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        # what is remembered is rounded to the model's dtype
        Degenerate({}, "fedavg", {"weighted": False}, tolerance=1e-12),
    )

    def __init__(self, *, server_lr: float = 1.0) -> None:
        require_positive("server_lr", server_lr)
        self._server_lr = server_lr

    def init(self, params: Tensor, clients: int) -> State:
        """Nobody has sent anything."""
        return nothing_sent(params, clients)

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """1 for everybody who answered: buffers are not remembered."""
        return torch.ones(replies.num_clients, dtype=torch.float64)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Remember the updates; return x + (eta / N) sum_n y_n over all clients."""
        updates = writable(state, replies.client_ids)
        updates[replies.client_ids] = replies.update
        clients = len(updates)
        if not clients:  # a deployment whose nodes are still to come
            return params, state, {}
        total = weighted_sum(torch.ones(clients).double(), updates, torch.zeros_like(params))
        moved = params.double() + self._server_lr * (total / clients)
        return moved.to(params.dtype), LatestUpdates(updates), {}
