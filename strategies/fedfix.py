"""FedFix: asynchronous averaging without a bias towards fast clients.

Fraboni, Vidal, Kameni and Lorenzi, "A General Theory for Federated Optimization with Asynchronous
and Heterogeneous Clients Updates", JMLR 24, 2023 (arXiv:2206.10189). FedFix itself is
`[clock] trigger = "window"`; the weights are right under every trigger.

A client that is part of an aggregation with probability q_i moves the model q_i d_i at a time, so
the optimum is that of sum_i p_i F_i if d_i is p_i / q_i. With naive weights, d_i = p_i, the
objective is sum_i q_i p_i F_i: that of the fast clients.

Symbols: Delta_i update of client i, d_i weights, p_i importance, q_i rates, eta_g server_lr, N all
clients registered.

Deviations:
- "estimated" is ours: q_i is counted while the run goes on.
- Without known rates everybody's is taken for 1, which a warning says.
"""

import logging
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_choice, require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, LinearStrategy, State

_log = logging.getLogger("fedsim")

Weights = Literal["known", "estimated", "naive"]
Importance = Literal["uniform", "samples"]


class Deliveries(NamedTuple):
    """What is known of the clients.

    Attributes:
        rates: float64 `[N]`, q: how often each is part of an aggregation; empty if nobody says.
        counts: int64 `[N]`, of how many aggregations each has been part.
        samples: float64 `[N]`, what each holds; 0 before its first reply.
        aggregations: How many there have been.
    """

    rates: Tensor
    counts: Tensor
    samples: Tensor
    aggregations: int


@final
class FedFix(LinearStrategy):
    """Weights each client by its importance over how often it is part of an aggregation.

    Args:
        weights: How often that is: "known", as the time law and the trigger have it; "estimated",
            as it has been so far; "naive", always.
        importance: p_i: "uniform", 1 / N; "samples", the client's share of all samples, where a
            client that has not answered yet counts as the mean of those that have.
        server_lr: eta_g, the factor on the step; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}),
        Degenerate({"importance": "samples"}, "fedavg", {}),
        Degenerate({"weights": "estimated"}, "average_all", {}),
        Degenerate({"weights": "naive"}, "average_all", {}),
    )

    def __init__(
        self,
        *,
        weights: Weights = "known",
        importance: Importance = "uniform",
        server_lr: float = 1.0,
    ) -> None:
        require_choice("weights", weights, Weights)
        require_choice("importance", importance, Importance)
        require_positive("server_lr", server_lr)
        self._weights, self._importance, self._server_lr = weights, importance, server_lr
        self._declared: np.ndarray | None = None

    def declare_rates(self, rates: np.ndarray) -> None:
        """Say how often each client is part of an aggregation, float64 `[N]`."""
        self._declared = rates

    def init(self, params: Tensor, clients: int) -> State:
        """Nobody has answered."""
        rates = torch.zeros(0, dtype=torch.float64)
        if self._weights == "known":
            known = self._declared
            if known is None:
                _log.warning(
                    'fedfix: weights = "known", and nobody says how often clients are part of an '
                    'aggregation, so all count the same; use weights = "estimated"'
                )
                known = np.ones(clients)
            rates = torch.tensor(known, dtype=torch.float64)
        none = torch.zeros(clients, dtype=torch.int64)
        return Deliveries(rates, none, none.double(), 0)

    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """d_i, times N where clients are equally important, else times all samples."""
        importance = torch.ones(len(client_ids), dtype=torch.float64)
        if self._importance == "samples":
            importance = num_examples.double()
        if self._weights == "naive":
            return importance
        known: Deliveries = state
        rates = known.rates
        if self._weights == "estimated":
            rates = (known.counts + 1).double() / (known.aggregations + 1)
        return importance / rates[client_ids]

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Enrol new clients and count their samples, then take the weighted sum and apply it."""
        state = _enrolled(state, replies.client_ids)
        samples = state.samples.clone()
        samples[replies.client_ids] = replies.num_examples.double()
        return super().server_update(state._replace(samples=samples), params, replies)

    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + eta_g sum_i d_i Delta_i; the model stays when nobody answered.

        The metric `effective_participation` is the sum of d_i over that of p_i: 1 on average.
        """
        if not weight_sum:
            return params, state, {}
        clients = len(state.samples)
        total = float(clients)
        if self._importance == "samples":
            known = state.samples[state.samples > 0]
            # all who are known count themselves; the others as the mean of these
            total = float(known.sum()) * (clients / len(known))
        moved = params.double() + self._server_lr * (weighted_sum / total)
        return moved.to(params.dtype), state, {"effective_participation": weight_sum / total}

    def observe(self, state: State, replies: Replies) -> State:
        """Count the aggregation."""
        counts = state.counts.clone()
        counts[replies.client_ids] += 1
        return state._replace(counts=counts, aggregations=state.aggregations + 1)


def _enrolled(state: Deliveries, client_ids: np.ndarray) -> Deliveries:
    """Append the clients that are new.

    Raises:
        ValueError: If their rates would have to be known.
    """
    new = int(client_ids.max(initial=-1)) + 1 - len(state.counts)
    if new <= 0:
        return state
    if len(state.rates):
        raise ValueError(
            f"client {int(client_ids.max())} joined after round 1, and how often it is part of an "
            'aggregation is not known; use fedfix with weights = "estimated"'
        )
    none = torch.zeros(new, dtype=torch.int64)
    return state._replace(
        counts=torch.cat([state.counts, none]), samples=torch.cat([state.samples, none.double()])
    )
