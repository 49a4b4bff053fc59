"""Tensors that clients keep to themselves: what goes with them of what is sent and returned."""

import math
from collections.abc import Collection
from dataclasses import replace

import torch

from fedsim.client.job import ChunkResult
from fedsim.client.procedure import GUIDANCE, Named

PERSONAL = "personal."  # what comes before their names in a client's state


def told(result: ChunkResult, personal: Collection[str]) -> ChunkResult:
    """Return a result with a loss of nan for members whose personal tensors are not finite.

    Args:
        result: What came of a chunk.
        personal: Names of the tensors that clients keep to themselves.
    """
    if not personal:
        return result
    finite = torch.ones(len(result.num_examples), dtype=torch.bool)
    for name in personal:
        stack = result.state[PERSONAL + name]
        finite &= stack.isfinite().view(len(stack), math.prod(stack.shape[1:])).all(1)
    loss = torch.where(finite, result.metrics["loss"], torch.nan)
    return replace(result, metrics={**result.metrics, "loss": loss})


def beside(extra: Named, params: Named, personal: Collection[str]) -> Named:
    """Return what of a strategy's tensor per parameter goes with personal ones, unknown to it.

    A guidance lets their steps be; anything else, such as a control variate, is 0.
    """
    kinds = {name.partition(".")[0] for name in extra if name.partition(".")[2] in params}
    return {
        f"{kind}.{name}": torch.full_like(params[name], float(kind == GUIDANCE))
        for kind in sorted(kinds)
        for name in params
        if name in personal
    }
