"""Sharpness-aware steps: the gradient at the worst point near by, in the place of the one here.

Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021 (arXiv:2010.01412), Algorithm 1, at the clients: Qu, Li, Duan, Liu, Tang
and Lu, "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022
(arXiv:2206.02618), Algorithm 1, and Caldarola, Caputo and Ciccone, "Improving Generalization in
Federated Learning by Seeking Flat Minima", ECCV 2022 (arXiv:2203.11834).

Symbols: rho rho, g grads, w + rho * g / |g| worst.

Deviations:
- Both gradients are of the same batch and under the same dropout masks, and the loss that is told
  and the statistics of normalising layers are those at w.
- Weight decay and what other parts add to the gradient are taken at w.
"""

from typing import final

import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least
from fedsim.client.arithmetic import along, norm_of
from fedsim.client.bound import in_place_of
from fedsim.client.part import ClientPart, Own
from fedsim.client.procedure import Batch, Gradient, Named, Objective


@final
class SharpnessAware(ClientPart):
    """Takes every gradient at w + rho * g / |g|, g the gradient at w; each step costs two.

    Args:
        rho: How far away the other point is; >= 0, and 0 is plain training.

    Raises:
        ValueError: If `rho` is negative or not finite.
    """

    stacks = True

    def __init__(self, *, rho: float = 0.05) -> None:
        require_at_least("rho", rho, 0)
        self._rho = rho

    @property
    def strength(self) -> float | None:
        """0 where there is no other point; else the change is not linear."""
        return None if self._rho else 0.0

    def wrapped(self, gradient: Gradient, own: Own) -> Gradient:
        """Return the gradient at the other point."""
        return self._at_worst(gradient) if self._rho else gradient

    def _at_worst(self, gradient: Gradient) -> Gradient:
        def found(
            params: Named,
            buffers: Named,
            batch: Batch,
            objective: Objective | None = None,
            penalty: Objective | None = None,
            inner: Objective | None = None,
        ) -> tuple[Tensor, Named, Named]:
            loss, grads, after = gradient(params, buffers, batch, objective, penalty, inner)
            norm = norm_of(grads, loss.shape)
            # where there is no slope, w itself is the worst point
            scale = torch.where(norm > 0, self._rho / norm, 0.0)
            worst = {n: p + along(scale, p) * grads[n] for n, p in params.items()}
            return loss, gradient(worst, buffers, batch, objective, penalty, inner)[1], after

        return in_place_of(gradient, found)
