"""Nearest neighbours, with the error of rounding: the ties of rules that go by distances.

A distance is known as well as the updates: each end may lie a few roundings of its length, times
the root of the dimension, from where it is. Scores that differ by less are equal, and go by the
score with a neighbour more, and so on until all others count; then by the smaller sum of entries.
Neither asks for the order of clients or of columns. What is equal by all of that (copies; updates
that a symmetry maps on each other) shares the places that it takes, or where one has to be chosen
the lowest client is.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.aggregators.updates import NEAR, Updates, rounding
from fedsim.basics.ties import Ints, Key, ranks


class Distances(NamedTuple):
    """Distances of updates, squared or not.

    Attributes:
        values: float64 `[n, n]`, infinite from each to itself.
        slack: How far rounding may have moved them, `[n, n]`.
    """

    values: Tensor
    slack: Tensor

    @classmethod
    def of(cls, updates: Updates, *, squared: bool = True) -> "Distances":
        """Return the distances of updates."""
        gram = updates.gram()
        squares = updates.squared_distances(gram)
        sizes = gram.diagonal().sqrt() if updates.mix is None else updates.sizes()
        reach = rounding(updates.dim) * (sizes[:, None] + sizes)
        ends = sizes.square()[:, None] + sizes.square()
        of_ends = reach * (2 * squares.sqrt() + reach)  # (d + reach)^2 - d^2
        of_products = rounding(updates.dim) * ends
        slack = torch.where(squares > NEAR * ends, torch.maximum(of_products, of_ends), of_ends)
        if not squared:
            slack = (squares + slack).sqrt() - squares.sqrt()
            squares = squares.sqrt()
        return cls(squares.fill_diagonal_(math.inf), slack)

    def among(self, left: Tensor) -> "Distances":
        """Return those of some of the updates."""
        return Distances(self.values[left][:, left], self.slack[left][:, left])

    def nearest(self, count: int) -> Key:
        """Return the sum of each update's `count` smallest, `[n]`, and its slack."""
        found, order = self.values.sort(dim=1)
        slack = self.slack.gather(1, order[:, :count])
        return found[:, :count].sum(dim=1), slack.sum(dim=1)


def by_score(
    distances: Distances,
    neighbours: int,
    sums: Callable[[], tuple[Tensor, Tensor]],
    left: Tensor | None = None,
) -> Ints:
    """Return the rank of each update by the sum of its smallest distances to others.

    Args:
        distances: Of the updates.
        neighbours: How many distances make a score; at most those there are.
        sums: Returns the sums of the updates' entries, `[n]`, and their slack.
        left: Which updates are ranked, among themselves; None is all.
    """
    here = torch.arange(len(distances.values)) if left is None else left
    among = distances if left is None else distances.among(left)
    others = len(here) - 1

    def keys() -> Iterator[Key]:
        yield from map(among.nearest, range(max(0, min(neighbours, others)), others + 1))
        values, slack = sums()
        yield values[here], slack[here]

    return ranks(keys())


def entries(updates: Updates) -> tuple[Tensor, Tensor]:
    """Return the sums of the updates' entries, `[n]`, and how far rounding may have moved them."""
    return updates.sums(), rounding(updates.dim) * math.sqrt(updates.dim) * updates.sizes()
