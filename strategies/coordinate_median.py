"""Coordinate-wise median of the clients' updates.

Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018 (arXiv:1803.01498), Algorithm 1, option I.

Symbols: g_i gradient of client i, minus its update; eta server_lr.

Deviations: none of the rule's. Of an even number of values the median is the mean of the middle
two; the library released with the Flag Aggregator (arXiv:2302.05865) takes the lower one. Clients
may train for several steps, where the paper has one gradient.
"""

from typing import ClassVar, final

from torch import Tensor

from fedsim.aggregators import coordinate_median
from fedsim.aggregators.coordinatewise import median_of
from fedsim.aggregators.updates import Updates
from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, NoState, State

__all__ = ["CoordinateMedian", "coordinate_median"]


@final
class CoordinateMedian(FederatedStrategy):
    """Moves the model by the median of each coordinate of the clients' updates.

    Clients count equally.

    Args:
        server_lr: eta, the factor on the median; > 0.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}, "identical clients", 1e-12),
    )

    def __init__(self, *, server_lr: float = 1.0) -> None:
        require_positive("server_lr", server_lr)
        self._server_lr = server_lr

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return the model moved by the median; it stays when nobody answered."""
        if not replies.num_clients:
            return params, state, {}
        assert replies.params is not None
        median = median_of(Updates.of(replies.params, replies.reference)).to(params.dtype)
        return params + self._server_lr * median, state, {}
