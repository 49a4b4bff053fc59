"""APFL's personal model: a mixture of a private and the shared model.

Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning" (arXiv:2003.13461), Algorithm
1: the client's own model is v_bar = alpha * v + (1 - alpha) * w, and in every local step
v <- v - eta * alpha * grad f(v_bar), alpha <- [alpha - eta_alpha * <v - w, grad f(v_bar)>] in
[0, 1]. What is sent is w alone, which neither v nor alpha changes. Where outputs are mixed, f_bar =
alpha * f(v) + (1 - alpha) * f(w), the steps follow the loss at f_bar: that of v its gradient by v,
that of alpha the inner product of f(v) - f(w) and the loss's slope by the outputs.

Symbols: v and alpha the client state, w params, eta lr, eta_alpha alpha_lr.

Deviations:
- v starts as the first model received; the paper starts all alike.
- Evaluated is the mixture with the model received for the evaluation, not with the client's last w.
- v takes plain steps, whatever the procedure's optimiser is.
- alpha is trained on the samples of the step (the paper) or on samples that are held out for it.
- Mixed are parameters (the paper's listing) or outputs (the authors' code). For alpha's slope that
  code takes an inner product of models; here it is the derivative.
"""

from typing import Literal, final

import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least, require_choice
from fedsim.basics.idle import Idle, at
from fedsim.client.arithmetic import along, inner_product
from fedsim.client.bound import BoundObjective
from fedsim.client.mixtures import outputs_mixed
from fedsim.client.part import ClientPart, Here, Own, Trained, as_sent, sent_as
from fedsim.client.procedure import Batch, Named

Every = Literal["step", "round"]
Order = Literal["jacobi", "gauss_seidel"]
Mix = Literal["params", "outputs"]
_ALPHA, _PRIVATE = "alpha", "v"  # what the client state calls them
_OUTPUTS = "outputs"


@final
class PersonalMixture(ClientPart):
    """Trains a private model v and how much of it is mixed into the shared one.

    Args:
        alpha: alpha before a client first trains, in [0, 1]: 0 is the shared model, 1 the private.
        adaptive: Whether alpha is trained.
        alpha_every: Whether alpha moves in every "step", or in the first of a "round".
        alpha_lr: eta_alpha; None takes the step's size.
        alpha_held_out: Share of a client's training samples on which alpha alone is trained, in
            [0, 1); rounded down, and at least two samples or none: alpha then stays. 0 trains it on
            the samples of the step, as v is, which draws it towards v where samples are few.
        alpha_ridge: Coefficient of a term alpha_ridge * alpha in alpha's gradient; >= 0.
        per_layer: Whether every tensor has an alpha of its own; of mixed parameters alone.
        mix: Whether "params" are mixed or "outputs", which is the same for linear models.
        order: Whether v and alpha see w as it was before the step ("jacobi", the paper) or after it
            ("gauss_seidel", the authors' code).
        lr: eta of v; None takes the step's size.

    Raises:
        ValueError: If an argument is outside its range, or outputs are to be mixed by layer.
    """

    stacks = True
    idle = (
        Idle(("alpha_every", "alpha_lr", "alpha_held_out", "alpha_ridge"), at("adaptive", False)),
    )

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        adaptive: bool = True,
        alpha_every: Every = "step",
        alpha_lr: float | None = None,
        alpha_held_out: float = 0.0,
        alpha_ridge: float = 0.0,
        per_layer: bool = False,
        mix: Mix = "params",
        order: Order = "jacobi",
        lr: float | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha = {alpha!r}: must be in [0, 1]")
        if not 0 <= alpha_held_out < 1:
            raise ValueError(f"alpha_held_out = {alpha_held_out!r}: must be in [0, 1)")
        for name, value in (("alpha_lr", alpha_lr), ("lr", lr), ("alpha_ridge", alpha_ridge)):
            if value is not None:
                require_at_least(name, value, 0)
        require_choice("alpha_every", alpha_every, Every)
        require_choice("order", order, Order)
        require_choice("mix", mix, Mix)
        if per_layer and mix == "outputs":
            raise ValueError('per_layer = True with mix = "outputs": outputs have one alpha')
        self._alpha, self._adaptive, self._per_layer = alpha, adaptive, per_layer
        self._once = alpha_every == "round"
        self._alpha_lr, self._ridge, self._lr = alpha_lr, alpha_ridge, lr
        self._after, self._outputs = order == "gauss_seidel", mix == "outputs"
        self._held_out = alpha_held_out if adaptive else 0.0
        self._unmixed = not adaptive and alpha in (0, 1)

    @property
    def holds_out(self) -> float:
        """What alpha alone is trained on."""
        return self._held_out

    @property
    def strength(self) -> float | None:
        """0 where alpha stays at 0 or 1: nothing is mixed, and all steps are plain ones."""
        return 0.0 if self._unmixed else None

    @property
    def companion(self) -> tuple[float, float | None] | None:
        """V where it is alone, alpha = 1; at 0 it never moves."""
        return (0.0, self._lr) if self._unmixed and self._alpha else None

    def companion_of(self, own: Own) -> tuple[Named, Named]:
        """Return v."""
        return own["v"], {}

    def accompanied(self, own: Own, companion: Named) -> Own:
        """Carry v after its steps."""
        return {**own, "v": companion}

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
        away, slope = self._at_mixture(private, shared, alpha, here)
        grads = self._by_private(slope, private, here)
        lr = here.step_size if self._lr is None else self._lr
        stepped = {n: v - along(lr, v) * along(alpha[n], v) * grads[n] for n, v in private.items()}
        if self._held_out:
            assert isinstance(here.batch.held_out, Batch)
            apart = here._replace(batch=here.batch.held_out)
            away, slope = self._at_mixture(private, shared, alpha, apart)
        if self._adaptive:
            alpha = self._moved(alpha, away, slope, own["fresh"], here)
        return {"v": stepped, "alpha": alpha, "fresh": torch.zeros_like(own["fresh"])}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Keep v and alpha."""
        alpha, private = own["alpha"], as_sent(_PRIVATE, own["v"])
        if self._per_layer:
            return {}, private | as_sent(_ALPHA, alpha)
        return {}, private | {_ALPHA: next(iter(alpha.values()))}

    def own_model(self, params: Named, state: Named) -> Named:
        """Return alpha * v + (1 - alpha) * w, of parameters or of outputs."""
        private, alpha = sent_as(_PRIVATE, state), self._alphas(state, params)
        if self._outputs:
            return outputs_mixed(next(iter(alpha.values())), private, params)
        return _mixture(private, params, alpha)

    def measured(self, state: Named) -> Named:
        """Return alpha, of several layers its mean."""
        found = [t for n, t in state.items() if n == _ALPHA or n.startswith(f"{_ALPHA}.")]
        return {_ALPHA: torch.stack(found).mean(0)}

    def _alphas(self, state: Named, params: Named) -> Named:
        if not self._adaptive:  # a round's config may set another one
            first = next(iter(params.values()))
            alpha = torch.full((), self._alpha, dtype=first.dtype, device=first.device)
            return dict.fromkeys(params, alpha)
        return {n: state[f"{_ALPHA}.{n}" if self._per_layer else _ALPHA] for n in params}

    def _at_mixture(
        self, private: Named, shared: Named, alpha: Named, here: Here
    ) -> tuple[Named, Named]:
        """Return (what alpha moves the mixture along, the loss's slope there), by name.

        That is v - w and the gradient, or, of mixed outputs, f(v) - f(w) and the slope by outputs.
        """
        if not self._outputs:
            grads = here.gradient_at(_mixture(private, shared, alpha))
            return {n: v - shared[n] for n, v in private.items()}, grads
        mine, theirs = here.outputs_at(private), here.outputs_at(shared)
        share = along(next(iter(alpha.values())), mine)
        slope = here.gradient.by_outputs(share * mine + (1 - share) * theirs, here.batch)
        return {_OUTPUTS: mine - theirs}, {_OUTPUTS: slope}

    def _by_private(self, slope: Named, private: Named, here: Here) -> Named:
        """Return the mixture's gradient by v, over alpha."""
        if not self._outputs:
            return slope
        towards = BoundObjective(_with_slope, slope[_OUTPUTS])
        return here.gradient(private, here.buffers, here.batch, objective=towards)[1]

    def _moved(self, alpha: Named, away: Named, slope: Named, fresh: Tensor, here: Here) -> Named:
        clients = here.batch.weights.shape[:-1]
        lr = here.step_size if self._alpha_lr is None else self._alpha_lr
        size = lr * fresh if self._once else lr
        if self._per_layer:
            slopes = {n: inner_product({n: away[n]}, {n: slope[n]}, clients) for n in away}
        else:
            slopes = dict.fromkeys(alpha, inner_product(away, slope, clients))
        return {n: (a - size * (slopes[n] + self._ridge * a)).clamp(0, 1) for n, a in alpha.items()}


def _with_slope(slope: Tensor, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """A function of the outputs whose slope by them is the one given."""
    each = (outputs * slope).reshape(len(weights), -1).sum(-1)
    # a padding sample's outputs may be anything
    return torch.where(weights > 0, each, 0).sum()


def _mixture(private: Named, shared: Named, alpha: Named) -> Named:
    return {
        n: along(alpha[n], w) * private[n] + (1 - along(alpha[n], w)) * w for n, w in shared.items()
    }
