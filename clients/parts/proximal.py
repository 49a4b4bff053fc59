"""The proximal term of FedProx: local models are held near the one received.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks",
MLSys 2020 (arXiv:1812.06127), equation 2: clients minimise F_k(w) + mu/2 * |w - w_t|^2.

Symbols: mu mu, w_t received.

Deviations: none.
"""

from typing import final

from fedsim.basics.errors import require_at_least
from fedsim.client.part import ClientPart, Here, Own
from fedsim.client.procedure import Named


@final
class Proximal(ClientPart):
    """Adds mu/2 * |w - w_received|^2 to the local objective.

    Args:
        mu: Coefficient of the term; >= 0, and 0 is plain training.

    Raises:
        ValueError: If `mu` is negative or not finite.
    """

    stacks = True

    def __init__(self, *, mu: float = 0.1) -> None:
        require_at_least("mu", mu, 0)
        self._mu = mu

    @property
    def strength(self) -> float:
        """mu: the term's gradient is mu * w - mu * w_received."""
        return self._mu

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry the model received."""
        return {"received": received} if self._mu else {}

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        """Add mu * (w - w_received)."""
        if not self._mu:
            return grads, own
        params, received = here.params, own["received"]
        return {n: g + self._mu * (params[n] - received[n]) for n, g in grads.items()}, own

    def push(self, own: Own) -> Named:
        """Return -mu * w_received."""
        return {n: -self._mu * t for n, t in own["received"].items()} if self._mu else {}
