"""The mean of the updates, taken up by a server optimiser: what the FedOpt family shares."""

import abc
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.server_optimizers import ServerOptimizer
from fedsim.strategy.declarations import State
from fedsim.strategy.linear import LinearStrategy


class OptimizedMean(LinearStrategy, abc.ABC):
    """Moves the model by what an optimiser makes of the clients' mean update.

    A subclass has the hyperparameters and hands the optimiser over. The State is what the optimiser
    remembers. A round without replies leaves the model and that alone.

    Args:
        optimizer: The optimiser.
        weighted: Whether clients count by their examples or all the same.
    """

    own_optimizer: ClassVar[bool] = True

    def __init__(self, optimizer: ServerOptimizer, *, weighted: bool) -> None:
        self._optimizer = optimizer
        self._weighted = weighted

    def init(self, params: Tensor, clients: int) -> State:
        """What the optimiser remembers before the first update."""
        return self._optimizer.init(params)

    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """n_k, or 1."""
        return num_examples.double() if self._weighted else torch.ones(len(client_ids)).double()

    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x plus the optimiser's step for the mean update.

        The metrics `update_norm` and `step_norm` are the lengths of the mean update and of the
        step.
        """
        if not weight_sum:
            return params, self._optimizer.rest(state), {}
        mean = weighted_sum / weight_sum
        step, state = self._optimizer.step(state, mean)
        metrics = {
            "update_norm": float(torch.linalg.vector_norm(mean)),
            "step_norm": float(torch.linalg.vector_norm(step)),
        }
        return (params.double() + step).to(params.dtype), state, metrics
