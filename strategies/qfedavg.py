"""q-FedAvg: clients with larger losses count for more.

Li, Sanjabi, Beirami and Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020
(arXiv:1905.10497), Algorithm 2 (its objective, q-FFL, is sum_k p_k F_k^(q+1) / (q + 1)); the client
side is the part `received_loss`.

Symbols: q q, L lipschitz, F_k(w^t) losses, Delta w_k = L (w^t - w_k) is -L times the update,
h_k = q F_k^(q-1) |Delta w_k|^2 + L F_k^q.

Deviations:
- Clients are drawn as `[participation]` says; the paper draws them by their examples. All that
  answer count by their losses alone, as in the paper.
- A loss below 1e-10 is taken for 1e-10, whose power may be negative.
- Those of the part.
"""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, NoState, State, weighted_sum
from fedsim.strategy.returned import returned_numbers

RECEIVED_LOSS = "received_loss"
_LEAST = 1e-10  # loss


@final
class QFedAvg(FederatedStrategy):
    """Moves the model by the clients' updates, weighted by powers of their losses.

    Args:
        q: How much larger losses count; >= 0, and 0 is uniform averaging.
        lipschitz: L, an estimate of the local objectives' Lipschitz constant; > 0. The paper takes
            one over the local step size.

    Raises:
        ValueError: If an argument is outside its range.
    """

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("lipschitz",), at("q", 0.0)),)
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"q": 0.0}, "fedavg", {"weighted": False}, tolerance=1e-12),
    )
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"received_loss": {}}
    returns: ClassVar[tuple[str, ...]] = (RECEIVED_LOSS,)

    def __init__(self, *, q: float = 1.0, lipschitz: float = 10.0) -> None:
        require_at_least("q", q, 0)
        require_positive("lipschitz", lipschitz)
        self._q, self._lipschitz = q, lipschitz

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """1 for everybody."""
        return torch.ones(replies.num_clients, dtype=torch.float64)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return w^t - sum_k F_k^q Delta w_k / sum_k h_k; the model stays when nobody answered.

        The metrics are the mean, the largest and the standard deviation of the losses at the model
        of the round.
        """
        losses = returned_numbers(replies, RECEIVED_LOSS, "received_loss")
        if not replies.num_clients:
            return params, state, {}
        squares = replies.update.double().square().sum(1)
        weights, size = fair_weights(losses, squares, q=self._q, lipschitz=self._lipschitz)
        assert replies.params is not None
        step = weighted_sum(weights, replies.params, replies.reference) / size
        metrics = {
            "loss_mean": float(losses.mean()),
            "loss_max": float(losses.max()),
            "loss_std": float(losses.std(correction=0)),
        }
        return (params.double() + step).to(params.dtype), state, metrics


def fair_weights(
    losses: Tensor, squares: Tensor, *, q: float, lipschitz: float
) -> tuple[Tensor, float]:
    """Return (F_k^q, sum_k h_k / L): the step is the updates' weighted sum divided by the latter.

    Args:
        losses: F_k(w^t), float64 `[K]`.
        squares: Squared lengths of the updates, |Delta w_k|^2 / L^2, float64 `[K]`.
        q: >= 0.
        lipschitz: L; > 0.

    Source: Li et al., ICLR 2020 (arXiv:1905.10497), Algorithm 2, lines 6 and 7.

    Example:
        >>> losses, squares = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
        >>> fair_weights(losses, squares, q=1.0, lipschitz=2.0)
        (tensor([1., 2.]), 4.0)
    """
    losses = losses.clamp(min=_LEAST)
    weights = losses**q
    sizes = weights + q * losses ** (q - 1) * lipschitz * squares
    return weights, float(sizes.sum())
