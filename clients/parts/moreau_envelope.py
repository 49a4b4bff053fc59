"""pFedMe's local problem: the Moreau envelope of a client's loss.

Dinh, Tran and Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020
(arXiv:2006.08848), Algorithm 1: theta approximates argmin f(theta; batch) + lambda/2 |theta - w|^2,
and w <- w - eta * lambda * (w - theta).

Symbols: theta the client state, lambda strength, w params, K inner_steps, eta local_lr.

Deviations: theta is found by K plain steps from w in every step; the paper asks for an accuracy.
"""

from typing import final

from fedsim.basics.errors import require_positive
from fedsim.client.part import ClientPart, Here, Own, Trained
from fedsim.client.procedure import Named


@final
class MoreauEnvelope(ClientPart):
    """Replaces the gradient by lambda * (w - theta), and keeps theta as the client's own model.

    Args:
        strength: lambda; > 0. The paper's is 15.
        inner_steps: K, steps towards theta in every step; >= 1.
        inner_lr: Their size; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    stacks = True

    def __init__(
        self, *, strength: float = 15.0, inner_steps: int = 5, inner_lr: float = 0.01
    ) -> None:
        require_positive("strength", strength)
        require_positive("inner_lr", inner_lr)
        if inner_steps < 1:
            raise ValueError(f"inner_steps = {inner_steps!r}: must be >= 1")
        self._pull, self._steps, self._lr = strength, inner_steps, inner_lr

    def initial_state(self, params: Named) -> Named:
        """Return theta = the model received."""
        return {n: t.clone() for n, t in params.items()}

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry theta."""
        return {"theta": {n: state[n] for n in received}}

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        """Return lambda * (w - theta) after K steps from w to theta."""
        theta = here.params
        for step in range(self._steps):
            found = grads if step == 0 else here.gradient_at(theta)
            theta = {
                n: t - self._lr * (found[n] + self._pull * (t - here.params[n]))
                for n, t in theta.items()
            }
        towards = {n: self._pull * (p - theta[n]) for n, p in here.params.items()}
        return towards, {"theta": theta}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Keep theta."""
        return {}, dict(own["theta"])

    def own_model(self, params: Named, state: Named) -> Named:
        """Return theta."""
        return {n: state[n] for n in params}
