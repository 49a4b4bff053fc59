"""Per-FedAvg's local step: the gradient after one step of adaptation.

Fallah, Mokhtari and Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A
Model-Agnostic Meta-Learning Approach", NeurIPS 2020 (arXiv:2002.07948), equations 6 to 8: clients
minimise f(w - alpha * grad f(w)).

Symbols: alpha adaptation_lr, delta difference.

Deviations: both gradients, and both of the Hessian-free difference, are of one batch; the paper
draws independent ones.
"""

from typing import Literal, final

from fedsim.basics.errors import require_at_least, require_choice, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.client.part import ClientPart, Here, Own
from fedsim.client.procedure import Named

Hessian = Literal["none", "difference"]


@final
class MetaGradient(ClientPart):
    """Replaces the gradient by that of the loss after one step of adaptation.

    Args:
        adaptation_lr: alpha, size of the adaptation step; >= 0, and 0 is plain training.
        hessian: Whether the Hessian's term is left out ("none", the first-order form) or taken as a
            "difference" of two gradients (the Hessian-free form).
        difference: delta, how far apart along the gradient these two lie; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    stacks = True
    idle = (Idle(("difference",), at("hessian", "none")),)

    def __init__(
        self,
        *,
        adaptation_lr: float = 0.01,
        hessian: Hessian = "none",
        difference: float = 1e-3,
    ) -> None:
        require_at_least("adaptation_lr", adaptation_lr, 0)
        require_choice("hessian", hessian, Hessian)
        require_positive("difference", difference)
        self._alpha, self._delta = adaptation_lr, difference
        self._second = hessian == "difference"

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        """Return (I - alpha * H) g(w - alpha * g(w)), without H in first order."""
        if not self._alpha:
            return grads, own
        w, alpha, delta = here.params, self._alpha, self._delta
        adapted = here.gradient_at({n: p - alpha * grads[n] for n, p in w.items()})
        if not self._second:
            return adapted, own
        ahead = here.gradient_at({n: p + delta * adapted[n] for n, p in w.items()})
        behind = here.gradient_at({n: p - delta * adapted[n] for n, p in w.items()})
        along_hessian = {n: (ahead[n] - behind[n]) / (2 * delta) for n in w}
        return {n: a - alpha * along_hessian[n] for n, a in adapted.items()}, own
