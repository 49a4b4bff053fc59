"""Strategies of ours and of others, alike to the machinery around them.

Here alone is asked which of the two a strategy is.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeGuard

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.strategy.base import FederatedStrategy


class ForeignStrategy:
    """What the machinery tells and asks strategies of ours, for one that knows Flower's calls only.

    It listens to nothing, serves any federation and has one model for all.
    """

    setup_replies: None = None

    def check(self, clients: int, cohort: int) -> None:
        """Refuse no federation."""

    def declare_buffers(self, names: Sequence[str]) -> None:
        """Take no names of tensors."""

    def declare_seed(self, seed: int) -> None:
        """Take no seed; what it draws comes from the global generators."""

    def declare_setup_timeout(self, seconds: float | None) -> None:
        """Take no time: it holds no set-up exchange."""

    def declare_starts(self, starts: Callable[[int], Tensor]) -> None:
        """Take no initialisations."""

    def declare_byzantine(self, attackers: Callable[[int | None], Collection[int]]) -> None:
        """Take no attackers."""

    def declare_due(self, client_ids: np.ndarray) -> None:
        """Take nobody's names: replies come as they are."""

    def personal_records(self) -> Iterator[ArrayRecord]:
        """Yield no models of nodes."""
        yield from ()


def is_ours(strategy: object) -> TypeGuard[FederatedStrategy]:
    """Return whether a strategy is a `FederatedStrategy`, and not another one of Flower's kind."""
    return isinstance(strategy, FederatedStrategy)


def as_ours(strategy: Strategy) -> FederatedStrategy | ForeignStrategy:
    """Return what to tell and to ask what goes beyond Flower's calls: the strategy if it is ours.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> as_ours(FedAvg()).setup_replies is None
        True
    """
    return strategy if is_ours(strategy) else ForeignStrategy()
