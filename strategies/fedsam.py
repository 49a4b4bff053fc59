"""FedSAM: averaging of clients that look for flat minima.

Qu, Li, Duan, Liu, Tang and Lu, "Generalized Federated Learning via Sharpness Aware Minimization",
ICML 2022 (arXiv:2206.02618), Algorithm 1; the client side is the part `sharpness_aware`.

Symbols: rho rho.

Deviations: those of the part; clients are drawn and weighted as `[participation]` and `weighted`
say.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.basics.errors import require_at_least
from fedsim.strategy import AveragingStrategy, Degenerate


@final
class FedSAM(AveragingStrategy):
    """Averages the updates of clients whose gradients are those of the worst point near by.

    Args:
        rho: How far away that point is; >= 0, and 0 is averaging.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"rho": 0.0}, "fedavg", {}),)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"sharpness_aware": {"rho": "rho"}}

    def __init__(self, *, rho: float = 0.05, server_lr: float = 1.0, weighted: bool = True) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_at_least("rho", rho, 0)
        self._rho = rho
