"""SCAFFOLD's control variates at a client.

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, "SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning", ICML 2020 (arXiv:1910.06378), Algorithm 1, lines 7 to 14: every local step is
y <- y - eta_l * (g_i(y) + c - c_i).

Symbols: c control (sent), c_i the client state, K the client's steps, x received, y params.

Deviations:
- Steps of unequal size: K * eta_l of option II is the sum of the round's step sizes.
- Option I takes the gradient at x over the samples that the client trains on in the round, which
  are all of its samples in an epoch; it costs a second gradient in every step.
- A client that takes no step, or none of any size, leaves its c_i as it is.
"""

from typing import ClassVar, Literal, final

import torch

from fedsim.basics.errors import require_choice
from fedsim.client.arithmetic import along
from fedsim.client.part import ClientPart, Here, Own, Trained, as_sent, sent_as
from fedsim.client.procedure import Named

CONTROL = "control"  # c on the way to clients, c_i+ - c_i on the way back
Option = Literal["I", "II"]


@final
class ControlVariate(ClientPart):
    """Corrects every gradient by c - c_i, and returns how much c_i changes.

    Args:
        option: How c_i is made anew: "I" is the gradient at the model received, "II" the mean
            gradient along the client's way.

    Raises:
        ValueError: If `option` is neither of the two.
    """

    takes = (CONTROL,)
    needs: ClassVar[tuple[str, ...]] = (CONTROL,)
    stacks = True

    def __init__(self, *, option: Option = "II") -> None:
        require_choice("option", option, Option)
        self._looks_there = option == "I"

    @property
    def strength(self) -> float | None:
        """0 with option II: the correction is constant in a round."""
        return None if self._looks_there else 0.0

    def initial_state(self, params: Named) -> Named:
        """Return c_i = 0."""
        return {name: torch.zeros_like(tensor) for name, tensor in params.items()}

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry c - c_i, and for option I the sum of gradients at x."""
        control = sent_as(CONTROL, sent)
        own: Own = {"correction": {n: control[n] - state[n] for n in received}}
        if self._looks_there:
            first = next(iter(received.values()))
            own["received"] = received
            own["sum"] = {n: torch.zeros_like(t) for n, t in received.items()}
            own["seen"] = torch.zeros((), dtype=first.dtype, device=first.device)
        return own

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        """Add c - c_i."""
        corrected = {n: g + own["correction"][n] for n, g in grads.items()}
        if not self._looks_there:
            return corrected, own
        there = here.gradient_at(own["received"])
        count = here.batch.weights.sum(-1)
        total = {n: t + along(count, there[n]) * there[n] for n, t in own["sum"].items()}
        return corrected, {**own, "sum": total, "seen": own["seen"] + count}

    def push(self, own: Own) -> Named:
        """Return c - c_i."""
        correction: Named = own["correction"]
        return correction

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Return c_i+ - c_i under "control", and c_i+ to keep."""
        none = trained.path == 0
        change: Named = {}
        for name, received in trained.received.items():
            if self._looks_there:
                gained = own["sum"][name] / own["seen"].clamp(min=1)
                change[name] = gained.sub_(state[name])
            else:
                # c_i+ - c_i = (x - y) / (K eta) - c, where c is the correction plus c_i; in place,
                # for fresh memory takes longer to get than to fill
                way = (received - trained.params[name]).div_(torch.where(none, 1, trained.path))
                change[name] = way.sub_(own["correction"][name] + state[name])
            change[name].masked_fill_(none, 0)
        kept = {name: state[name] + changed for name, changed in change.items()}
        return as_sent(CONTROL, change), kept
