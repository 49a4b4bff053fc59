"""Agnostic federated learning: the mixture of clients that is worst for the model is learnt.

Mohri, Sivek and Suresh, "Agnostic Federated Learning", ICML 2019 (arXiv:1902.00146), Algorithm 1:
min over w, max over lambda in the simplex, of sum_k lambda_k L_k(w); the client side is the part
`received_loss`.

Symbols: lambda mixture, L_k(w) losses, gamma_lambda mixture_lr.

Deviations:
- The domains of the paper are the clients, and lambda starts uniform over all N of them.
- Of clients that do not answer, nothing is known: lambda ascends along N / K times the losses of
  the K that answered, which is unbiased where they are drawn uniformly, and the step of the model
  is their updates' mean by lambda.
- Clients take the procedure's steps; the paper's take one.
- Those of the part.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least, require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, weighted_sum
from fedsim.strategy.returned import returned_numbers

RECEIVED_LOSS = "received_loss"


class Mixture(NamedTuple):
    """What the next round needs.

    Attributes:
        mixture: lambda, float64 `[clients]`.
    """

    mixture: Tensor


@final
class AFL(FederatedStrategy):
    """Averages updates by a mixture of clients that ascends along their losses.

    Args:
        mixture_lr: gamma_lambda; >= 0, and 0 is uniform averaging.
        server_lr: Factor on the mean update; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    linear: ClassVar[bool] = True
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"mixture_lr": 0.0}, "fedavg", {"weighted": False}, tolerance=1e-12),
    )
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"received_loss": {}}
    returns: ClassVar[tuple[str, ...]] = (RECEIVED_LOSS,)

    def __init__(self, *, mixture_lr: float = 0.1, server_lr: float = 1.0) -> None:
        require_at_least("mixture_lr", mixture_lr, 0)
        require_positive("server_lr", server_lr)
        self._mixture_lr, self._server_lr = mixture_lr, server_lr

    def init(self, params: Tensor, clients: int) -> Mixture:
        """The uniform mixture."""
        return Mixture(torch.full((clients,), 1 / clients, dtype=torch.float64))

    def buffer_weights(self, state: Mixture, replies: Replies) -> Tensor:
        """Lambda of those who answered."""
        return state.mixture[torch.from_numpy(replies.client_ids)]

    def server_update(
        self, state: Mixture, params: Tensor, replies: Replies
    ) -> tuple[Tensor, Mixture, dict[str, float]]:
        """Return w + eta_g * sum_k lambda_k Delta_k / sum_k lambda_k, and lambda after its ascent.

        The model stays when those who answered have no weight. The metrics are the mean and the
        largest loss at the model of the round, and lambda's largest entry.
        """
        losses = returned_numbers(replies, RECEIVED_LOSS, "received_loss")
        if not replies.num_clients:
            return params, state, {}
        weights = self.buffer_weights(state, replies)
        total, moved = float(weights.sum()), params
        if total:
            assert replies.params is not None
            step = weighted_sum(weights, replies.params, replies.reference) / total
            moved = (params.double() + self._server_lr * step).to(params.dtype)
        ids = torch.from_numpy(replies.client_ids)
        ascent = torch.zeros_like(state.mixture)
        ascent[ids] = losses * (len(ascent) / replies.num_clients)
        mixture = on_simplex(state.mixture + self._mixture_lr * ascent)
        metrics = {
            "loss_mean": float(losses.mean()),
            "loss_max": float(losses.max()),
            "mixture_max": float(mixture.max()),
        }
        return moved, Mixture(mixture), metrics


def on_simplex(point: Tensor) -> Tensor:
    """Return the nearest point with entries >= 0 that add up to 1, float64 `[n]`.

    Args:
        point: Any point, float64 `[n]`.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra, ICML 2008, Figure 1.

    Example:
        >>> on_simplex(torch.tensor([1.0, 0.5, -1.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    ordered, _ = torch.sort(point, descending=True)
    counts = torch.arange(1, len(point) + 1, dtype=point.dtype)
    above = (ordered.cumsum(0) - 1) / counts
    kept = int((ordered > above).sum())  # a prefix: the condition fails once and for all
    return (point - above[kept - 1]).clamp(min=0)
