"""MOON: averaging of clients whose representations are held near the received model's.

Li, He and Song, "Model-Contrastive Federated Learning", CVPR 2021 (arXiv:2103.16257), Algorithm 1;
the client side is the part `model_contrastive`, which keeps every client's last local model.

Symbols: mu mu, tau temperature.

Deviations: those of the part; clients are drawn and weighted as `[participation]` and `weighted`
say.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.basics.errors import require_at_least, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.strategy import AveragingStrategy, Degenerate


@final
class MOON(AveragingStrategy):
    """Averages the updates of clients with a model-contrastive term.

    Args:
        mu: Coefficient of the term; >= 0, and 0 is averaging.
        temperature: tau; > 0.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("temperature",), at("mu", 0.0)),)
    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"mu": 0.0}, "fedavg", {}),)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "model_contrastive": {"mu": "mu", "temperature": "temperature"}
    }

    def __init__(
        self,
        *,
        mu: float = 1.0,
        temperature: float = 0.5,
        server_lr: float = 1.0,
        weighted: bool = True,
    ) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_at_least("mu", mu, 0)
        require_positive("temperature", temperature)
        self._mu, self._temperature = mu, temperature
