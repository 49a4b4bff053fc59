"""How a client trains in a set-up exchange, such as FedLEx's exploration before round 1.

Interno, Olhofer, Jin and Hammer, "Federated Loss Exploration for Improved Convergence on Non-IID
Data", IJCNN 2024 (arXiv:2506.18640).

Symbols: E_exp epochs.

Deviations: a fixed number of epochs; the authors' code stops early by a patience.
"""

import math
from typing import final

from fedsim.client.part import ClientPart
from fedsim.client.procedure import Work


@final
class Exploration(ClientPart):
    """Gives a set-up exchange its own number of epochs and its own step size.

    Args:
        epochs: Passes over the client's samples in the exchange, >= 1; None as in a round.
        lr: Step size in the exchange, >= 0; None as in round 1.

    Raises:
        ValueError: If an argument is outside its range.
    """

    stacks = True

    def __init__(self, *, epochs: int | None = None, lr: float | None = None) -> None:
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs = {epochs!r}: must be >= 1")
        if lr is not None and not 0 <= lr < math.inf:
            raise ValueError(f"lr = {lr!r}: must be >= 0 and finite")
        self._epochs, self._lr = epochs, lr

    @property
    def strength(self) -> float:
        """0: steps are plain ones."""
        return 0.0

    def setup_work(self, work: Work) -> Work:
        """Return the work of E_exp epochs."""
        return work if self._epochs is None else work._replace(epochs=self._epochs, steps=None)

    def setup_step_size(self, step_size: float) -> float:
        """Return the exchange's step size."""
        return step_size if self._lr is None else self._lr
