"""Real nodes: Flower's processes, described and started."""

from typing import TYPE_CHECKING

from fedsim.basics.faces import lazy

if TYPE_CHECKING:
    from fedsim.deployment.processes import Deployment

__all__ = ["Deployment"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Deployment": "fedsim.deployment.processes",
    },
)
