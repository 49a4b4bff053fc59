"""FedLEx's guidance: a factor between 0 and 1 on each coordinate's local step.

Interno, Olhofer, Jin and Hammer, "Federated Loss Exploration for Improved Convergence on Non-IID
Data", IJCNN 2024 (arXiv:2506.18640), the equations of its architecture figure. The strategy sends
the factors; where it sends none, nothing is guided.

Symbols: G guidance.

Deviations: "gradient" is where the authors' code has it.
"""

from typing import Literal, final

from fedsim.basics.errors import require_choice
from fedsim.client.part import ClientPart, Own, sent_as
from fedsim.client.procedure import GUIDANCE, Named

Place = Literal["step", "gradient"]


@final
class Guidance(ClientPart):
    """Multiplies local steps by the guidance G that the strategy sends.

    Args:
        acts_on: Where G acts: on the "step" (the figure) or on the "gradient" (the authors' code;
            Adam undoes it).

    Raises:
        ValueError: If `acts_on` is neither of the two.
    """

    takes = (GUIDANCE,)
    stacks = True

    def __init__(self, *, acts_on: Place = "step") -> None:
        require_choice("acts_on", acts_on, Place)
        self._acts_on: Place = acts_on

    @property
    def strength(self) -> float:
        """0: a descent takes the guidance by itself."""
        return 0.0

    @property
    def guides(self) -> Place:
        """Where G acts."""
        return self._acts_on

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        """Carry G, nothing where none was sent."""
        return {GUIDANCE: sent_as(GUIDANCE, sent)}

    def direction(self, grads: Named, own: Own) -> Named:
        """Multiply the gradients."""
        return self._guided(grads, own) if self._acts_on == "gradient" else grads

    def step(self, steps: Named, own: Own) -> Named:
        """Multiply the steps."""
        return self._guided(steps, own) if self._acts_on == "step" else steps

    def _guided(self, named: Named, own: Own) -> Named:
        factors = own[GUIDANCE]
        return {n: t * factors[n] for n, t in named.items()} if factors else named
