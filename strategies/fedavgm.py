"""FedAvgM: federated averaging with momentum at the server.

Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019 (arXiv:1909.06335), section 4.3. One of the FedOpt family: Reddi et al.,
"Adaptive Federated Optimization", ICLR 2021 (arXiv:2003.00295).

Symbols: Delta mean update, m momentum, beta momentum, eta server_lr, n_k num_examples.

Deviations:
- Clients count by their examples, as in the papers' experiments; the second paper's algorithm has
  the uniform mean (`weighted = false`).
- Buffers (BatchNorm statistics) take the plain weighted mean, without momentum.
- A round without replies leaves model and momentum alone; the papers have none.
"""

from typing import ClassVar, final

from fedsim.aggregators.server_optimizers import ServerSGD
from fedsim.basics.errors import require_positive
from fedsim.strategy import Degenerate
from fedsim.strategy.optimized import OptimizedMean


@final
class FedAvgM(OptimizedMean):
    """Moves the model by eta m with m = beta m + Delta.

    Args:
        server_lr: eta, the factor on the momentum; > 0.
        momentum: beta, the share of the momentum kept; in [0, 1).
        weighted: Whether clients count by their examples or all the same.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"momentum": 0.0}, "fedavg", {}),)

    def __init__(
        self, *, server_lr: float = 1.0, momentum: float = 0.9, weighted: bool = True
    ) -> None:
        require_positive("server_lr", server_lr)
        super().__init__(ServerSGD(lr=server_lr, momentum=momentum), weighted=weighted)
