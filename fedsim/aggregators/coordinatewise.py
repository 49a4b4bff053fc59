"""Rules that look at each coordinate by itself.

- Median and trimmed mean: Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed
  Learning: Towards Optimal Statistical Rates", ICML 2018 (arXiv:1803.01498), options I and II.
- MeaMed: Xie, Koyejo and Gupta, "Generalized Byzantine-tolerant SGD", 2018 (arXiv:1802.10116).
- Phocas: Xie, Koyejo and Gupta, "Phocas: dimensional Byzantine-resilient stochastic gradient
  descent", 2018 (arXiv:1805.09682).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.bounds import MAJORITY
from fedsim.aggregators.updates import Updates
from fedsim.basics.ties import EPSILON

_ROUNDING = 32 * EPSILON  # of a value in its distance from a centre


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
    return _by_column(updates, lambda columns: _middle(columns.ordered, lower))


def trimmed_mean_of(updates: Updates, num_byzantine: int) -> Tensor:
    """Return the trimmed mean, float64 `[dim]`."""
    MAJORITY.require(max(1, len(updates)), num_byzantine)
    return _by_column(updates, lambda columns: _inner_mean(columns.ordered, num_byzantine))


def meamed_of(updates: Updates, num_byzantine: int, *, lower: bool = False) -> Tensor:
    """Return MeaMed, float64 `[dim]`; `lower` as in `median_of`."""
    MAJORITY.require(max(1, len(updates)), num_byzantine)
    return around_median_of(updates, num_byzantine, lower=lower)


def phocas_of(updates: Updates, num_byzantine: int) -> Tensor:
    """Return Phocas, float64 `[dim]`."""
    MAJORITY.require(max(1, len(updates)), num_byzantine)

    def rule(columns: _Columns) -> Tensor:
        return _nearest_mean(columns, _inner_mean(columns.ordered, num_byzantine), num_byzantine)

    return _by_column(updates, rule)


def around_median_of(updates: Updates, left_out: int, *, lower: bool = False) -> Tensor:
    """Return the mean without the values furthest from the median, float64 `[dim]`."""
    return _by_column(
        updates, lambda columns: _nearest_mean(columns, _middle(columns.ordered, lower), left_out)
    )


class _Columns(NamedTuple):
    """Some columns, each a row `[columns, K]`.

    Attributes:
        ordered: Their values, ascending.
        sizes: What each is the sum of, with or without a sign: its rounding is of that size.
    """

    ordered: Tensor
    sizes: Tensor


def _by_column(updates: Updates, rule: Callable[[_Columns], Tensor]) -> Tensor:
    """Apply a rule, `[columns, K]` to float64 `[columns]`, to all columns."""
    found = torch.zeros(updates.dim, dtype=torch.float64, device=updates.rows.device)
    if len(updates):
        for span, block, sizes in updates.transposed():
            found[span] = rule(_ordered(block, sizes))
    return found


def _middle(values: Tensor, lower: bool) -> Tensor:
    count = values.shape[1]
    below = values[:, (count - 1) // 2].double()
    return below if lower else (below + values[:, count // 2].double()) / 2


def _inner_mean(values: Tensor, cut: int) -> Tensor:
    return values[:, cut : values.shape[1] - cut].double().mean(dim=1)


def _nearest_mean(columns: _Columns, centre: Tensor, left_out: int) -> Tensor:
    """The mean without the values furthest from a centre; those equally far share what is left."""
    values = columns.ordered
    first = torch.zeros(len(values), 1, dtype=torch.int64, device=values.device)
    last = first + values.shape[1] - 1
    for _ in range(left_out):
        below = centre - values.gather(1, first)[:, 0].double()
        above = values.gather(1, last)[:, 0].double() - centre
        lower_goes = (below > above).long()[:, None]
        first, last = first + lower_goes, last - (1 - lower_goes)
    kept = torch.arange(values.shape[1] - left_out, device=values.device)
    found = values.gather(1, first + kept).double().mean(dim=1)
    doubtful = _ends_in_a_tie(columns, centre, first, last)
    if doubtful.any():
        few = _Columns(values[doubtful], columns.sizes[doubtful])
        found[doubtful] = _shared_mean(few, centre[doubtful], len(kept))
    return found


def _ends_in_a_tie(columns: _Columns, centre: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Where the next value outside may be as near as the last one inside, bool `[columns]`."""
    most = columns.ordered.shape[1] - 1
    ends = torch.cat([first, last, first - 1, last + 1], dim=1)
    there = ends.clamp(0, most)
    apart = (columns.ordered.gather(1, there).double() - centre[:, None]).abs()
    apart[:, 2:].masked_fill_((ends != there)[:, 2:], torch.inf)
    slack = _ROUNDING * columns.sizes.gather(1, there).double().abs().sum(dim=1)
    return apart[:, 2:].amin(dim=1) <= apart[:, :2].amax(dim=1) + slack


def _shared_mean(columns: _Columns, centre: Tensor, kept: int) -> Tensor:
    """The mean of the nearest values, float64 `[columns]`, ties told from rounding."""
    values, sizes = columns.ordered.double(), columns.sizes.double().abs()
    apart = (values - centre[:, None]).abs()
    limit, place = apart.kthvalue(kept, dim=1, keepdim=True)
    slack = _ROUNDING * (sizes + sizes.gather(1, place))
    nearer = (apart < limit - slack).double()
    equal = (apart <= limit + slack).double() - nearer
    left = (kept - nearer.sum(dim=1, keepdim=True)) / equal.sum(dim=1, keepdim=True)
    return (values * (nearer + left * equal)).sum(dim=1) / kept


def _ordered(block: Tensor, sizes: Tensor) -> _Columns:
    """Its rows sorted; on a processor by NumPy, which sorts short rows ten times as fast."""
    if block.is_cuda or block.dtype not in (torch.float32, torch.float64):
        ordered, order = block.sort(dim=1)
        return _Columns(ordered, sizes.gather(1, order))
    if sizes is block:  # they need no order of their own
        ordered = torch.from_numpy(np.sort(block.numpy(), axis=1))
        return _Columns(ordered, ordered)
    order = torch.from_numpy(np.argsort(block.numpy(), axis=1))
    return _Columns(block.gather(1, order), sizes.gather(1, order))
