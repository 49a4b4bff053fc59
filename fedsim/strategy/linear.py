"""Linear rules: weights and one weighted sum in place of a `server_update`."""

import abc
import inspect
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.server_optimizers import ServerOptimizer
from fedsim.aggregators.sums import weighted_sum
from fedsim.messages.replies import Replies
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.declarations import State
from fedsim.strategy.session import CallSession

_ROUNDING = 1e-6  # of the largest entry; what two ways to the same step may differ by


class LinearStrategy(FederatedStrategy, abc.ABC):
    """A strategy that needs of the replies one weighted sum of updates and the weights' total.

    A server optimiser may take up the step that such a rule makes, as it would a gradient
    (`use_server_optimizer`).

    Attributes:
        own_optimizer: Whether the rule is a server optimiser itself, so that it takes no other.
    """

    own_optimizer: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    @abc.abstractmethod
    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """Return float64 `[K]`, the weight of each reply; they need not add up to anything."""

    @abc.abstractmethod
    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return (new model, new State, metrics).

        The step that is added to the model must not depend on the model, or no server optimiser can
        take it up.

        Args:
            state: The State.
            params: The model that was broadcast, `[dim]`; float64 zeros where an optimiser asks for
                the step alone.
            weighted_sum: float64 `[dim]`, the sum of weight times update; zero when nobody
                answered.
            weight_sum: The sum of the weights.
        """

    def observe(self, state: State, replies: Replies) -> State:
        """Return the State after learning who answered; called after `apply`."""
        return state

    def reply_weights(self, state: State, replies: Replies) -> Tensor:
        """Return float64 `[K]`, the weights, for a rule that looks at more than ids and examples.

        Such as the age of an update (`replies.staleness`). By default they are those of `weights`.
        """
        return self.weights(state, replies.client_ids, replies.num_examples)

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """Weigh buffers as updates, so that a reply counts in both or in neither."""
        return self.reply_weights(state, replies)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Take the weighted sum of the updates and apply it."""
        weights = self.reply_weights(state, replies)
        assert replies.params is not None
        assert replies.reference is not None
        total = weighted_sum(weights, replies.params, replies.reference)
        params, state, metrics = self.apply(state, params, total, float(weights.sum()))
        return params, self.observe(state, replies), metrics

    def use_server_optimizer(self, optimizer: ServerOptimizer) -> Self:
        """Let an optimiser take up the rule's step as the mean update, and return the strategy.

        The model moves by what the optimiser makes of the step that the rule would have taken, its
        `server_lr` in it. State, metrics, weights and set-up stay the rule's. In a round without a
        reply that has weight, the rule counts the round as ever, and model and moments stay.

        Args:
            optimizer: Such as `fedsim.aggregators.server_optimizers.ServerAdam(lr=0.1)`.

        Raises:
            ValueError: If the strategy is a server optimiser itself.
        """
        if reason := why_no_server_optimizer(type(self)):
            raise ValueError(f"{type(self).__name__} {reason}")
        self._server_optimizer = optimizer
        return self

    def _updated(
        self, session: CallSession, params: Tensor, replies: Replies
    ) -> tuple[Tensor, dict[str, float]]:
        optimizer, moments = self._server_optimizer, session.moments
        if optimizer is None or moments is None:
            return super()._updated(session, params, replies)
        state = session.state
        origin = torch.zeros_like(params, dtype=torch.float64)
        step, session.state, metrics = self.server_update(state, origin, replies)
        counted = self.reply_weights(state, replies)
        if not counted.any():
            session.moments = optimizer.rest(moments)
            return params, metrics
        if not moments.steps:
            self._check_step(state, params, replies, step)
        moved, session.moments = optimizer.step(moments, step)
        return (params.double() + moved).to(params.dtype), metrics

    def _check_step(self, state: State, params: Tensor, replies: Replies, step: Tensor) -> None:
        """Refuse a rule whose step is another one where the model is another one.

        Raises:
            ValueError: Naming the strategy.
        """
        here = params.double()
        after, _, _ = self.server_update(state, here, replies)
        size = max(float(each.abs().max()) for each in (here, step)) if len(step) else 0.0
        if not torch.allclose(after - here, step, rtol=_ROUNDING, atol=_ROUNDING * size):
            raise ValueError(
                f"{type(self).__name__}: the step of 'apply' depends on the model, so that no "
                "server optimiser can take it up; leave out [strategy.server]"
            )


def why_no_server_optimizer(factory: Any) -> str | None:
    """Say why what a factory makes takes no server optimiser, or return None.

    Args:
        factory: A class of strategies, or a function that makes one.

    Example:
        >>> why_no_server_optimizer(dict)
        'is no linear rule, whose step is one weighted sum of updates'
    """
    if not (inspect.isclass(factory) and issubclass(factory, LinearStrategy)):
        return "is no linear rule, whose step is one weighted sum of updates"
    if factory.own_optimizer:
        return "is a server optimiser itself"
    return None
