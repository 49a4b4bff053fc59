"""APFL's personal model: a mixture of a private and the shared model.

Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning" (arXiv:2003.13461), Algorithm
1: the client's own model is v_bar = alpha * v + (1 - alpha) * w, and in every local step
v <- v - eta * alpha * grad f(v_bar), alpha <- [alpha - eta_alpha * <v - w, grad f(v_bar)>] in
[0, 1]. What is sent is w alone, which neither v nor alpha changes.

Symbols: v and alpha the client state, w params, eta lr, eta_alpha alpha_lr.

Deviations:
- v starts as the first model received; the paper starts all alike.
- Evaluated is the mixture with the model received for the evaluation, not with the client's last w.
- v takes plain steps, whatever the procedure's optimiser is.
- Mixed are parameters (the paper's listing); the authors' code mixes outputs.
"""

from typing import Literal, final

import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least, require_choice
from fedsim.basics.idle import Idle, at
from fedsim.client.arithmetic import along, inner_product
from fedsim.client.part import ClientPart, Here, Own, Trained, as_sent, sent_as
from fedsim.client.procedure import Named

Every = Literal["step", "round"]
Order = Literal["jacobi", "gauss_seidel"]
_ALPHA, _PRIVATE = "alpha", "v"  # what the client state calls them


@final
class PersonalMixture(ClientPart):
    """Trains a private model v and how much of it is mixed into the shared one.

    Args:
        alpha: alpha before a client first trains, in [0, 1]: 0 is the shared model, 1 the private.
        adaptive: Whether alpha is trained.
        alpha_every: Whether alpha moves in every "step", or in the first of a "round".
        alpha_lr: eta_alpha; None takes the step's size.
        alpha_ridge: Coefficient of a term alpha_ridge * alpha in alpha's gradient; >= 0.
        per_layer: Whether every tensor has an alpha of its own.
        order: Whether v and alpha see w as it was before the step ("jacobi", the paper) or after it
            ("gauss_seidel", the authors' code).
        lr: eta of v; None takes the step's size.

    Raises:
        ValueError: If an argument is outside its range.
    """

    stacks = True
    idle = (Idle(("alpha_every", "alpha_lr", "alpha_ridge"), at("adaptive", False)),)

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        adaptive: bool = True,
        alpha_every: Every = "step",
        alpha_lr: float | None = None,
        alpha_ridge: float = 0.0,
        per_layer: bool = False,
        order: Order = "jacobi",
        lr: float | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha = {alpha!r}: must be in [0, 1]")
        for name, value in (("alpha_lr", alpha_lr), ("lr", lr), ("alpha_ridge", alpha_ridge)):
            if value is not None:
                require_at_least(name, value, 0)
        require_choice("alpha_every", alpha_every, Every)
        require_choice("order", order, Order)
        self._alpha, self._adaptive, self._per_layer = alpha, adaptive, per_layer
        self._once = alpha_every == "round"
        self._alpha_lr, self._ridge, self._lr = alpha_lr, alpha_ridge, lr
        self._after = order == "gauss_seidel"

    def initial_state(self, params: Named) -> Named:
        """Return v = the model received, and alpha."""
        first = next(iter(params.values()))
        alpha = torch.full((), self._alpha, dtype=first.dtype, device=first.device)
        names = [f"{_ALPHA}.{n}" for n in params] if self._per_layer else [_ALPHA]
        private = {f"{_PRIVATE}.{n}": t.clone() for n, t in params.items()}
        return private | {n: alpha.clone() for n in names}

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry v, alpha and whether no step has been taken."""
        first = next(iter(received.values()))
        fresh = torch.ones((), dtype=first.dtype, device=first.device)
        private = sent_as(_PRIVATE, state)
        return {"v": private, "alpha": self._alphas(state, received), "fresh": fresh}

    def stepped(self, own: Own, here: Here, params: Named) -> Own:
        """Take a step of v, and of alpha."""
        shared = params if self._after else here.params
        private, alpha = own["v"], own["alpha"]
        grads = here.gradient_at(_mixture(private, shared, alpha))
        lr = here.step_size if self._lr is None else self._lr
        stepped = {n: v - along(lr, v) * along(alpha[n], v) * grads[n] for n, v in private.items()}
        if self._adaptive:
            alpha = self._moved(alpha, private, shared, grads, own["fresh"], here)
        return {"v": stepped, "alpha": alpha, "fresh": torch.zeros_like(own["fresh"])}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Keep v and alpha."""
        alpha, private = own["alpha"], as_sent(_PRIVATE, own["v"])
        if self._per_layer:
            return {}, private | as_sent(_ALPHA, alpha)
        return {}, private | {_ALPHA: next(iter(alpha.values()))}

    def own_model(self, params: Named, state: Named) -> Named:
        """Return alpha * v + (1 - alpha) * w."""
        return _mixture(sent_as(_PRIVATE, state), params, self._alphas(state, params))

    def measured(self, state: Named) -> Named:
        """Return alpha, of several layers its mean."""
        found = [t for n, t in state.items() if n == _ALPHA or n.startswith(f"{_ALPHA}.")]
        return {_ALPHA: torch.stack(found).mean(0)}

    def _alphas(self, state: Named, params: Named) -> Named:
        return {n: state[f"{_ALPHA}.{n}" if self._per_layer else _ALPHA] for n in params}

    def _moved(
        self, alpha: Named, private: Named, shared: Named, grads: Named, fresh: Tensor, here: Here
    ) -> Named:
        clients = here.batch.weights.shape[:-1]
        away = {n: v - shared[n] for n, v in private.items()}
        lr = here.step_size if self._alpha_lr is None else self._alpha_lr
        size = lr * fresh if self._once else lr
        if self._per_layer:
            slopes = {n: inner_product({n: away[n]}, {n: grads[n]}, clients) for n in away}
        else:
            slopes = dict.fromkeys(away, inner_product(away, grads, clients))
        return {n: (a - size * (slopes[n] + self._ridge * a)).clamp(0, 1) for n, a in alpha.items()}


def _mixture(private: Named, shared: Named, alpha: Named) -> Named:
    return {
        n: along(alpha[n], w) * private[n] + (1 - along(alpha[n], w)) * w for n, w in shared.items()
    }
