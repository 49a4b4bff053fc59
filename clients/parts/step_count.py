"""FedNova's measure of how much a client trained: the norm of its gradients' coefficients.

Wang, Liu, Liang, Joshi and Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous
Federated Optimization", NeurIPS 2020 (arXiv:2007.07481), section 3: a client's update is
-eta * sum_k a_k g_k, and |a|_1 is the number of its steps, more with momentum.

Symbols: tau steps, rho momentum, a the coefficients.

Deviations: weight decay and linear parts (a proximal term) do not count; under Adam, whose steps
are no sum of gradients, the number of steps is returned. Steps count alike where a schedule makes
them unequally long within a round.
"""

from typing import final

from fedsim.client.part import ClientPart, Own, Trained
from fedsim.client.procedure import Named

STEPS = "local_steps"  # |a|_1 on its way to the server


@final
class StepCount(ClientPart):
    """Returns |a|_1: the number of a client's steps, or with momentum what they add up to."""

    stacks = True

    @property
    def strength(self) -> float:
        """0: steps are plain ones."""
        return 0.0

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        """Return (tau - rho * (1 - rho^tau) / (1 - rho)) / (1 - rho)."""
        steps, rho = trained.steps, trained.momentum
        if rho:
            steps = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
        return {STEPS: steps}, state
