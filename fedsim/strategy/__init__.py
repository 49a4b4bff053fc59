"""What every strategy stands on: Flower's four calls around pure methods."""

from typing import TYPE_CHECKING

from fedsim.basics.faces import lazy

if TYPE_CHECKING:
    from fedsim.strategy.base import (
        Degenerate,
        FederatedStrategy,
        LinearStrategy,
        NoState,
        Setup,
        State,
        weighted_sum,
    )

__all__ = [
    "Degenerate",
    "FederatedStrategy",
    "LinearStrategy",
    "NoState",
    "Setup",
    "State",
    "weighted_sum",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Degenerate": "fedsim.strategy.base",
        "FederatedStrategy": "fedsim.strategy.base",
        "LinearStrategy": "fedsim.strategy.base",
        "NoState": "fedsim.strategy.base",
        "Setup": "fedsim.strategy.base",
        "State": "fedsim.strategy.base",
        "weighted_sum": "fedsim.strategy.base",
    },
)
