"""FedProx: averaging of clients that are held near the model received.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks",
MLSys 2020 (arXiv:1812.06127), Algorithm 2; the client side is the part `proximal`. Clients that
work in part only, the paper's systems heterogeneity, are `[devices]`.

Symbols: mu mu.

Deviations: clients are drawn and weighted as `[participation]` and `weighted` say; the paper draws
them by their examples and weighs them alike.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.basics.errors import require_at_least
from fedsim.strategy import AveragingStrategy, Degenerate


@final
class FedProx(AveragingStrategy):
    """Averages the updates of clients with the term mu/2 * |w - w_received|^2.

    Args:
        mu: Coefficient of the term; >= 0, and 0 is averaging.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"mu": 0.0}, "fedavg", {}),)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"proximal": {"mu": "mu"}}

    def __init__(self, *, mu: float = 0.1, server_lr: float = 1.0, weighted: bool = True) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_at_least("mu", mu, 0)
        self._mu = mu
