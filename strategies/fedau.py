"""FedAU: averaging with weights that adapt to unknown participation.

Wang and Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated
Averaging", ICLR 2024 (arXiv:2306.03401), Algorithm 2, as the official code (IBM/fedau) has it. A
client that takes part with probability p should count 1/p times; 1/p is the mean interval between
its participations, so the mean of the intervals seen so far is its weight. An interval is cut at K
rounds, for the variance of long ones.

Symbols: omega_n weights, M_n intervals, S_n open, K cutoff, eta server_lr, N all clients.

Deviations:
- K is 50 by default, the second setting of the authors' code; the first is 100000, as good as none.
- A round without participants leaves the model alone and counts for the intervals, as the code does
  with torch 2.13.
- A reply that was lost or refused is none: its client did not take part.
- A client that joins late counts in N, and its first interval begins, in the round of its first
  reply.
- Buffers (BatchNorm statistics), which the authors' models lack, are averaged with weights
  omega_n / sum omega over the participants.
"""

from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, LinearStrategy, State


class Intervals(NamedTuple):
    """What is known of every client's participation.

    Attributes:
        weights: float64 `[N]`, omega: the mean of the closed intervals, 1 before the first.
        intervals: int64 `[N]`, M: how many are closed.
        open: int64 `[N]`, S: rounds since the last one was closed.
    """

    weights: Tensor
    intervals: Tensor
    open: Tensor


def no_history(clients: int) -> Intervals:
    """Return what is known of clients before their first round."""
    none = torch.zeros(clients, dtype=torch.int64)
    return Intervals(torch.ones(clients, dtype=torch.float64), none, none.clone())


def advance(known: Intervals, took_part: Tensor, *, cutoff: int | None) -> Intervals:
    """Count one round.

    Args:
        known: The intervals before the round.
        took_part: bool `[N]`.
        cutoff: K, the length at which an interval is closed without participation; None for never.
    """
    length = known.open + 1
    closed = took_part if cutoff is None else took_part | (length >= cutoff)
    # without a closed interval this is the length itself: the initial weight does not count
    mean = (known.intervals * known.weights + length) / (known.intervals + 1)
    return Intervals(
        weights=torch.where(closed, mean, known.weights),
        intervals=known.intervals + closed,
        open=torch.where(closed, 0, length),
    )


def participation_weights(participation: Tensor, *, cutoff: int | None = 50) -> Tensor:
    """Return the weights that FedAU uses, given who took part when.

    A round's weights come from the rounds before it alone, so they do not depend on who takes part
    in it.

    Args:
        participation: bool `[rounds, clients]`.
        cutoff: K, at least 1; None for no cutoff.

    Returns:
        float64 `[rounds, clients]`, each in [1, K]; of clients that are absent too.

    Raises:
        ValueError: If `cutoff` is below 1.

    Source: Wang and Ji, ICLR 2024 (arXiv:2306.03401), Algorithm 2.
    Deviations: none.

    Example:
        >>> took_part = torch.tensor([[False], [False], [True], [True], [False]])
        >>> participation_weights(took_part).flatten().tolist()
        [1.0, 1.0, 1.0, 3.0, 2.0]
    """
    if cutoff is not None and cutoff < 1:
        raise ValueError(f"cutoff = {cutoff!r}: must be >= 1, or None")
    known = no_history(participation.shape[1])
    used = torch.empty(participation.shape, dtype=torch.float64)
    for weights, took_part in zip(used, participation, strict=True):
        weights.copy_(known.weights)
        known = advance(known, took_part, cutoff=cutoff)
    return used


@final
class FedAU(LinearStrategy):
    """Weights each client by the mean interval between its participations.

    Args:
        cutoff: K, the number of rounds at which an interval is cut, at least 1; "none" cuts none.
            The weights are at most K.
        server_lr: eta, the factor on the step; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}),
        Degenerate({"cutoff": 1}, "average_all", {}),
    )

    def __init__(self, *, cutoff: int | Literal["none"] = 50, server_lr: float = 1.0) -> None:
        if cutoff != "none" and not (isinstance(cutoff, int) and cutoff >= 1):
            raise ValueError(f'cutoff = {cutoff!r}: must be an integer >= 1, or "none"')
        require_positive("server_lr", server_lr)
        self._cutoff = None if cutoff == "none" else cutoff
        self._server_lr = server_lr

    def init(self, params: Tensor, clients: int) -> State:
        """Nobody has taken part."""
        return no_history(clients)

    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """omega_n, as the rounds before this one left it."""
        weights: Tensor = _enrolled(state, client_ids).weights[client_ids]
        return weights

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Enrol new clients, then take the weighted sum and apply it."""
        return super().server_update(_enrolled(state, replies.client_ids), params, replies)

    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + (eta / N) sum_n omega_n Delta_n.

        The metric `effective_participation` is the sum of the weights used over N: 1 on average
        when they are the inverse rates.
        """
        clients = len(state.weights)
        if not clients:  # a deployment whose nodes are still to come
            return params, state, {}
        moved = params.double() + self._server_lr * (weighted_sum / clients)
        metrics = {
            "effective_participation": weight_sum / clients,
            "weight_mean": float(state.weights.mean()),
            "weight_max": float(state.weights.max()),
        }
        return moved.to(params.dtype), state, metrics

    def observe(self, state: State, replies: Replies) -> State:
        """Count the round for every client, present or not."""
        took_part = torch.zeros(len(state.weights), dtype=torch.bool)
        took_part[replies.client_ids] = True
        return advance(state, took_part, cutoff=self._cutoff)


def _enrolled(known: Intervals, client_ids: np.ndarray) -> Intervals:
    """Append the clients that are new."""
    new = int(client_ids.max(initial=-1)) + 1 - len(known.weights)
    if new <= 0:
        return known
    return Intervals(*map(torch.cat, zip(known, no_history(new), strict=True)))
