"""FedAdam: the server takes the mean update as Adam takes a gradient.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar and McMahan, "Adaptive Federated
Optimization", ICLR 2021 (arXiv:2003.00295), Algorithm 2.

Symbols: Delta mean update, m and v moments, eta server_lr, beta_1 beta1, beta_2 beta2, tau tau, n_k
num_examples.

Deviations:
- Clients count by their examples, as in the paper's experiments; its algorithm has the uniform mean
  (`weighted = false`).
- v begins at tau^2, the least that the paper allows; `v_init = "zero"` begins at 0.
- Buffers (BatchNorm statistics) take the plain weighted mean: no gradient leads to them.
- A round without replies leaves model and moments alone; the paper has none.
- Kingma and Ba's bias correction, which the paper leaves out, is a switch (`bias_correction`).
- `flower_compat` computes what Flower 1.42 does (v begins at 0, a bias correction with t + 1 for t,
  rounds without replies counted, weights n_k), in float64; not that Flower's optimiser moves
  BatchNorm statistics and counters as well.
"""

from typing import ClassVar, final

from fedsim.aggregators.server_optimizers import BiasCorrection, FirstMoment, ServerAdam
from fedsim.basics.errors import require_positive
from fedsim.basics.idle import Idle, at
from fedsim.strategy import Degenerate
from fedsim.strategy.optimized import OptimizedMean


@final
class FedAdam(OptimizedMean):
    """Moves the model by eta m / (sqrt(v) + tau) with v = beta_2 v + (1 - beta_2) Delta^2.

    Args:
        server_lr: eta; > 0.
        beta1: Share of the momentum kept; in [0, 1).
        beta2: Share of the second moment kept; in [0, 1).
        tau: Degree of adaptivity, what is added to the square root of v; > 0. Where it is far above
            the updates, the rule is FedAvg's with a step of server_lr / tau.
        v_init: What v begins at: "tau2" (the paper's tau^2) or "zero".
        bias_correction: "none" (the paper) or "adam": eta times
            sqrt(1 - beta2^t) / (1 - beta1^t) in the t-th round with replies.
        weighted: Whether clients count by their examples or all the same.
        flower_compat: Whether to compute what Flower's FedAdam does: v begins at 0, eta is
            corrected with the round's number plus 1 for t, and clients count by their examples.

    Raises:
        ValueError: If an argument is outside its range.
    """

    # powers of two: beside such a tau, v is nothing, and what is left is Delta times 1
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate(
            {"server_lr": 2.0**60, "beta1": 0.0, "tau": 2.0**60, "v_init": "zero"}, "fedavg", {}
        ),
    )
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("v_init", "bias_correction", "weighted"), at("flower_compat", True)),
    )

    def __init__(
        self,
        *,
        server_lr: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        v_init: FirstMoment = "tau2",
        bias_correction: BiasCorrection = "none",
        weighted: bool = True,
        flower_compat: bool = False,
    ) -> None:
        require_positive("server_lr", server_lr)
        optimizer = ServerAdam(
            lr=server_lr, beta1=beta1, beta2=beta2, tau=tau, v_init=v_init,
            bias_correction=bias_correction, flower_compat=flower_compat,
        )  # fmt: skip
        super().__init__(optimizer, weighted=weighted or flower_compat)
