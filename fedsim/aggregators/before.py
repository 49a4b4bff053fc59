"""Changes of updates before a rule sees them; each returns updates again.

- Nearest-neighbour mixing: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot and Stephan, "Fixing by
  Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023 (arXiv:2302.01772).
- Bucketing: Karimireddy, He and Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via
  Bucketing", ICLR 2022 (arXiv:2006.09365).
- Clipping to a fixed length, and to one that the updates give: adaptive robust clipping, Allouah et
  al., "Adaptive Gradient Clipping for Robust Federated Learning", ICLR 2025 (arXiv:2405.14432).
"""

import math

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.ties import Distances
from fedsim.aggregators.updates import Updates
from fedsim.basics.ties import ranks, shares


def nearest_neighbour_mixing(updates: Updates, num_byzantine: int) -> Updates:
    """Replace each update by the mean of the n - f nearest to it, itself among them.

    Those equally far away share the places that are left for them.
    """
    count = len(updates) - num_byzantine
    distances = Distances.of(updates)
    distances.values.fill_diagonal_(-math.inf)  # nearest to itself, also among copies
    nearest = torch.from_numpy(shares(ranks([distances]), 0, count))
    return updates.mixed(nearest / count)


def bucketing(clients: int, size: int, draw: np.random.Generator) -> Tensor:
    """Return the shares of updates in the means of so many at a time, put together at random.

    The last bucket takes what is left. Who is with whom goes by the places of the clients.

    Returns:
        float64 `[buckets, clients]`.
    """
    order = torch.from_numpy(draw.permutation(clients))
    buckets = order.split(size)
    means = torch.zeros(len(buckets), clients, dtype=torch.float64)
    for row, members in zip(means, buckets, strict=True):
        row[members] = 1 / len(members)
    return means


def clipping(updates: Updates, norm: float | None) -> Updates:
    """Shorten updates to a length of at most `norm`; None takes the median of their lengths."""
    lengths = updates.lengths()
    return _shortened(updates, lengths, lengths.quantile(0.5) if norm is None else norm)


def adaptive_clipping(updates: Updates, num_byzantine: int) -> Updates:
    """Shorten the k = floor(2 f (n - f) / n) longest updates to the longest of the others."""
    lengths, count = updates.lengths(), len(updates)
    clipped = 2 * num_byzantine * (count - num_byzantine) // count
    return _shortened(updates, lengths, lengths.sort().values[count - clipped - 1])


def _shortened(updates: Updates, lengths: Tensor, norm: Tensor | float) -> Updates:
    factors = torch.where(lengths > norm, norm / lengths, 1.0)
    return updates.mixed(torch.diag(factors))
