"""Clipping of clients' updates where the instruction asks for it. Needs torch alone.

Flower's privacy wrappers with clipping at the clients put a bound into the instruction's config and
rely on a mod of Flower's at the client. This is the mods' arithmetic for a chunk of clients.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018
(arXiv:1710.06963), flat clipping; the bit is that of Andrew et al., "Differentially Private
Learning with Adaptive Clipping", NeurIPS 2021 (arXiv:1905.03871).

Deviations from Flower's mods: lengths are summed in float64; an update that is not longer than the
bound stays bit for bit as it is; an update of length zero is not longer than the bound (the mods
divide by it); every reply carries the bit, also where the wrapper does not use it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from fedsim.client.job import ChunkJob, ChunkResult

CLIPPING_NORM = "clipping_norm"  # Flower's names
NORM_BIT = "norm_bit"


def bound_of(config: Mapping[str, object]) -> float | None:
    """Return the bound on an update's Euclidean norm that an instruction asks for, or None.

    Raises:
        ValueError: If it is not a positive, finite number.
    """
    bound = config.get(CLIPPING_NORM)
    if bound is None:
        return None
    if not isinstance(bound, int | float) or not 0 < bound < math.inf:
        raise ValueError(f"config {CLIPPING_NORM} = {bound!r}: must be > 0 and finite")
    return float(bound)


def clip(job: ChunkJob, result: ChunkResult) -> ChunkResult:
    """Return the members' results with updates no longer than the bound of the job.

    An update is the model handed back minus the model received, all its tensors together (buffers
    too). The metric `norm_bit` says whose was longer: 1.0 or 0.0.

    Args:
        job: The chunk; its `clipping_norm` is the bound.
        result: What its members return; `params` `[C, dim]` is changed in place.

    Raises:
        ValueError: If the model has a buffer of integers, which cannot be scaled.
    """
    assert job.clipping_norm is not None
    assert result.params is not None
    for name, stack in result.buffers.items():
        if not stack.is_floating_point():
            raise ValueError(
                f"{CLIPPING_NORM}: '{name}' holds integers, which cannot be clipped; use a model "
                "without them"
            )
    buffers = {name: stack.clone() for name, stack in result.buffers.items()}
    bits = torch.zeros(len(result.params), dtype=torch.float64)
    for row in range(len(result.params)):
        received = job.shared.params if job.personal.params is None else job.personal.params[row]
        assert received is not None
        returned = [(received, result.params[row])]
        for name, stack in buffers.items():
            mine = job.personal.buffers.get(name)
            before = job.shared.buffers[name] if mine is None else mine[row]
            returned.append((before, stack[row]))
        updates = [after - before for before, after in returned]
        squares = [update.double().square().sum() for update in updates]
        length = math.sqrt(math.fsum(map(float, squares)))
        if length > job.clipping_norm:
            bits[row] = 1
            for (before, after), update in zip(returned, updates, strict=True):
                after.copy_(before + update * (job.clipping_norm / length))
    return replace(result, buffers=buffers, metrics={**result.metrics, NORM_BIT: bits})
