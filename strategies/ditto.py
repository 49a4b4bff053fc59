"""Ditto: fair and robust averaging, with a personal model beside it.

Li, Hu, Beirami and Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML
2021 (arXiv:2012.04221), Algorithm 1; the client side
is the part `personal_model`.

Symbols: lambda strength.

Deviations: those of `personal_model`; clients are weighted as `weighted` says.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.basics.errors import require_at_least
from fedsim.strategy import AveragingStrategy, Degenerate


@final
class Ditto(AveragingStrategy):
    """Averages the shared model; every client also trains one of its own, held near the shared one.

    Args:
        strength: lambda of the personal model's term; >= 0, and 0 trains it alone.
        server_lr: Factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"strength": 0.0}, "fedavg", {}),)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"personal_model": {"strength": "strength"}}

    def __init__(
        self,
        *,
        strength: float = 0.1,
        server_lr: float = 1.0,
        weighted: bool = True,
    ) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_at_least("strength", strength, 0)
        self._strength = strength
