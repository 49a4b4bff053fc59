"""FedRS's restricted softmax: classes that a client does not hold weigh less in its loss.

Li and Zhan, "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID
Data", KDD 2021, equation 5: the logits of a client's missing classes are multiplied by alpha.

Symbols: alpha alpha.

Deviations:
- The paper's last layer has no bias; here the whole logit is scaled.
- Which classes are missing is seen on the client's samples as they are, before an attack on them.
"""

from typing import ClassVar, final

import torch
from torch import Tensor

from fedsim.client.bound import BoundObjective
from fedsim.client.objectives import mean_cross_entropy
from fedsim.client.part import ClientPart, Own
from fedsim.client.procedure import CLASS_COUNTS, Named, Objective


@final
class RestrictedSoftmax(ClientPart):
    """Minimises the cross-entropy with the logits of missing classes times alpha.

    Args:
        alpha: The factor, in [0, 1]; 1 is plain training.

    Raises:
        ValueError: If `alpha` is outside of [0, 1].
    """

    knows: ClassVar[tuple[str, ...]] = (CLASS_COUNTS,)
    stacks = True

    def __init__(self, *, alpha: float = 0.5) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha = {alpha!r}: must be in [0, 1]")
        self._alpha = alpha

    @property
    def needs_classes(self) -> str | None:
        """The factor is one of classes."""
        return f"alpha = {self._alpha}" if self._alpha < 1 else None

    @property
    def strength(self) -> float | None:
        """0 where nothing is restricted; else the change is not linear."""
        return None if self._alpha < 1 else 0.0

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry the factor of each class."""
        if self._alpha == 1:
            return {}
        counts = sent[CLASS_COUNTS]
        missing = torch.full_like(counts, self._alpha)
        return {"factors": torch.where(counts > 0, torch.ones_like(counts), missing)}

    def objective(self, own: Own) -> Objective | None:
        """Return the restricted cross-entropy."""
        return BoundObjective(_restricted, own["factors"]) if self._alpha < 1 else None


def _restricted(factors: Tensor, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return mean_cross_entropy(outputs * factors, targets, weights)
