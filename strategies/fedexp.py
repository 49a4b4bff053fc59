"""FedExP: the server extrapolates as far as the clients' disagreement allows.

Jhunjhunwala, Wang and Joshi, "FedExP: Speeding Up Federated Averaging via Extrapolation", ICLR 2023
(arXiv:2301.09604), Algorithm 1. The server's step follows from the updates of the round alone:

    eta_g = max(1, sum_i p_i |Delta_i|^2 / (2 (|sum_i p_i Delta_i|^2 + epsilon)))

with p_i = 1 / M for M clients. It is 1 on identical clients, and grows as updates cancel.

Symbols: Delta_i update of client i, M clients that replied, eta_g server_lr (a metric), epsilon
epsilon.

Deviations:
- The paper reports the average of the last two iterates, for an extrapolated model swings; here the
  model itself is what is evaluated and kept.
- `weighted = true` takes p_i = n_i / n in both sums; the paper has 1 / M.
- Buffers (BatchNorm statistics) take the mean by the same weights, and are not extrapolated.
- A round without replies leaves the model alone; the paper has none.
"""

from typing import ClassVar, final

import torch
from torch import Tensor

from fedsim.aggregators.updates import Updates
from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, NoState, State, weighted_sum


def extrapolation(squares: Tensor, mean_square: float, weights: Tensor, epsilon: float) -> float:
    """Return eta_g, the server's step size for one round.

    Args:
        squares: float64 `[clients]`, |Delta_i|^2.
        mean_square: |sum_i p_i Delta_i|^2.
        weights: float64 `[clients]`, p_i up to a factor; their sum is > 0.
        epsilon: What keeps the step finite where updates cancel; > 0.

    Returns:
        At least 1.

    Source: Jhunjhunwala et al., ICLR 2023 (arXiv:2301.09604), equation of Algorithm 1.
    Deviations: weights; the paper's are equal.

    Example:
        >>> ones = torch.ones(2).double()  # two clients at right angles, one unit each
        >>> round(extrapolation(ones, 0.5, ones, epsilon=1e-9), 6)
        1.0
        >>> extrapolation(ones, 0.0, ones, epsilon=0.125)
        4.0
    """
    mean_of_squares = float(weights @ squares) / float(weights.sum())
    return max(1.0, mean_of_squares / (2 * (mean_square + epsilon)))


@final
class FedExP(FederatedStrategy):
    """Moves the model by eta_g times the mean update; eta_g is at least 1.

    Args:
        epsilon: What is added to the squared length of the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If `epsilon` is not positive and finite.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}, "identical clients"),
        Degenerate({"epsilon": 2.0**60, "weighted": True}, "fedavg", {}),
    )

    def __init__(self, *, epsilon: float = 1e-3, weighted: bool = False) -> None:
        require_positive("epsilon", epsilon)
        self._epsilon = epsilon
        self._weighted = weighted

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """Weigh buffers as updates."""
        if self._weighted:
            return replies.num_examples.double()
        return torch.ones(replies.num_clients, dtype=torch.float64)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + eta_g sum_i p_i Delta_i; the metric `server_lr` is eta_g."""
        weights = self.buffer_weights(state, replies)
        weight_sum = float(weights.sum())
        if not weight_sum:
            return params, state, {}
        assert replies.params is not None
        assert replies.reference is not None
        mean = weighted_sum(weights, replies.params, replies.reference) / weight_sum
        squares = Updates(replies.params, replies.reference).lengths() ** 2
        server_lr = extrapolation(squares, float(mean @ mean), weights, self._epsilon)
        moved = params.double() + server_lr * mean
        return moved.to(params.dtype), state, {"server_lr": server_lr}
