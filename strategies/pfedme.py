"""pFedMe: personal models by Moreau envelopes.

Dinh, Tran and Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020
(arXiv:2006.08848), Algorithm 1, whose beta is the server step size; the client side
is the part `moreau_envelope`.

Symbols: lambda strength, K inner_steps, beta server_lr.

Deviations: those of `moreau_envelope`; clients are weighted as `weighted` says.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.basics.errors import require_positive
from fedsim.strategy import AveragingStrategy, Degenerate


@final
class PFedMe(AveragingStrategy):
    """Averages models that follow the Moreau envelopes of the clients' losses.

    Args:
        strength: lambda of the envelope; > 0.
        inner_steps: K, steps towards the personal model in every step; >= 1.
        inner_lr: Their size; > 0.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate(
            {"strength": 100.0, "inner_steps": 1, "inner_lr": 0.01}, "fedavg", {}, tolerance=1e-12
        ),
    )
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "moreau_envelope": {
            "strength": "strength",
            "inner_steps": "inner_steps",
            "inner_lr": "inner_lr",
        }
    }

    def __init__(
        self,
        *,
        strength: float = 15.0,
        inner_steps: int = 5,
        inner_lr: float = 0.01,
        server_lr: float = 1.0,
        weighted: bool = True,
    ) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_positive("strength", strength)
        require_positive("inner_lr", inner_lr)
        if inner_steps < 1:
            raise ValueError(f"inner_steps = {inner_steps!r}: must be >= 1")
        self._envelope = strength, inner_steps, inner_lr
