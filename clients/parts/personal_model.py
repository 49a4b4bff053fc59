"""Ditto's personal model: trained beside the shared one and held near it.

Li, Hu, Beirami and Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML
2021 (arXiv:2012.04221), Algorithm 1: v <- v - eta * (grad F(v) + lambda * (v - w_t)).

Symbols: v the client state, lambda strength, w_t received, eta lr.

Deviations: v takes a step wherever the shared model does, on the same samples; the paper lets both
train for their own number of steps. It starts as the first model received.
"""

from typing import final

from fedsim.basics.errors import require_at_least
from fedsim.client.arithmetic import along
from fedsim.client.part import ClientPart, Here, Own, Trained
from fedsim.client.procedure import Named


@final
class PersonalModel(ClientPart):
    """Trains a model v of the client's own with the term lambda/2 * |v - w_received|^2.

    Args:
        strength: lambda; >= 0, and 0 trains v alone.
        lr: eta of v; None takes the step's size.

    Raises:
        ValueError: If an argument is negative or not finite.
    """

    stacks = True

    def __init__(self, *, strength: float = 0.1, lr: float | None = None) -> None:
        require_at_least("strength", strength, 0)
        if lr is not None:
            require_at_least("lr", lr, 0)
        self._pull, self._lr = strength, lr

    @property
    def strength(self) -> float:
        """0: the shared model takes plain steps."""
        return 0.0

    @property
    def companion(self) -> tuple[float, float | None]:
        """lambda: the term's gradient is lambda * v - lambda * w_received."""
        return self._pull, self._lr

    def companion_of(self, own: Own) -> tuple[Named, Named]:
        """Return (v, -lambda * w_received)."""
        if not self._pull:
            return own["v"], {}
        return own["v"], {n: -self._pull * t for n, t in own["received"].items()}

    def accompanied(self, own: Own, companion: Named) -> Own:
        """Carry v after its steps."""
        return {**own, "v": companion}

    def initial_state(self, params: Named) -> Named:
        """Return v = the model received."""
        return {n: t.clone() for n, t in params.items()}

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry v and the model received."""
        return {"v": {n: state[n] for n in received}, "received": received}

    def stepped(self, own: Own, here: Here, params: Named) -> Own:
        """Take a step of v."""
        private, received = own["v"], own["received"]
        grads = here.gradient_at(private)
        if self._pull:
            grads = {n: g + self._pull * (private[n] - received[n]) for n, g in grads.items()}
        lr = here.step_size if self._lr is None else self._lr
        return {**own, "v": {n: v - along(lr, v) * grads[n] for n, v in private.items()}}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Keep v."""
        return {}, dict(own["v"])

    def own_model(self, params: Named, state: Named) -> Named:
        """Return v."""
        return {n: state[n] for n in params}
