"""The differences between a chunk's result and the expected one. Torch alone."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.basics.tensors import tensors_of
from fedsim.client.executor import CohortExecutor
from fedsim.client.job import ChunkResult

# by name: what changed, `[clients, ...]`, and the error that rounding makes
Changes = Mapping[str, tuple[Tensor, float]]


def changes(executor: CohortExecutor, result: ChunkResult) -> Changes:
    """Tensors of a result by name, with the error of rounding; of the model, their changes."""
    assert isinstance(result.params, Tensor)
    sent, layout = tensors_of(executor.model), executor.layout
    found: dict[str, tuple[Tensor, float]] = {}
    for name, now in (*layout.unflatten(result.params).items(), *result.buffers.items()):
        before = sent[name].detach().cpu()
        if now.is_floating_point():  # a difference is as exact as what is compared
            found[name] = now - before, 32 * torch.finfo(now.dtype).eps * largest(now)
        else:
            found[name] = now.double() - before.double(), 0.0
    others = {**result.extra, **result.state, **result.metrics}
    return found | {name: (tensor.double(), 0.0) for name, tensor in others.items()}


def rows(found: Changes, first: int, count: int) -> dict[str, tuple[Tensor, float]]:
    """Return what came back of some clients that stand beside each other."""
    return {n: (tensor[first : first + count], error) for n, (tensor, error) in found.items()}


def first_odd(
    found: Changes,
    expected: Changes,
    share: float,
) -> str | None:
    """Say what is not as expected, beyond a share of the largest change, or None."""
    if missing := [name for name in expected if name not in found]:
        return f"loses '{missing[0]}'"
    most = max((largest(tensor) for tensor, _ in expected.values()), default=0.0)
    for name, (tensor, error) in found.items():
        if name not in expected:
            return f"returns '{name}' besides"
        other = expected[name][0]
        if tensor.shape != other.shape:
            return f"returns '{name}' of shape {list(tensor.shape)} in place of {list(other.shape)}"
        gap = apart(tensor, other)
        if gap > share * largest(other) + share / 100 * most + error:
            return f"differs in '{name}' by {gap:.2g} where it changes by {largest(other):.2g}"
    return None


def largest(tensor: Tensor) -> float:
    """Return the largest size of an entry; infinity counts as the largest number, NaN as 0."""
    most = _most(tensor)
    return most if math.isfinite(most) else _most(torch.nan_to_num(tensor))


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two entries; infinity where one alone is NaN."""
    most = _most(one - other)
    if math.isfinite(most):
        return most
    if not torch.equal(one.isnan(), other.isnan()):
        return math.inf
    return largest(torch.nan_to_num(one) - torch.nan_to_num(other))


def _most(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    return max(abs(float(end)) for end in torch.aminmax(tensor))
