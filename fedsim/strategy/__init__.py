"""What every strategy stands on: Flower's four calls around pure methods."""

from typing import TYPE_CHECKING

from fedsim.basics.faces import lazy

if TYPE_CHECKING:
    from fedsim.aggregators.sums import weighted_sum
    from fedsim.strategy.averaging import AveragingStrategy
    from fedsim.strategy.base import FederatedStrategy
    from fedsim.strategy.declarations import Degenerate, NoState, Setup, State
    from fedsim.strategy.linear import LinearStrategy

__all__ = [
    "AveragingStrategy",
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
        "AveragingStrategy": "fedsim.strategy.averaging",
        "Degenerate": "fedsim.strategy.declarations",
        "FederatedStrategy": "fedsim.strategy.base",
        "LinearStrategy": "fedsim.strategy.linear",
        "NoState": "fedsim.strategy.declarations",
        "Setup": "fedsim.strategy.declarations",
        "State": "fedsim.strategy.declarations",
        "weighted_sum": "fedsim.aggregators.sums",
    },
)
