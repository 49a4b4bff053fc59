"""Mean of unit updates: the control that explains the Flag Aggregator.

It is what that rule becomes when its subspace holds every update (Almasi, Mishra, Vamanan and Ravi,
"Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses using Convex
Optimization", ICLR 2024, arXiv:2302.05865, Algorithm 1 with m >= rank), and supplies most of its
robustness: a client's influence does not grow with the length of what it sends.

Symbols: g_i gradient of client i, minus its update; p clients that replied.

Deviations: none. `scale = "median"` is an extension.
"""

from typing import ClassVar, Literal, final, get_args

from torch import Tensor

from fedsim.aggregators import unit_mean
from fedsim.aggregators.geometric import unit_mean_of
from fedsim.aggregators.updates import Updates
from fedsim.basics.errors import require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, NoState, State

__all__ = ["UnitMean", "unit_mean"]

Scale = Literal["workers", "median"]


@final
class UnitMean(FederatedStrategy):
    """Moves the model by the mean of the clients' updates, each made one unit long.

    Clients count equally.

    Args:
        server_lr: Factor on the mean; > 0. With scale "workers" it is the longest possible step.
        scale: "workers" leaves the mean as it is, so that steps do not shrink near an optimum;
            "median" multiplies it by the median length of the updates, so that they do.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate(
            {"scale": "median"}, "fedavg", {"weighted": False}, "identical clients", 1e-12
        ),
    )  # fmt: skip

    def __init__(self, *, server_lr: float = 1.0, scale: Scale = "workers") -> None:
        require_positive("server_lr", server_lr)
        if scale not in get_args(Scale):
            raise ValueError(f"scale = {scale!r}: must be workers or median")
        self._server_lr = server_lr
        self._scale: Scale = scale

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return the model moved by the mean; it stays when nobody answered."""
        if not replies.num_clients:
            return params, state, {}
        assert replies.params is not None
        mean, lengths = unit_mean_of(Updates.of(replies.params, replies.reference))
        factor = float(lengths.quantile(0.5)) if self._scale == "median" else 1.0
        return params + self._server_lr * factor * mean.to(params.dtype), state, {}
