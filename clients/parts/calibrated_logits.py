"""FedLC's calibrated logits: a margin for every class, larger for those that a client has few of.

Zhang, Li, Li, Xu, Wu, Ding and Wu, "Federated Learning with Label Distribution Skew via Logits
Calibration", ICML 2022 (arXiv:2209.00189), section 4: the logit of class c is less by
tau * n_c^(-1/4) in the client's loss.

Symbols: tau tau, n_c counts.

Deviations:
- The softmax runs over all classes as in the cross-entropy; the paper's sum leaves out the sample's
  own, and is then not bounded below.
- n_c of a class that the client does not hold is taken for 1e-8, so that its margin is 100 * tau.
- n_c are counted on the client's samples as they are, before an attack on them.
"""

from typing import ClassVar, final

from torch import Tensor

from fedsim.basics.errors import require_at_least
from fedsim.client.bound import BoundObjective
from fedsim.client.objectives import mean_cross_entropy
from fedsim.client.part import ClientPart, Own
from fedsim.client.procedure import CLASS_COUNTS, Named, Objective

_NONE = 1e-8  # the count of a class that is not there


@final
class CalibratedLogits(ClientPart):
    """Minimises the cross-entropy of logits less tau * n_c^(-1/4).

    Args:
        tau: Strength of the margins; >= 0, and 0 is plain training.

    Raises:
        ValueError: If `tau` is negative or not finite.
    """

    knows: ClassVar[tuple[str, ...]] = (CLASS_COUNTS,)
    stacks = True

    def __init__(self, *, tau: float = 0.5) -> None:
        require_at_least("tau", tau, 0)
        self._tau = tau

    @property
    def needs_classes(self) -> str | None:
        """Margins are those of classes."""
        return f"tau = {self._tau}" if self._tau else None

    @property
    def strength(self) -> float | None:
        """0 where there are no margins; else the change is not linear."""
        return None if self._tau else 0.0

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry the margins."""
        if not self._tau:
            return {}
        return {"margins": margins(sent[CLASS_COUNTS], self._tau)}

    def objective(self, own: Own) -> Objective | None:
        """Return the calibrated cross-entropy."""
        return BoundObjective(_calibrated, own["margins"]) if self._tau else None


def margins(counts: Tensor, tau: float) -> Tensor:
    """Return tau * n_c^(-1/4) for each class.

    Args:
        counts: n_c, `[..., classes]`.
        tau: Strength of the margins.

    Example:
        >>> import torch
        >>> margins(torch.tensor([1.0, 16.0, 0.0]), 0.5)
        tensor([ 0.5000,  0.2500, 50.0000])
    """
    return tau * counts.clamp(min=_NONE) ** -0.25


def _calibrated(less: Tensor, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return mean_cross_entropy(outputs - less, targets, weights)
