"""APFL: adaptive personalised federated learning.

Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning" (arXiv:2003.13461), Algorithm
1; the client side
is the part `personal_mixture`.

Symbols: alpha alpha.

Deviations: those of `personal_mixture`; clients are weighted as `weighted` says.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.strategy import AveragingStrategy, Degenerate


@final
class APFL(AveragingStrategy):
    """Averages the shared model; every client mixes it with a private one.

    Args:
        alpha: Share of the private model before a client first trains, in [0, 1].
        adaptive: Whether clients train alpha.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"alpha": 0.0, "adaptive": False}, "fedavg", {}),
        Degenerate({"alpha": 1.0, "adaptive": False}, "fedavg", {}),
    )
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "personal_mixture": {"alpha": "alpha", "adaptive": "adaptive"}
    }

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        adaptive: bool = True,
        server_lr: float = 1.0,
        weighted: bool = True,
    ) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha = {alpha!r}: must be in [0, 1]")
        self._alpha, self._adaptive = alpha, adaptive
