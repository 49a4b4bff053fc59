"""The one weighted sum, means of buffers and metrics: float64, client order, rounded once."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsim.messages.records import (
    NUM_EXAMPLES,
)
from fedsim.messages.replies import Replies

_COLUMNS = 2**16  # of a block of the weighted sum


def weighted_sum(weights: Tensor, rows: Tensor, reference: Tensor | None = None) -> Tensor:
    """Return sum_k weights[k] * (rows[k] - reference[k]) in float64, added in client order.

    The only weighted sum of the code base: float64 accumulation in a fixed order, one rounding
    later by the caller. It goes over the columns in blocks that stay in the processor's cache,
    which changes no bit.

    Args:
        weights: float64 `[K]`; a row whose weight is zero is not looked at.
        rows: `[K, dim]`.
        reference: `[dim]`, or `[K, dim]` when each client started from its own; None for zero.

    Returns:
        float64 `[dim]`.
    """
    dim = rows.shape[1]
    total = torch.zeros(dim, dtype=torch.float64, device=rows.device)
    counted = [(place, weight) for place, weight in enumerate(weights.tolist()) if weight]
    size = dim if rows.is_cuda else min(dim, _COLUMNS)  # a GPU has no use for small kernels
    many = max(1, _COLUMNS // max(1, size))  # rows whose difference is taken at once
    memory = torch.empty(many * size, dtype=torch.float64, device=rows.device)
    for first in range(0, dim, max(1, size)):
        span = slice(first, min(first + size, dim))
        part = total[span]
        shared = None if reference is None or reference.dim() > 1 else reference[span].double()
        for top in range(0, len(counted), many):
            places = [place for place, _ in counted[top : top + many]]
            block = _consecutive(rows, places)[:, span]
            apart = memory[: block.numel()].view(block.shape).copy_(block)
            if reference is not None:
                start = _consecutive(reference, places)[:, span] if shared is None else shared
                apart.sub_(start)
            for row, (_, weight) in zip(apart.unbind(0), counted[top:], strict=False):
                part.add_(row, alpha=weight)
    return total


def _consecutive(rows: Tensor, places: Sequence[int]) -> Tensor:
    """Return some rows, as a view where they follow one another."""
    if places[-1] - places[0] == len(places) - 1:
        return rows[places[0] : places[-1] + 1]
    return rows[list(places)]


def average_buffers(
    before: Mapping[str, Tensor], replies: Replies, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the buffers' weighted mean; integer ones take the largest value.

    Every buffer keeps its dtype. Without a reply that has weight, the buffers stay as they were.

    Args:
        before: The buffers of the round's model.
        replies: The admitted replies.
        weights: float64 `[K]`, at least 0; None takes the examples.
    """
    weights = replies.num_examples.double() if weights is None else weights
    return mean_buffers(replies.buffers, weights) or dict(before)


def mean_buffers(stacks: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Return the weighted mean of buffers `[K, ...]` by name; nothing if nobody has weight.

    Integer ones take the largest value. Every buffer keeps its dtype.
    """
    total = float(weights.sum())
    if not total:
        return {}
    after: dict[str, Tensor] = {}
    for name, stack in stacks.items():
        if stack.is_floating_point():
            zero = torch.zeros(stack[0].numel(), dtype=torch.float64)
            mean = weighted_sum(weights, stack.reshape(len(stack), -1), zero) / total
            after[name] = mean.reshape(stack.shape[1:]).to(stack.dtype)
        else:
            after[name] = stack.amax(dim=0)
    return after


def mean_metrics(replies: Replies) -> dict[str, int | float]:
    """Return the clients' metrics averaged by examples, and the examples in all.

    A metric that is nan is not defined on that client's samples: the mean is over the others, and
    nan when there are none.
    """
    weights = replies.num_examples.double()
    total = float(weights.sum())
    means: dict[str, int | float] = {NUM_EXAMPLES: int(replies.num_examples.sum())}
    for name, column in replies.metrics.items():
        undefined = column.isnan()
        if bool(undefined.any()):
            held = float(weights[~undefined].sum())
            summed = float((weights * column)[~undefined].sum())
            means[name] = summed / held if held else math.nan
            continue
        means[name] = float((weights * column).sum()) / total if total else 0.0
    return means
