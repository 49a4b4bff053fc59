"""FedNova: normalised averaging of clients that train unequally much.

Wang, Liu, Liang, Joshi and Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous
Federated Optimization", NeurIPS 2020 (arXiv:2007.07481), equation 10 with its tau_eff = sum_i p_i
tau_i; the client side is the part `step_count`.

Symbols: tau_i |a_i|_1 of client i, p_i its share of the round's examples, Delta_i its update.

Deviations: those of `step_count`; p_i are shares among those who answered.
"""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, NoState, State, weighted_sum
from fedsim.strategy.returned import returned_numbers

STEPS = "local_steps"


@final
class FedNova(FederatedStrategy):
    """Moves the model by the mean of the clients' updates per step, times the mean of their steps.

    Args:
        server_lr: Factor on the step; > 0.
        weighted: Whether clients count by their examples (the paper's p_i) or all the same.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

    linear: ClassVar[bool] = True
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {}, "identical clients", 1e-12),
    )
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"step_count": {}}
    returns: ClassVar[tuple[str, ...]] = (STEPS,)

    def __init__(self, *, server_lr: float = 1.0, weighted: bool = True) -> None:
        require_positive("server_lr", server_lr)
        self._server_lr = server_lr
        self._weighted = weighted

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """n_i, or 1."""
        examples = replies.num_examples.double()
        return examples if self._weighted else torch.ones_like(examples)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + eta_g * tau_eff * sum_i p_i Delta_i / tau_i.

        The metrics are the least and the largest tau_i of the round.
        """
        counts = self.buffer_weights(state, replies)
        steps = returned_numbers(replies, STEPS, "step_count")
        weights = normalised_weights(counts, steps)
        if not float(weights.sum()):
            return params, state, {}
        assert replies.params is not None
        step = weighted_sum(weights, replies.params, replies.reference) / float(counts.sum())
        moved = params.double() + self._server_lr * step
        metrics = {"local_steps_min": float(steps.min()), "local_steps_max": float(steps.max())}
        return moved.to(params.dtype), state, metrics


def normalised_weights(counts: Tensor, steps: Tensor) -> Tensor:
    """Return n_i * tau_eff / tau_i, float64 `[K]`; n_i itself where all took equally many steps.

    Args:
        counts: n_i, float64 `[K]`, what clients count for.
        steps: tau_i, float64 `[K]`; a client that took none counts for nothing.

    Source: Wang et al., NeurIPS 2020 (arXiv:2007.07481), equation 10.

    Example:
        >>> normalised_weights(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]))
        tensor([2.0000, 0.6667])
    """
    trained = steps > 0
    of_one = torch.where(trained, steps, 1) * counts.sum()
    return torch.where(trained, counts * ((counts * steps).sum() / of_one), 0)
