"""FedDyn: dynamic regularisation, whose fixed points are those of the global objective.

Acar, Zhao, Matas Navarro, Mattina, Whatmough and Saligrama, "Federated Learning Based on Dynamic
Regularization", ICLR 2021 (arXiv:2111.04263), Algorithm 1, server side; the client side is the part
`dynamic_regulariser`.

Symbols: h the server's state, alpha alpha, m clients, P who answered, Delta_k update of client k.

Deviations:
- The state is kept as -h / alpha, the sum over all rounds of sum_P Delta_k / m.
- alpha = 0, for which h / alpha is not defined, is averaging.
- A round without replies leaves the model alone. m counts a client that joins late from its first
  reply. Buffers are averaged over those who answered, each counting the same.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, State, weighted_sum


class Drift(NamedTuple):
    """The server's state.

    Attributes:
        drift: float64 `[dim]`, -h / alpha.
        clients: m.
    """

    drift: Tensor
    clients: int


@final
class FedDyn(FederatedStrategy):
    """Averages models of regularised clients, and adds the drift that the regulariser held back.

    Args:
        alpha: Strength of the clients' regulariser; >= 0, and 0 is averaging.

    Raises:
        ValueError: If `alpha` is negative or not finite.
    """

    linear: ClassVar[bool] = True
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"alpha": 0.0}, "fedavg", {"weighted": False}),
    )
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"dynamic_regulariser": {"alpha": "alpha"}}

    def __init__(self, *, alpha: float = 0.01) -> None:
        require_at_least("alpha", alpha, 0)
        self._alpha = alpha

    def init(self, params: Tensor, clients: int) -> State:
        """H = 0."""
        return Drift(torch.zeros(len(params), dtype=torch.float64), clients)

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """1 for everybody who answered."""
        return torch.ones(replies.num_clients, dtype=torch.float64)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return mean_P w_k - h / alpha, with h - alpha * sum_P Delta_k / m in place of h."""
        clients = max(state.clients, int(replies.client_ids.max(initial=-1)) + 1)
        if not replies.num_clients:
            return params, Drift(state.drift, clients), {}
        assert replies.params is not None
        everybody = torch.ones(replies.num_clients, dtype=torch.float64)
        total = weighted_sum(everybody, replies.params, replies.reference)
        mean = params.double() + total / replies.num_clients
        if not self._alpha:
            return mean.to(params.dtype), Drift(state.drift, clients), {}
        drift = state.drift + total / clients
        metrics = {"drift_norm": float(torch.linalg.vector_norm(drift))}
        return (mean + drift).to(params.dtype), Drift(drift, clients), metrics
