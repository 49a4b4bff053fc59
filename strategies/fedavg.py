"""Federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017 (arXiv:1602.05629), Algorithm 1, server side; the server step size is that of Reddi et al.,
"Adaptive Federated Optimization", ICLR 2021 (arXiv:2003.00295), Algorithm 1.

Symbols: Delta_k update of client k, n_k num_examples, eta_g server_lr.

Deviations: none. With server_lr = 1 the result is the weighted mean of the clients' models.
"""

from typing import ClassVar, final

from fedsim.strategy import AveragingStrategy, Degenerate


@final
class FedAvg(AveragingStrategy):
    """Moves the model by the mean of the clients' updates.

    Args:
        server_lr: eta_g, the factor on the mean update; > 0.
        weighted: Whether clients count by their examples (the paper's n_k / n) or all the same.

    Raises:
        ValueError: If `server_lr` is not positive and finite.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}, "identical clients", 1e-12),
    )
