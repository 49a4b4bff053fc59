"""FedRS: averaging of clients that hardly touch the classes which they do not hold.

Li and Zhan, "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID
Data", KDD 2021; the client side is the part `restricted_softmax`.

Symbols: alpha alpha.

Deviations: those of the part; clients are drawn and weighted as `[participation]` and `weighted`
say.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.strategy import AveragingStrategy, Degenerate


@final
class FedRS(AveragingStrategy):
    """Averages the updates of clients with a restricted softmax.

    Args:
        alpha: Factor on the logits of classes that a client does not hold, in [0, 1]; 1 is
            averaging.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"alpha": 1.0}, "fedavg", {}),)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"restricted_softmax": {"alpha": "alpha"}}

    def __init__(
        self, *, alpha: float = 0.5, server_lr: float = 1.0, weighted: bool = True
    ) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha = {alpha!r}: must be in [0, 1]")
        self._alpha = alpha
