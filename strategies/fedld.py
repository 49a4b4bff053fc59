"""FedLD: principal-gradient aggregation, with a margin penalty in the local objective.

Zeng, Guo, Wang, Wang, Zhou and Qu, "Tackling Data Heterogeneity in Federated Learning via Loss
Decomposition", MICCAI 2024 (arXiv:2408.12300), Figure 1 and the authors' code; the paper's numbered
equations were not available. The client side is `local_sgd` with `margin` (0.1 in the paper's
command).

Symbols: g_i update of client i in one named tensor, m clients that replied, S Gram matrix / m,
(lambda_j, e_j) its eigenpairs, w_j principal gradient, rho keep, k directions kept.

Deviations:
- m counts the clients that replied in the round (the code loops over all and fails on fewer), and
  at least one direction is kept (with one client the code keeps none and never moves again). k is
  floor(rho m) of the numbers as written (the code's product may be just below a whole number, as of
  50 clients and 0.58: it keeps one direction less).
- Directions with an eigenvalue of next to nothing, and projections of length zero but for rounding,
  contribute nothing; the code divides 0 by 0.
- BatchNorm statistics are averaged by examples instead of projected, whose variances may turn
  negative.
- The calibration step is left out: the sign of w_j cancels in the projection. (In a reading without
  the projection's sign it would matter; neither the authors' code nor its known port has it.)
- The code's accidents (training in evaluation mode, a step size that warms up by mistake) are not
  reproduced.
"""

import math
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fedsim.aggregators.updates import Updates, rounding
from fedsim.basics.errors import require_positive
from fedsim.basics.ties import Jump
from fedsim.client.objectives import margin_penalty
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, State

__all__ = ["FedLD", "margin_penalty", "principal_gradient_aggregate"]

_NEGLIGIBLE = {torch.float64: 1e-10}  # of the largest eigenvalue; 1e-6 for shorter floats
_ZERO_COSINE = 1e-12
_ZERO_PRODUCT = 1e-14  # of the largest eigenvalue: so much rounding is in <g_i, w_j>


def principal_gradient_aggregate(updates: Tensor, *, keep: float = 0.8) -> Tensor:
    """Return the mean of the updates revised along their principal directions.

    Each update becomes ||g_i|| sum_j (lambda_j / Lambda) sgn<g_i, w_j> w_j / ||w_j|| over the k
    largest of the eigenvalues, whose total Lambda is over all of them. Computed from the m x m Gram
    matrix in float64. Where eigenvalues are equal (updates at right angles and equally long) any
    basis of their space is as principal as another, and the result hangs on rounding.

    Args:
        updates: One tensor's updates, `[clients, dim]`; rows that are not finite are dropped.
        keep: rho, the share of principal directions kept, in (0, 1]; at least one is.

    Returns:
        `[dim]`, in the dtype and on the device of `updates`; zero without any update. It is never
        longer than the mean length of the updates, and even keep = 1 is not their mean.

    Example:
        >>> principal_gradient_aggregate(torch.tensor([[2.0, 1.0], [2.0, -1.0]])).tolist()
        [1.7888543605804443, 0.0]
    """
    return _aggregate(Updates.of(updates), keep)[0].to(updates.dtype)


def _aggregate(updates: Updates, keep: float) -> tuple[Tensor, float]:
    """The revised mean, float64, and the square of the plain mean's length."""
    gram = updates.gram()
    coefficients = _coefficients(gram, keep, _NEGLIGIBLE.get(updates.rows.dtype, 1e-6))
    square = max(0.0, float(gram.sum())) / max(1, len(updates)) ** 2
    return updates.combined(coefficients), square


def _coefficients(gram: Tensor, keep: float, negligible: float) -> Tensor:
    """What the revised mean is in terms of the updates, float64 `[clients]`."""
    clients, lengths = len(gram), gram.diagonal().sqrt()
    if not lengths.any():
        return lengths
    values, vectors = torch.linalg.eigh(gram / clients)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = values.sum()
    kept = torch.arange(clients) < max(1, math.floor(keep * clients + 1e-9))
    kept &= values > negligible * values[0]
    values, vectors = values[kept], vectors[:, kept]
    principal = (clients * values).sqrt()  # ||w_j||; <g_i, w_j> = ||w_j||^2 e_ji
    cosines = principal * vectors / lengths.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    told = (principal**2 * vectors).abs() > _ZERO_PRODUCT * principal[0] ** 2  # <g_i, w_j>
    cosines = torch.where(told, cosines, 0.0)
    signs = torch.where(cosines.abs() > _ZERO_COSINE, cosines.sign(), 0.0)
    revised = (lengths @ signs) / clients * values / total
    coefficients: Tensor = vectors @ (revised / principal)
    return coefficients


class Gate(NamedTuple):
    """Which tensors have moved: the others are averaged.

    Attributes:
        moved: bool `[tensors]`, whether an aggregated update of the tensor was ever not zero.
    """

    moved: Tensor


@final
class FedLD(FederatedStrategy):
    """Aggregates each named tensor along the principal directions of its updates.

    Clients count equally. A tensor is averaged plainly until it has moved once, and always when it
    has a single element.

    Args:
        keep: rho, the share of principal directions kept; in (0, 1].
        server_lr: Factor on the aggregate; > 0 (the paper has 1).

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}, "first round"),
        Degenerate({}, "fedavg", {"weighted": False}, "identical clients", 1e-12),
    )
    jumps: ClassVar[tuple[Jump, ...]] = (
        Jump(
            ("rounding", "clients", "columns", "scale"),
            ("equidistant",),
            "repeated eigenvalues leave open which directions are principal",
        ),
    )

    def __init__(self, *, keep: float = 0.8, server_lr: float = 1.0) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep = {keep!r}: must be in (0, 1]")
        require_positive("server_lr", server_lr)
        self._keep = keep
        self._server_lr = server_lr

    def init(self, params: Tensor, clients: int) -> State:
        """No tensor has moved."""
        return Gate(torch.zeros(len(self.layout.trainable), dtype=torch.bool))

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return the model moved by each tensor's revised mean; it stays when nobody answered."""
        clients = replies.num_clients
        if not clients:
            return params, state, {}
        assert replies.params is not None
        updates = Updates(replies.params, replies.reference)
        ones = torch.ones(clients, dtype=torch.float64)
        move, moved = torch.zeros_like(params, dtype=torch.float64), state.moved.clone()
        squares = 0.0  # of the mean's length
        for place, spec in enumerate(replies.layout.trainable):
            part = replies.layout.slices[spec.name]
            mine = updates.columns(part)
            if state.moved[place] and spec.size > 1:
                move[part], square = _aggregate(mine, self._keep)
            else:
                move[part] = mine.combined(ones) / clients
                square = float(move[part] @ move[part])
            squares += square
            if not moved[place]:  # a mean that cancels is zero
                away = rounding(spec.size) * float(mine.lengths().mean())
                moved[place] = float(move[part].abs().amax()) > away
        length = float(torch.linalg.vector_norm(move))
        metrics = {"norm_ratio": length / math.sqrt(squares)} if squares else {}
        after = params.double() + self._server_lr * move
        return after.to(params.dtype), Gate(moved), metrics
