"""How far nodes are from each other, and what became of their tensors' variances."""

import contextlib
import functools
import math
from collections.abc import Collection, Mapping, Sequence, Set
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators import Recipe
from fedsim.federation.topology.mixing import Mixing, mixing_matrix, spectral_gap
from fedsim.strategy.gossip.state import GossipState, variances_of

if TYPE_CHECKING:
    import networkx as nx

GAP_NODES = 2000  # of larger graphs the spectral gap takes minutes


def spread(
    state: GossipState, mean: Tensor, parts: Mapping[str, slice], skipped: Collection[int]
) -> dict[str, float]:
    """Return the nodes' distance from their mean, and their matrices' variances against the start.

    Args:
        state: Every node.
        mean: The mean of their models, `[dim]`.
        parts: The tensors with two dimensions or more: where each lies in the flat vector.
        skipped: Nodes that do not count for the distance.
    """
    squares = [
        float((model.double() - mean).square().sum())
        for node, model in enumerate(state.models)
        if node not in skipped
    ]
    found = {"consensus_distance": math.sqrt(math.fsum(squares) / len(squares))}
    now = torch.stack([variances_of(model, [*parts.values()]) for model in state.models])
    for place, name in enumerate(parts):
        before = state.start_variances[:, place]
        if (before > 0).any():
            ratios = now[before > 0, place] / before[before > 0]
            found[f"variance_ratio/{name}"] = float(ratios.mean())
    return found


def beyond(
    recipe: Recipe, arrived: Mapping[int, Sequence[int]], attacking: Set[int],
    dishonest: Collection[int],
) -> int:  # fmt: skip
    """Return how many honest nodes heard more attackers than their rule bears.

    Args:
        recipe: The rule.
        arrived: Whose models each node online has received.
        attacking: Who attacks in this round.
        dishonest: Who attacks in some round.
    """
    count = 0
    for node, senders in arrived.items():
        attackers = len(attacking & set(senders))
        if node in dishonest or not attackers:
            continue
        with contextlib.suppress(ValueError):  # too few: it keeps its own model
            count += attackers > recipe.check(len(senders) + 1)
    return count


@functools.lru_cache(maxsize=8)
def gap_of(graph: "nx.Graph", mixing: Mixing, self_weight: float) -> float:
    """Return the spectral gap of the graph's mixing matrix."""
    matrix = mixing_matrix(graph, mixing=mixing, self_weight=self_weight)
    # both kinds are reversible, D W symmetric for a diagonal D, hence similar to this matrix, whose
    # eigenvalues are cheaper
    return spectral_gap(np.sqrt(matrix * matrix.T))
