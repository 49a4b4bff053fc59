"""Rules that look at each coordinate by itself.

- Median and trimmed mean: Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed
  Learning: Towards Optimal Statistical Rates", ICML 2018 (arXiv:1803.01498), options I and II.
- MeaMed: Xie, Koyejo and Gupta, "Generalized Byzantine-tolerant SGD", 2018 (arXiv:1802.10116).
- Phocas: Xie, Koyejo and Gupta, "Phocas: dimensional Byzantine-resilient stochastic gradient
  descent", 2018 (arXiv:1805.09682).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.bounds import MAJORITY
from fedsim.robust import Updates


def coordinate_median(updates: Tensor) -> Tensor:
    """Return the median of each coordinate; of an even number, the mean of the middle two.

    Args:
        updates: `[clients, dim]`; rows that are not finite are dropped.

    Returns:
        `[dim]`, in the dtype and on the device of `updates`; zero without rows.

    Example:
        >>> coordinate_median(torch.tensor([[0.0, 9.0], [1.0, 5.0], [4.0, 6.0], [9.0, 1.0]]))
        tensor([2.5000, 5.5000])
    """
    return median_of(Updates.of(updates)).to(updates.dtype)


def trimmed_mean(updates: Tensor, *, num_byzantine: int) -> Tensor:
    """Return each coordinate's mean without its f largest and f smallest values.

    Args:
        updates: `[clients, dim]`; rows that are not finite are dropped, and n counts the others.
        num_byzantine: f >= 0; n >= 2 f + 1.

    Returns:
        `[dim]`, in the dtype and on the device of `updates`; zero without rows.

    Raises:
        ValueError: If n rows are too few for f.

    Example:
        >>> trimmed_mean(torch.tensor([[0.0], [1.0], [3.0], [90.0]]), num_byzantine=1)
        tensor([2.])
    """
    return trimmed_mean_of(Updates.of(updates), num_byzantine).to(updates.dtype)


def meamed(updates: Tensor, *, num_byzantine: int) -> Tensor:
    """Return each coordinate's mean over the n - f values nearest its median.

    Args and errors as in `trimmed_mean`.

    Example:
        >>> meamed(torch.tensor([[0.0], [1.0], [2.0], [90.0]]), num_byzantine=1)
        tensor([1.])
    """
    return meamed_of(Updates.of(updates), num_byzantine).to(updates.dtype)


def phocas(updates: Tensor, *, num_byzantine: int) -> Tensor:
    """Return each coordinate's mean over the n - f values nearest its trimmed mean.

    Args and errors as in `trimmed_mean`.

    Example:
        >>> phocas(torch.tensor([[0.0], [1.0], [4.0], [90.0]]), num_byzantine=1)
        tensor([1.6667])
    """
    return phocas_of(Updates.of(updates), num_byzantine).to(updates.dtype)


def median_of(updates: Updates, *, lower: bool = False) -> Tensor:
    """Return the median, float64 `[dim]`; with `lower`, of an even number the smaller middle."""
    return _by_column(updates, lambda values: _middle(values, lower))


def trimmed_mean_of(updates: Updates, num_byzantine: int) -> Tensor:
    """Return the trimmed mean, float64 `[dim]`."""
    MAJORITY.require(max(1, len(updates)), num_byzantine)
    return _by_column(updates, lambda values: _inner_mean(values, num_byzantine))


def meamed_of(updates: Updates, num_byzantine: int, *, lower: bool = False) -> Tensor:
    """Return MeaMed, float64 `[dim]`; `lower` as in `median_of`."""
    MAJORITY.require(max(1, len(updates)), num_byzantine)
    return _by_column(
        updates, lambda values: _nearest_mean(values, _middle(values, lower), num_byzantine)
    )


def phocas_of(updates: Updates, num_byzantine: int) -> Tensor:
    """Return Phocas, float64 `[dim]`."""
    MAJORITY.require(max(1, len(updates)), num_byzantine)

    def rule(values: Tensor) -> Tensor:
        return _nearest_mean(values, _inner_mean(values, num_byzantine), num_byzantine)

    return _by_column(updates, rule)


def around_median_of(updates: Updates, left_out: int, *, lower: bool = False) -> Tensor:
    """Return the mean without the values furthest from the median, float64 `[dim]`."""
    return _by_column(
        updates, lambda values: _nearest_mean(values, _middle(values, lower), left_out)
    )


def _by_column(updates: Updates, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a rule on sorted values, `[columns, K]` to float64 `[columns]`, to all columns."""
    found = torch.zeros(updates.dim, dtype=torch.float64, device=updates.rows.device)
    if len(updates):
        for span, block in updates.transposed():
            found[span] = rule(_ordered(block))
    return found


def _middle(values: Tensor, lower: bool) -> Tensor:
    count = values.shape[1]
    below = values[:, (count - 1) // 2].double()
    return below if lower else (below + values[:, count // 2].double()) / 2


def _inner_mean(values: Tensor, cut: int) -> Tensor:
    return values[:, cut : values.shape[1] - cut].double().mean(dim=1)


def _nearest_mean(values: Tensor, centre: Tensor, left_out: int) -> Tensor:
    """The mean of sorted values without those furthest from a centre; of two, the larger goes."""
    first = torch.zeros(len(values), 1, dtype=torch.int64, device=values.device)
    last = first + values.shape[1] - 1
    for _ in range(left_out):
        below = centre - values.gather(1, first)[:, 0].double()
        above = values.gather(1, last)[:, 0].double() - centre
        lower_goes = (below > above).long()[:, None]
        first, last = first + lower_goes, last - (1 - lower_goes)
    kept = torch.arange(values.shape[1] - left_out, device=values.device)
    return values.gather(1, first + kept).double().mean(dim=1)


def _ordered(block: Tensor) -> Tensor:
    """Its rows sorted; on a processor by NumPy, which sorts short rows ten times as fast."""
    if block.is_cuda or block.dtype not in (torch.float32, torch.float64):
        return block.sort(dim=1).values
    return torch.from_numpy(np.sort(block.numpy(), axis=1))
