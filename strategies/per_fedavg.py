"""Per-FedAvg: a shared model from which one step of adaptation leads far.

Fallah, Mokhtari and Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A
Model-Agnostic Meta-Learning Approach", NeurIPS 2020 (arXiv:2002.07948), Algorithm 1; the client
side is the part `meta_gradient`.

Symbols: alpha adaptation_lr.

Deviations: those of `meta_gradient`; clients are weighted as `weighted` says.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from fedsim.basics.errors import require_at_least, require_choice
from fedsim.strategy import AveragingStrategy, Degenerate

Hessian = Literal["none", "difference"]


@final
class PerFedAvg(AveragingStrategy):
    """Averages clients whose gradients look one step of adaptation ahead.

    Args:
        adaptation_lr: alpha, size of the adaptation step; >= 0, and 0 is averaging.
        hessian: Whether the Hessian's term is left out ("none"), or is a "difference" of gradients.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"adaptation_lr": 0.0}, "fedavg", {}, tolerance=1e-12),
    )
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "meta_gradient": {"adaptation_lr": "adaptation_lr", "hessian": "hessian"}
    }

    def __init__(
        self,
        *,
        adaptation_lr: float = 0.01,
        hessian: Hessian = "none",
        server_lr: float = 1.0,
        weighted: bool = True,
    ) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_at_least("adaptation_lr", adaptation_lr, 0)
        require_choice("hessian", hessian, Hessian)
        self._adaptation_lr, self._hessian = adaptation_lr, hessian
