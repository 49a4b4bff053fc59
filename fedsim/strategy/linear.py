"""Linear rules: weights and one weighted sum in place of a `server_update`."""

import abc

import numpy as np
from torch import Tensor

from fedsim.aggregators.sums import weighted_sum
from fedsim.messages.replies import Replies
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.declarations import State


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
