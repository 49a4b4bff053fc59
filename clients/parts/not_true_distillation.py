"""FedNTD's distillation of not-true classes: the received model's opinion of them is kept.

Lee, Jeong, Shin, Bae and Yun, "Preservation of the Global Knowledge by Not-True Distillation in
Federated Learning", NeurIPS 2022 (arXiv:2106.03097), equations 3 to 5: clients minimise the
cross-entropy plus beta * KL(q_received || q_local), with q the softmax over all classes but the
sample's own.

Symbols: beta beta, tau tau, q softmax of outputs / tau over the not-true classes.

Deviations:
- The received model is evaluated as it trains: normalising layers use the batch's statistics, and
  dropout has the same masks as the local model's.
- The divergence has no factor tau^2.
"""

from functools import partial
from typing import final

import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.client.bound import BoundObjective
from fedsim.client.part import ClientPart, Here, Own
from fedsim.client.procedure import Named, Objective


@final
class NotTrueDistillation(ClientPart):
    """Adds beta * KL(q_received || q_local) over the classes that a sample is not of.

    Args:
        beta: Coefficient of the term; >= 0, and 0 is plain training. The paper's is 1.
        tau: Temperature of the softmax; > 0. The paper's is 1.

    Raises:
        ValueError: If an argument is outside its range.
    """

    stacks = True
    idle = (Idle(("tau",), at("beta", 0.0)),)

    def __init__(self, *, beta: float = 1.0, tau: float = 1.0) -> None:
        require_at_least("beta", beta, 0)
        require_positive("tau", tau)
        self._beta, self._tau = beta, tau

    @property
    def needs_classes(self) -> str | None:
        """The term compares the logits of classes."""
        return f"beta = {self._beta}" if self._beta else None

    @property
    def strength(self) -> float | None:
        """0 where there is no term; else the change is not linear."""
        return None if self._beta else 0.0

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry the model received."""
        return {"received": received} if self._beta else {}

    def look(self, here: Here, own: Own) -> Own:
        """See the outputs of the model received."""
        return {"outputs": here.outputs_at(own["received"])} if self._beta else own

    def penalty(self, own: Own) -> Objective | None:
        """Return beta times the divergence."""
        if not self._beta:
            return None
        return BoundObjective(partial(_term, self._beta, self._tau), own["outputs"])


def not_true_divergence(
    kept: Tensor, outputs: Tensor, targets: Tensor, *, tau: float = 1.0
) -> Tensor:
    """Return KL(q_kept || q) of each sample over the classes that it is not of, `[batch]`.

    Args:
        kept: Outputs of the model whose opinion is kept, `[batch, classes]`.
        outputs: Outputs of the model that is trained, likewise.
        targets: The samples' classes, `[batch]`.
        tau: Temperature; > 0.

    Source: Lee et al., NeurIPS 2022 (arXiv:2106.03097), equations 3 and 4.

    Example:
        >>> kept, outputs = torch.tensor([[9.0, 1.0, 1.0]]), torch.tensor([[0.0, 2.0, 2.0]])
        >>> not_true_divergence(kept, outputs, torch.tensor([0]))  # alike but for the true class
        tensor([0.])
    """
    true = torch.arange(outputs.shape[-1], device=outputs.device) == targets.unsqueeze(-1)
    logs = [
        (each / tau).masked_fill(true, -torch.inf).log_softmax(dim=-1) for each in (kept, outputs)
    ]
    # 0 * (inf - inf) at the true class, which does not count
    terms = logs[0].exp() * (logs[0] - logs[1])
    return torch.where(true, torch.zeros_like(terms), terms).sum(-1)


def _term(
    beta: float, tau: float, kept: Tensor, outputs: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    divergences = not_true_divergence(kept, outputs, targets, tau=tau)
    # `where` and not a product: padding may hold anything
    counted = torch.where(weights > 0, divergences, torch.zeros_like(divergences))
    return beta * counted.sum() / weights.sum().clamp(min=1)
