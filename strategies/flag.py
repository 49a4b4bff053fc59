"""The Flag Aggregator: the mean of unit updates, projected on the subspace that explains them best.

Almasi, Mishra, Vamanan and Ravi, "Flag Aggregator: Scalable Distributed Training under Failures and
Augmented Losses using Convex Optimization", ICLR 2024 (arXiv:2302.05865), equation 5 and
Algorithm 1; read in its NeurIPS 2023 submission and the released code.

Symbols: g_i gradient of worker i, minus its update; p workers that replied, Y orthonormal basis of
the subspace, m its dimension subspace_dim, v_i = ||Y^T g_i||^2 / ||g_i||^2 value of worker i, A the
objective, lambda pair_weight, alpha server_lr.

The subspace minimises

    A(Y) = sum_i sqrt(1 - v_i) + lambda / (p - 1) sum_{i != j} sqrt(1 - v_ij),

v_ij being the value of the difference of two unit gradients, by iteratively reweighted least
squares. It happens in the span of the unit gradients, by way of their p x p Gram matrix.

Deviations:
- Algorithm 1 projects the gradients as received, so that the longest decides; the released code and
  fedsim project unit gradients. A worker is weighed alike at any length above zero.
- The iteration starts with equal weights, the code's from a random subspace (which gives nearly
  equal weights when there are many more parameters than workers), and the best iterate is kept
  where the code falls back to its start.
- The paper divides by p, the code by m: `scale` says which. "median" is an extension.
- lambda follows equation 5, with unit gradients in the pairs too; Algorithm 1, line 5, and the
  code each differ from it.
- The regularisers by the l1 norm of Y are left out, as in the code.
- Workers that are not finite are dropped; BatchNorm statistics are averaged by examples, where the
  code discards them.
"""

import math
from typing import ClassVar, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from fedsim.aggregators.updates import Directions
from fedsim.basics.ties import Jump
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, State

Scale = Literal["workers", "subspace", "median"]
_SMOOTHING = 1e-7  # the code's epsilon inside the inverse root
_NEGLIGIBLE = 1e-10  # of an eigenvalue of the Gram matrix, beside the largest
_COINCIDENT = 1e-12  # of the distance of two unit gradients
_SOLVED = 1e-10  # of the objective
_PAIRS = 1e6  # the largest weight of pairs: nothing else counts any more


def flag_aggregate(
    gradients: Tensor,
    *,
    subspace_dim: int | None = None,
    pair_weight: float = 0.0,
    iterations: int = 5,
    tolerance: float = 1e-10,
) -> Tensor:
    """Return (1/p) Y Y^T sum_i g_i / ||g_i||.

    Computed from the Gram matrix in float64: O(dim p^2) once and O(p^3) per pass, with pairs
    O(p^4) and memory for p^3 / 2 numbers. Where the m-th eigenvalue is the next one's equal
    (gradients at right angles) subspaces are equally good, and the result hangs on rounding.

    Args:
        gradients: `[workers, dim]`; rows that are not finite are dropped, zero rows count in p.
        subspace_dim: m >= 1, at most the rank is used; None takes ceil((p + 1) / 2).
        pair_weight: lambda >= 0, the weight of pairs. When it is large and m small, Y turns to the
            *differences* of gradients and away from what they have in common.
        iterations: Passes, >= 1; one is the principal subspace of the unit gradients.
        tolerance: Stop when a pass lowers the objective by no more.

    Returns:
        `[dim]`, at most 1 long, in the dtype and on the device of `gradients`; zero without rows.

    Raises:
        ValueError: If an argument is below its bound.

    Example:
        >>> flag_aggregate(torch.tensor([[3.0, 0.0], [9.0, 0.0], [0.0, 1e6]]), subspace_dim=1)
        tensor([0.6667, 0.0000])
    """
    directions = Directions.of(gradients)
    found = _aggregate(directions, subspace_dim, pair_weight, iterations, tolerance)
    return found.direction.to(gradients.dtype)


def _dimension(subspace_dim: int | None, workers: int) -> int:
    """The subspace's dimension m unless the rank is smaller; by default ceil((p + 1) / 2)."""
    return min(workers // 2 + 1 if subspace_dim is None else subspace_dim, workers)


class _Aggregate(NamedTuple):
    """The aggregate, float64 `[dim]`, workers' lengths `[p]`, min(m, rank), their values `[p]`."""

    direction: Tensor
    lengths: Tensor
    subspace_dim: int
    values: Tensor


def _aggregate(
    directions: Directions,
    subspace_dim: int | None,
    pair_weight: float,
    iterations: int,
    tolerance: float,
) -> _Aggregate:
    for name, value, least in (
        ("subspace_dim", 1 if subspace_dim is None else subspace_dim, 1),
        ("pair_weight", pair_weight, 0),
        ("iterations", iterations, 1),
    ):
        if not value >= least:
            raise ValueError(f"{name} = {value!r}: must be >= {least}")
    gram, factors, lengths = directions.unit_gram()
    workers = len(lengths)
    scales, basis = torch.linalg.eigh(gram)
    kept = scales > _NEGLIGIBLE * scales[-1:]
    roots, basis = scales[kept].sqrt(), basis[:, kept]
    coordinates = roots[:, None] * basis.T  # column i is unit gradient i in its span
    dim = min(_dimension(subspace_dim, workers), len(roots))
    missing = torch.where(factors > 0, 0.0, 1.0).double()  # a zero gradient has value 0
    outside, values = _complement(coordinates, missing, dim, pair_weight, iterations, tolerance)
    # Y Y^T g is g less its part outside, so that nothing is lost when the subspace holds it all
    total = outside @ (outside.T @ coordinates.sum(dim=1))
    coefficients = (1 - basis @ (total / roots)) * factors / max(1, workers)
    return _Aggregate(directions.updates.combined(coefficients), lengths, dim, values)


def _complement(
    coordinates: Tensor,
    missing: Tensor,
    dim: int,
    pair_weight: float,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Find the subspace by iteratively reweighted least squares.

    Args:
        coordinates: float64 `[rank, p]`, the unit gradients.
        missing: float64 `[p]`, 1 for zero gradients and 0 for the others.
        dim: The subspace's dimension, at most the rank.
        pair_weight: lambda.
        iterations: Passes, >= 1.
        tolerance: Of the objective.

    Returns:
        An orthonormal basis of the subspace's complement, `[rank, rank - dim]`, and the values.
    """
    rank, workers = coordinates.shape
    columns, weights = coordinates, torch.ones(workers, dtype=torch.float64)
    if pair_weight:
        one, other = torch.triu_indices(workers, workers, 1)
        differences = coordinates[:, one] - coordinates[:, other]
        distances = torch.linalg.vector_norm(differences, dim=0)
        apart = distances > _COINCIDENT
        differences = differences[:, apart] / distances[apart]
        columns = torch.cat([coordinates, differences], dim=1)
        none = torch.zeros_like(distances[apart])
        # an unordered pair stands for two ordered ones
        weights = torch.cat([weights, none + 2 * pair_weight / max(1, workers - 1)])
        missing = torch.cat([missing, none])
    best, omega = math.inf, weights
    for _ in range(iterations):
        _, directions = torch.linalg.eigh((columns * omega) @ columns.T)
        complement = directions[:, : rank - dim]
        unexplained = missing + (complement.T @ columns).square().sum(dim=0)  # 1 - v
        objective = float((weights * unexplained.sqrt()).sum())
        if objective >= best:
            break
        gained, best, kept = best - objective, objective, (complement, unexplained)
        if gained <= tolerance or objective <= _SOLVED:
            break
        omega = weights * (unexplained + _SMOOTHING).rsqrt()
    complement, unexplained = kept
    return complement, 1 - unexplained[:workers]


class Momentum(NamedTuple):
    """What the server's optimiser remembers.

    Attributes:
        momentum: `[dim]`, the decayed sum of past steps, before the step size.
    """

    momentum: Tensor


@final
class FlagAggregator(FederatedStrategy):
    """Moves the model by the unit updates' mean within the subspace that explains them best.

    Clients count equally. The aggregate is at most 1 long whatever the updates' lengths, so that
    steps do not shrink near an optimum: let the step size decay, or take scale "median". The paper
    applies it by SGD at the server: momentum 0.9, weight decay 5e-4, and a step size of 0.2 that is
    multiplied by 0.2 every 10 epochs.

    Args:
        server_lr: alpha, the server's step size; > 0.
        subspace_dim: m, the subspace's dimension; >= 1. None takes ceil((p + 1) / 2) of the p
            clients that replied; a small one may follow colluding attackers.
        pair_weight: lambda, the weight of pairs of updates; in [0, 1e6], 0 in the paper's main
            experiments. From about 1 on and with a small `subspace_dim` the subspace turns to the
            differences between clients.
        iterations: Passes of the reweighting; >= 1. Many make it select a few clients.
        tolerance: The passes end when one lowers the objective by no more; >= 0.
        scale: What the projected sum of unit updates is divided by: "workers" is p, as in the
            paper; "subspace" is m, as in the released code; "median" is p with the median length of
            the updates as a factor, so that steps shrink.
        server_momentum: Of the server's SGD; in [0, 1).
        weight_decay: Of the server's SGD; >= 0.
        lr_decay: Factor on the step size after every `lr_decay_every` rounds; in (0, 1].
        lr_decay_every: Rounds; >= 1.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"subspace_dim": 10**6}, "unit_mean", {}, tolerance=1e-12),
        Degenerate({"scale": "median"}, "fedavg", {"weighted": False}, "identical clients", 1e-12),
    )
    jumps: ClassVar[tuple[Jump, ...]] = (
        Jump(
            ("rounding", "clients", "columns", "scale"),
            ("equidistant", "lattice"),
            "equal eigenvalues leave open which of their directions the subspace takes",
        ),
    )

    def __init__(
        self,
        *,
        server_lr: float = 1.0,
        subspace_dim: int | None = None,
        pair_weight: float = 0.0,
        iterations: int = 5,
        tolerance: float = 1e-10,
        scale: Scale = "workers",
        server_momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_decay: float = 1.0,
        lr_decay_every: int = 1,
    ) -> None:
        for name, value, holds, allowed in (
            ("server_lr", server_lr, 0 < server_lr < math.inf, "> 0 and finite"),
            ("subspace_dim", subspace_dim, subspace_dim is None or subspace_dim >= 1, ">= 1"),
            ("pair_weight", pair_weight, 0 <= pair_weight <= _PAIRS, f"in [0, {_PAIRS:g}]"),
            ("iterations", iterations, iterations >= 1, ">= 1"),
            ("tolerance", tolerance, 0 <= tolerance < math.inf, ">= 0 and finite"),
            ("scale", scale, scale in get_args(Scale), "workers, subspace or median"),
            ("server_momentum", server_momentum, 0 <= server_momentum < 1, "in [0, 1)"),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, ">= 0 and finite"),
            ("lr_decay", lr_decay, 0 < lr_decay <= 1, "in (0, 1]"),
            ("lr_decay_every", lr_decay_every, lr_decay_every >= 1, ">= 1"),
        ):
            if not holds:
                raise ValueError(f"{name} = {value!r}: must be {allowed}")
        self._server_lr = server_lr
        self._subspace_dim = subspace_dim
        self._pair_weight = pair_weight
        self._iterations = iterations
        self._tolerance = tolerance
        self._scale: Scale = scale
        self._server_momentum = server_momentum
        self._weight_decay = weight_decay
        self._lr_decay = lr_decay
        self._lr_decay_every = lr_decay_every

    def init(self, params: Tensor, clients: int) -> State:
        """No momentum."""
        return Momentum(torch.zeros_like(params))

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return the model after one SGD step; nothing moves when nobody answered."""
        if not replies.num_clients:
            return params, state, {}
        assert replies.params is not None
        directions = Directions.of(replies.params, replies.reference)
        direction, lengths, dim, values = _aggregate(
            directions, self._subspace_dim, self._pair_weight, self._iterations, self._tolerance
        )
        workers = len(lengths)
        step = direction.to(params.dtype) * self._factor(lengths) - self._weight_decay * params
        momentum = self._server_momentum * state.momentum + step
        decays = (replies.server_round - 1) // self._lr_decay_every
        moved = params + self._server_lr * self._lr_decay**decays * momentum
        metrics = {"subspace_dim": dim, "explained": float(values.mean()), "workers": workers}
        return moved, Momentum(momentum), metrics

    def _factor(self, lengths: Tensor) -> float:
        """What makes of the mean over workers what `scale` asks for."""
        workers = len(lengths)
        if self._scale == "median":
            return float(lengths.quantile(0.5))
        if self._scale == "subspace":
            return workers / _dimension(self._subspace_dim, workers)
        return 1.0
