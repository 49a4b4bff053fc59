"""MOON's model-contrastive term: representations near the received model's, not the last local's.

Li, He and Song, "Model-Contrastive Federated Learning", CVPR 2021 (arXiv:2103.16257), equation 3:
clients minimise the task's loss plus mu * l_con, where
l_con = -log(exp(sim(z, z_glob) / tau) / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) / tau))),
the mean over the batch, with sim the cosine.

Symbols: mu mu, tau temperature, z what goes into the last layer, z_glob and z_prev that of the
model received and of the client's last local model, which is the client state.

Deviations:
- The paper adds a projection head to its models; here z is what goes into the last layer.
- Before a client has trained, its last local model is the first that it received: l_con is constant
  in its first round.
- All three models are evaluated as they train: normalising layers use the batch's statistics, and
  dropout has the same masks.
"""

from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from fedsim.basics.errors import require_at_least, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.client.bound import BoundObjective
from fedsim.client.part import ClientPart, Here, Own, Trained
from fedsim.client.procedure import Named, Objective


@final
class ModelContrastive(ClientPart):
    """Adds mu times the contrast between the received and the last local model's representations.

    Args:
        mu: Coefficient of the term; >= 0, and 0 is plain training.
        temperature: tau; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    stacks = True
    idle = (Idle(("temperature",), at("mu", 0.0)),)

    def __init__(self, *, mu: float = 1.0, temperature: float = 0.5) -> None:
        require_at_least("mu", mu, 0)
        require_positive("temperature", temperature)
        self._mu, self._temperature = mu, temperature

    @property
    def needs_representations(self) -> str | None:
        """The term compares them."""
        return f"mu = {self._mu}" if self._mu else None

    @property
    def strength(self) -> float | None:
        """0 where there is no term; else the change is not linear."""
        return None if self._mu else 0.0

    def initial_state(self, params: Named) -> Named:
        """Return the model received."""
        return dict(params) if self._mu else {}

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry the model received and the last local one."""
        return {"received": received, "previous": state} if self._mu else {}

    def look(self, here: Here, own: Own) -> Own:
        """See both models' representations."""
        if not self._mu:
            return own
        return {name: here.representations_at(params) for name, params in own.items()}

    def inner_penalty(self, own: Own) -> Objective | None:
        """Return mu times the contrast."""
        if not self._mu:
            return None
        return BoundObjective(partial(_term, self._mu, self._temperature), own)

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Keep the local model."""
        return {}, dict(trained.params) if self._mu else state


def contrast(inside: Tensor, received: Tensor, previous: Tensor, *, temperature: float) -> Tensor:
    """Return l_con of each sample, `[batch]`.

    Args:
        inside: z, `[batch, width]`.
        received: z_glob, likewise.
        previous: z_prev, likewise.
        temperature: tau; > 0.

    Source: Li, He and Song, CVPR 2021 (arXiv:2103.16257), equation 2.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]])
        >>> contrast(z, z, z, temperature=0.5)  # log 2
        tensor([0.6931])
    """
    alike = nn.functional.cosine_similarity
    return nn.functional.softplus(
        (alike(inside, previous, dim=-1) - alike(inside, received, dim=-1)) / temperature
    )


def _term(
    mu: float, temperature: float, seen: Named, inside: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    found = contrast(inside, seen["received"], seen["previous"], temperature=temperature)
    # `where` and not a product: padding may hold anything
    counted = torch.where(weights > 0, found, torch.zeros_like(found))
    return mu * counted.sum() / weights.sum().clamp(min=1)
