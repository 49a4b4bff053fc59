"""Federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017 (arXiv:1602.05629), Algorithm 1, server side; the server step size is that of Reddi et al.,
"Adaptive Federated Optimization", ICLR 2021 (arXiv:2003.00295), Algorithm 1.

Symbols: Delta_k update of client k, n_k num_examples, eta_g server_lr.

Deviations: none. With server_lr = 1 the result is the weighted mean of the clients' models.
"""

from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_positive
from fedsim.strategy import Degenerate, LinearStrategy, NoState, State


@final
class FedAvg(LinearStrategy):
    """Moves the model by the mean of the clients' updates.

    Args:
        server_lr: eta_g, the factor on the mean update; > 0.
        weighted: Whether clients count by their examples (the paper's n_k / n) or all the same.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}, "identical clients", 1e-12),
    )

    def __init__(self, *, server_lr: float = 1.0, weighted: bool = True) -> None:
        require_positive("server_lr", server_lr)
        self._server_lr = server_lr
        self._weighted = weighted

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """n_k, or 1."""
        return num_examples.double() if self._weighted else torch.ones(len(client_ids)).double()

    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return w + eta_g * sum_k (n_k / n) Delta_k; the model stays when nobody answered."""
        if not weight_sum:
            return params, state, {}
        moved = params.double() + self._server_lr * (weighted_sum / weight_sum)
        return moved.to(params.dtype), state, {}
