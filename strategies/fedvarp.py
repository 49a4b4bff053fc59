"""FedVARP: variance reduction for partial participation by the latest update of every client.

Jhunjhunwala, Sharma, Nagarkatti and Joshi, "FedVARP: Tackling the Variance Due to Partial Client
Participation in Federated Learning", UAI 2022 (arXiv:2207.14130), Algorithm 2. The server remembers
N x d numbers.

Symbols: Delta_n update of client n, y_n updates (its latest one), v the step, A who answered,
eta server_lr, N all clients.

Deviations: none. A round without replies, which the paper does not have, leaves the model alone, as
in IBM/fedau.
"""

from typing import ClassVar, final

import torch
from torch import Tensor

from fedsim.aggregators.latest_updates import LatestUpdates, nothing_sent, writable
from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, State, weighted_sum


@final
class FedVARP(FederatedStrategy):
    """Corrects the mean update by what the same clients, and all clients, sent last.

    Args:
        server_lr: eta, the factor on the step; > 0.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

    linear: ClassVar[bool] = True
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
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
        """Return x + eta v with v = mean_A (Delta_n - y_n) + mean_N y_n; then remember Delta_n."""
        ids = replies.client_ids
        if not len(ids):
            return params, state, {}
        updates = writable(state, ids)
        latest = weighted_sum(_ones(len(updates)), updates, torch.zeros_like(params))
        correction = weighted_sum(_ones(len(ids)), replies.update, updates[ids])
        step = correction / len(ids) + latest / len(updates)
        updates[ids] = replies.update
        moved = params.double() + self._server_lr * step
        return moved.to(params.dtype), LatestUpdates(updates), {}


def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)
