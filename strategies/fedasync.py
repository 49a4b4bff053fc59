"""FedAsync: the server's model mixed with each client's as it comes, late ones less.

Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019 (arXiv:1903.03934), Algorithm 1,
server side. The paper's setting is `[clock] trigger = "arrival"`.

Symbols: x_k a client's model, s_k its staleness, alpha mixing, K the replies of an aggregation.

Deviations:
- Where several replies are there at once (`count`, `window`, `all`), their mixtures are averaged:
  x + (1/K) sum_k alpha_k (x_k - x). One reply is the paper's case.
- The regularisation of local training is the part `proximal`.
"""

from typing import ClassVar, final

from torch import Tensor

from fedsim.aggregators.staleness import Discount, discount
from fedsim.basics.errors import require_at_least, require_choice, require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, NoState, State, weighted_sum


@final
class FedAsync(FederatedStrategy):
    """Moves the model a part of the way to the clients' models.

    A client's model counts as it is, with all that the server has learnt since it began left out;
    that is what the part of the way is for.

    Args:
        mixing: alpha, the part of the way to a model of age 0; in (0, 1].
        staleness: How alpha shrinks with the age: "polynomial", "hinge", or "constant".
        exponent: Of the polynomial; > 0.
        slope: Of the hinge; > 0.
        after: Of the hinge, the age up to which alpha is whole; at least 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"mixing": 1.0}, "fedavg", {"weighted": False}),
    )
    reads_staleness: ClassVar[bool] = True

    def __init__(
        self,
        *,
        mixing: float = 0.6,
        staleness: Discount = "polynomial",
        exponent: float = 0.5,
        slope: float = 10.0,
        after: int = 4,
    ) -> None:
        if not 0 < mixing <= 1:
            raise ValueError(f"mixing = {mixing!r}: must be in (0, 1]")
        require_choice("staleness", staleness, Discount)
        require_positive("exponent", exponent)
        require_positive("slope", slope)
        require_at_least("after", after, 0)
        self._mixing, self._staleness = mixing, staleness
        self._exponent, self._slope, self._after = exponent, slope, after

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def mixtures(self, staleness: Tensor) -> Tensor:
        """Return alpha_k of models of these ages, float64 `[K]`."""
        return self._mixing * discount(
            staleness, self._staleness, exponent=self._exponent, slope=self._slope,
            after=self._after,
        )  # fmt: skip

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """Weigh buffers as models."""
        return self.mixtures(replies.staleness)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + (1/K) sum_k alpha_k (x_k - x); the model stays when nobody answered."""
        if not replies.num_clients:
            return params, state, {}
        assert replies.params is not None
        alpha = self.mixtures(replies.staleness)
        moved = weighted_sum(alpha, replies.params, params) / replies.num_clients
        metrics = {"mixing": float(alpha.mean())}
        return (params.double() + moved).to(params.dtype), state, metrics
