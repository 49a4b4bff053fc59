"""A table of what every client sent last, for rules that remember it: N x d numbers."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


class LatestUpdates(NamedTuple):
    """What clients sent last.

    Attributes:
        updates: `[N, dim]` in the model's dtype, y; zero before a client's first reply.
    """

    updates: Tensor


def nothing_sent(params: Tensor, clients: int) -> LatestUpdates:
    """Return the table before round 1, for a model `[dim]` and N clients."""
    return LatestUpdates(params.new_zeros((clients, len(params))))


def writable(memory: LatestUpdates, client_ids: np.ndarray) -> Tensor:
    """Return a copy of the table, with rows of zero for clients that are new."""
    new = int(client_ids.max(initial=-1)) + 1 - len(memory.updates)
    return pad(memory.updates, (0, 0, 0, new)) if new > 0 else torch.clone(memory.updates)
