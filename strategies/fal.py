"""FAL, federated adversarial learning: averaging of clients that train on samples moved to err.

Li, Song and Yang, "Federated Adversarial Learning: A Framework with Convergence Analysis", ICML
2023 (arXiv:2208.03635), Algorithm 1; the client side is the part `adversarial`.

Symbols: eta_global server_lr, rho radius, alpha step, S steps.

Deviations:
- The paper's server weighs clients alike, whose data are of equal size; `weighted` does so by
  their examples.
- Those of the part: the step's own batch is attacked, the adversary is PGD.
"""

from collections.abc import Mapping
from typing import ClassVar, final

from fedsim.basics.errors import require_at_least, require_choice, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.client.perturbation import Norm, require_box
from fedsim.strategy import AveragingStrategy, Degenerate


@final
class FAL(AveragingStrategy):
    """Averages the updates of clients that train adversarially, by PGD.

    FGSM, TRADES and the rest are keys of the part: `[client] parts = [{ name = "adversarial",
    loss = "trades" }]`, which takes from here what it does not say.

    Args:
        norm: Of the ball in which samples are moved, "inf" or "2".
        radius: rho, in the units of the raw features; >= 0, and 0 is averaging.
        step: alpha, the length of a step of PGD; > 0.
        steps: S, steps of PGD; >= 0, and 0 is averaging.
        random_start: Whether PGD begins anywhere in the ball, else at the sample.
        box: The least and the largest value that a raw feature may have, or None.
        server_lr: eta_global, the factor on the mean update; > 0.
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"radius": 0.0}, "fedavg", {}),
        Degenerate({"steps": 0}, "fedavg", {}),
    )
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "adversarial": {
            name: name for name in ("norm", "radius", "step", "steps", "random_start", "box")
        }
    }
    idle = (
        Idle(("norm", "step", "random_start", "box"), at("radius", 0)),
        Idle(("norm", "step", "random_start", "box"), at("steps", 0)),
    )

    def __init__(
        self,
        *,
        norm: Norm = "inf",
        radius: float = 0.1,
        step: float = 0.025,
        steps: int = 7,
        random_start: bool = True,
        box: tuple[float, float] | None = None,
        server_lr: float = 1.0,
        weighted: bool = True,
    ) -> None:
        super().__init__(server_lr=server_lr, weighted=weighted)
        require_choice("norm", norm, Norm)
        require_at_least("radius", radius, 0)
        require_positive("step", step)
        require_at_least("steps", steps, 0)
        require_box(box)
