"""Every node between two rounds, and what a node has received."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from fedsim.aggregators.averaging import variance

if TYPE_CHECKING:
    pass


Protocol = Literal["synchronous", "buffered"]


Start = Literal["own", "shared"]


class GossipState(NamedTuple):
    """Every node, between two rounds.

    Attributes:
        tick: Rounds done.
        models: `[N, dim]`.
        buffers: By name `[N, ...]`; a node keeps its own, they are never averaged.
        start_variances: float64 `[N, matrices]`, of the tensors with two dimensions or more.
        trainings: int64 `[N]`, how often each node has trained.
        next_tick: int64 `[N]`, when each is due to train (buffered protocol).
        inbox: float64 `[N, dim + corrected + 1]`, summed over what each node has received since it
            last averaged: weight times (model, variances of the corrected tensors, 1). No rows in
            the synchronous protocol, where nothing waits.
        waiting: int64 `[N]`, how many models that are; likewise.
    """

    tick: int
    models: Tensor
    buffers: Mapping[str, Tensor]
    start_variances: Tensor
    trainings: Tensor
    next_tick: Tensor
    inbox: Tensor
    waiting: Tensor


class Mail(NamedTuple):
    """What a node averages with its own model.

    Attributes:
        mean: float64 `[dim]`, weighted mean of the received models.
        variances: float64 `[corrected]`, the same mean of their tensors' variances.
        self_weight: beta, what the own model weighs; the mail weighs the rest.
    """

    mean: Tensor
    variances: Tensor
    self_weight: float


def variances_of(model: Tensor, parts: Sequence[slice]) -> Tensor:
    """The variance of each part of a flat model, float64 `[parts]`."""
    return torch.tensor([float(variance(model[part])) for part in parts], dtype=torch.float64)
