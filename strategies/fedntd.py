"""FedNTD: averaging of clients that do not forget what the received model knows of other classes.

Lee, Jeong, Shin, Bae and Yun, "Preservation of the Global Knowledge by Not-True Distillation in
Federated Learning", NeurIPS 2022 (arXiv:2106.03097), Algorithm 1; the client side is the part
`not_true_distillation`.

Symbols: beta beta, tau tau.

Deviations: those of the part; clients are drawn and weighted as `[participation]` and `weighted`
say.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.basics.errors import require_at_least, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.strategy import AveragingStrategy, Degenerate


@final
class FedNTD(AveragingStrategy):
    """Averages the updates of clients that distil the received model's not-true classes.

    Args:
        beta: Coefficient of the distillation; >= 0, and 0 is averaging.
        tau: Temperature of the softmax; > 0.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("tau",), at("beta", 0.0)),)
    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"beta": 0.0}, "fedavg", {}),)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "not_true_distillation": {"beta": "beta", "tau": "tau"}
    }

    def __init__(
        self,
        *,
        beta: float = 1.0,
        tau: float = 1.0,
        server_lr: float = 1.0,
        weighted: bool = True,
    ) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_at_least("beta", beta, 0)
        require_positive("tau", tau)
        self._beta, self._tau = beta, tau
