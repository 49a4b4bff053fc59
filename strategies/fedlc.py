"""FedLC: averaging of clients whose logits are calibrated by their own label counts.

Zhang, Li, Li, Xu, Wu, Ding and Wu, "Federated Learning with Label Distribution Skew via Logits
Calibration", ICML 2022 (arXiv:2209.00189); the client side is the part `calibrated_logits`.

Symbols: tau tau.

Deviations: those of the part; clients are drawn and weighted as `[participation]` and `weighted`
say.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.basics.errors import require_at_least
from fedsim.strategy import AveragingStrategy, Degenerate


@final
class FedLC(AveragingStrategy):
    """Averages the updates of clients with a margin for every class, larger for rare ones.

    Args:
        tau: Strength of the margins; >= 0, and 0 is averaging.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"tau": 0.0}, "fedavg", {}),)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"calibrated_logits": {"tau": "tau"}}

    def __init__(self, *, tau: float = 0.5, server_lr: float = 1.0, weighted: bool = True) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_at_least("tau", tau, 0)
        self._tau = tau
