"""Coordinate-wise median of the clients' updates.

Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018 (arXiv:1803.01498), Algorithm 1, option I.

Symbols: g_i gradient of client i, minus its update; eta server_lr.

Deviations: none of the rule's. Of an even number of values the median is the mean of the middle
two; the library released with the Flag Aggregator (arXiv:2302.05865) takes the lower one. Clients
may train for several steps, where the paper has one gradient.
"""

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from fedsim.cohort import Replies
from fedsim.robust import column_blocks, finite_rows
from fedsim.strategy import Degenerate, FederatedStrategy, NoState, State


def coordinate_median(updates: Tensor) -> Tensor:
    """Return the median of each coordinate.

    Args:
        updates: `[clients, dim]`; rows that are not finite are dropped.

    Returns:
        `[dim]`, in the dtype and on the device of `updates`; zero without rows.

    Example:
        >>> coordinate_median(torch.tensor([[0.0, 9.0], [1.0, 5.0], [4.0, 6.0], [9.0, 1.0]]))
        tensor([2.5000, 5.5000])
    """
    rows = finite_rows(updates)
    if not len(rows):
        return updates.new_zeros(updates.shape[1])
    lower, upper = (len(rows) - 1) // 2, len(rows) // 2
    medians = []
    for block in column_blocks(rows):
        ordered = block.sort(dim=0).values
        medians.append((ordered[lower].double() + ordered[upper].double()) / 2)
    return torch.cat(medians).to(updates.dtype)


@final
class CoordinateMedian(FederatedStrategy):
    """Moves the model by the median of each coordinate of the clients' updates.

    Clients count equally.

    Args:
        server_lr: eta, the factor on the median; > 0.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}, "identical clients", 1e-12),
    )

    def __init__(self, *, server_lr: float = 1.0) -> None:
        if not 0 < server_lr < math.inf:
            raise ValueError(f"server_lr = {server_lr!r}: must be > 0 and finite")
        self._server_lr = server_lr

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return the model moved by the median; it stays when nobody answered."""
        if not replies.num_clients:
            return params, state, {}
        return params + self._server_lr * coordinate_median(replies.update), state, {}
