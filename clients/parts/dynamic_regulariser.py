"""FedDyn's dynamic regulariser at a client.

Acar, Zhao, Matas Navarro, Mattina, Whatmough and Saligrama, "Federated Learning Based on Dynamic
Regularization", ICLR 2021 (arXiv:2111.04263), Algorithm 1: clients minimise
L_k(w) - <lambda_k, w> + alpha/2 * |w - w_t|^2, and lambda_k <- lambda_k - alpha * (w_k - w_t).

Symbols: alpha alpha, lambda_k the client state, the gradient of L_k at the client's last model.

Deviations: the minimum is looked for by the procedure's steps, as in the paper's experiments.
"""

from typing import final

import torch

from fedsim.basics.errors import require_at_least
from fedsim.client.part import ClientPart, Here, Own, Trained
from fedsim.client.procedure import Named


@final
class DynamicRegulariser(ClientPart):
    """Adds -<lambda_k, w> + alpha/2 * |w - w_received|^2 to the local objective.

    Args:
        alpha: Strength of the regulariser; >= 0, and 0 is plain training.

    Raises:
        ValueError: If `alpha` is negative or not finite.
    """

    stacks = True

    def __init__(self, *, alpha: float = 0.01) -> None:
        require_at_least("alpha", alpha, 0)
        self._alpha = alpha

    @property
    def strength(self) -> float:
        """alpha: the terms' gradient is alpha * w - (lambda_k + alpha * w_received)."""
        return self._alpha

    def initial_state(self, params: Named) -> Named:
        """Return lambda_k = 0."""
        return {name: torch.zeros_like(tensor) for name, tensor in params.items()}

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry -(lambda_k + alpha * w_received)."""
        if not self._alpha:
            return {}
        return {"push": {n: (state[n] + self._alpha * t).neg_() for n, t in received.items()}}

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        """Add alpha * (w - w_received) - lambda_k."""
        if not self._alpha:
            return grads, own
        push, params = own["push"], here.params
        return {n: g + (self._alpha * params[n] + push[n]) for n, g in grads.items()}, own

    def push(self, own: Own) -> Named:
        """Return -(lambda_k + alpha * w_received)."""
        pushed: Named = own.get("push", {})
        return pushed

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Keep lambda_k - alpha * (w_k - w_received)."""
        kept = {
            n: (trained.params[n] - t).mul_(-self._alpha).add_(state[n])
            for n, t in trained.received.items()
        }
        return {}, kept
