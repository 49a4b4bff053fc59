"""The mean of updates at the server, for algorithms whose own part is at the clients."""

import abc

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_positive
from fedsim.strategy.declarations import NoState, State
from fedsim.strategy.linear import LinearStrategy


class AveragingStrategy(LinearStrategy, abc.ABC):
    """Federated averaging at the server; what is special happens at the clients.

    McMahan et al., AISTATS 2017 (arXiv:1602.05629), Algorithm 1, with the server step size of Reddi
    et al., ICLR 2021 (arXiv:2003.00295), Algorithm 1.

    Args:
        server_lr: eta_g, the factor on the mean update; > 0.
        weighted: Whether clients count by their examples (n_k / n) or all the same.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

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
