"""Linear rules: weights and one weighted sum in place of a `server_update`."""

import abc

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.sums import weighted_sum
from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.declarations import NoState, State


class LinearStrategy(FederatedStrategy, abc.ABC):
    """A strategy that needs of the replies one weighted sum of updates and the weights' total."""

    @abc.abstractmethod
    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """Return float64 `[K]`, the weight of each reply; they need not add up to anything."""

    @abc.abstractmethod
    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return (new model, new State, metrics).

        Args:
            state: The State.
            params: The model that was broadcast, `[dim]`.
            weighted_sum: float64 `[dim]`, the sum of weight times update; zero when nobody
                answered.
            weight_sum: The sum of the weights.
        """

    def observe(self, state: State, replies: Replies) -> State:
        """Return the State after learning who answered; called after `apply`."""
        return state

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """Weigh buffers as updates, so that a reply counts in both or in neither."""
        return self.weights(state, replies.client_ids, replies.num_examples)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Take the weighted sum of the updates and apply it."""
        weights = self.weights(state, replies.client_ids, replies.num_examples)
        assert replies.params is not None
        assert replies.reference is not None
        total = weighted_sum(weights, replies.params, replies.reference)
        params, state, metrics = self.apply(state, params, total, float(weights.sum()))
        return params, self.observe(state, replies), metrics


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
