"""FedLD's margin penalty on the outputs.

Zeng et al., MICCAI 2024 (arXiv:2408.12300), Figure 1, and the authors' code; the term itself is
`fedsim.client.objectives.margin_penalty`.

Symbols: lambda coefficient.

Deviations: those of `margin_penalty`.
"""

from typing import final

from torch import Tensor

from fedsim.basics.errors import require_at_least, require_choice
from fedsim.basics.idle import Idle, at
from fedsim.client.objectives import Reduction, Space, margin_penalty
from fedsim.client.part import ClientPart, Own
from fedsim.client.procedure import Objective


@final
class Margin(ClientPart):
    """Adds lambda * log(1 + |A|^2) to the local objective, A the outputs of a batch.

    Args:
        coefficient: lambda; >= 0, and 0 is plain training. The paper's is 0.1.
        space: What the penalty sees: softmax "probability" or "logit" rows.
        reduction: One norm over the whole "batch", or the mean over each "sample".

    Raises:
        ValueError: If an argument is outside its range.
    """

    stacks = True
    idle = (Idle(("space", "reduction"), at("coefficient", 0.0)),)

    def __init__(
        self,
        *,
        coefficient: float = 0.1,
        space: Space = "probability",
        reduction: Reduction = "batch",
    ) -> None:
        require_at_least("coefficient", coefficient, 0)
        require_choice("space", space, Space)
        require_choice("reduction", reduction, Reduction)
        self._coefficient = coefficient
        self._space: Space = space
        self._reduction: Reduction = reduction

    @property
    def needs_classes(self) -> str | None:
        """The penalty compares the logits of classes."""
        return f"margin.coefficient = {self._coefficient}" if self._coefficient else None

    @property
    def strength(self) -> float | None:
        """0 where there is no penalty; else the change is not linear."""
        return None if self._coefficient else 0.0

    def penalty(self, own: Own) -> Objective | None:
        """Return lambda times FedLD's term."""
        return self._term if self._coefficient else None

    def _term(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return self._coefficient * margin_penalty(
            outputs, space=self._space, reduction=self._reduction, weights=weights
        )
