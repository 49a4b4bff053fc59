"""The geometric median, centred clipping and the mean of unit updates.

- Geometric median: the point from which the distances to all updates add up to least. Computed by
  Weiszfeld's iteration with the test of Vardi and Zhang, "The multivariate L1-median and associated
  data depth", PNAS 2000, and Newton's step where it is better; as a rule, Pillutla, Kakade and
  Harchaoui, "Robust Aggregation for Federated Learning", 2022 (arXiv:1912.13445).
- Centred clipping: Karimireddy, He and Jaggi, "Learning from History for Byzantine Robust
  Optimization", ICML 2021 (arXiv:2012.10333). Symbols: v centre, tau radius, L iterations.
- Mean of unit updates: see `strategies/unit_mean.py`.
"""

import math

import torch
from torch import Tensor

from fedsim.aggregators.coordinatewise import median_of
from fedsim.aggregators.updates import Directions, Updates, rounding
from fedsim.basics.ties import EPSILON

_ITERATIONS, _PATIENCE = 1000, 30
_SOLVED = 1e-13  # of the gradient's length, which is at most 1 per update
_SHARES = (1, 1 / 4, 1 / 16, 1 / 64)  # of Newton's step
_FREE = 1.01  # a pull beside what a point holds: less, and Weiszfeld's step is too small
_FAR = 2.0**400  # the square of a float64 up to here is one too


def geometric_median(updates: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the point with the least (weighted) sum of distances to all updates.

    Exact to 1e-10 of the updates' spread. Where many points have the least sum (the segment between
    the middle two of an even number on a line, and always between two) it is their middle.

    Args:
        updates: `[clients, dim]`; rows that are not finite are dropped.
        weights: `[clients]`, > 0; alike if None.

    Returns:
        `[dim]`, in the dtype and on the device of `updates`; zero without rows.

    Raises:
        ValueError: If a weight is not positive.

    Example:
        >>> geometric_median(torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 1.0]]))
        tensor([0., 0.])
    """
    kept = Updates.of(updates)
    if weights is not None:
        if weights.shape != (len(updates),) or not (weights > 0).all():
            raise ValueError("weights: must be > 0, one per update")
        weights = weights[torch.isfinite(updates).all(dim=1)].double().cpu()
    return geometric_median_of(kept, weights).to(updates.dtype)


def centred_clipping(
    updates: Tensor, *, radius: float, iterations: int = 1, centre: Tensor | None = None
) -> Tensor:
    """Return v after L times v + (1/n) sum_i (x_i - v) min(1, tau / ||x_i - v||).

    Args:
        updates: `[clients, dim]`; rows that are not finite are dropped.
        radius: tau > 0.
        iterations: L >= 1.
        centre: The first v, `[dim]`, by the paper what came out in the round before; zero if None.

    Returns:
        `[dim]`, in the dtype and on the device of `updates`; the centre without rows.

    Example:
        >>> centred_clipping(torch.tensor([[1.0, 0.0], [0.0, 50.0]]), radius=1.0)
        tensor([0.5000, 0.5000])
    """
    if centre is None:
        centre = updates.new_zeros(updates.shape[1])
    found = centred_clipping_of(Updates.of(updates), centre.double(), radius, iterations)
    return found.to(updates.dtype)


def unit_mean(gradients: Tensor) -> Tensor:
    """Return (1/p) sum_i g_i / ||g_i||.

    Args:
        gradients: `[clients, dim]`; rows that are not finite are dropped, zero rows count as zero.

    Returns:
        `[dim]`, at most 1 long, in the dtype and on the device of `gradients`; zero without rows.

    Example:
        >>> import torch
        >>> unit_mean(torch.tensor([[3.0, 4.0], [0.0, 1e30]])).tolist()
        [0.30000001192092896, 0.8999999761581421]
    """
    return unit_mean_of(Updates.of(gradients))[0].to(gradients.dtype)


def unit_mean_of(updates: Updates) -> tuple[Tensor, Tensor]:
    """Return the mean of unit updates, float64 `[dim]`, and the updates' lengths `[n]`."""
    directions = Directions.of_updates(updates)
    factors, lengths = directions.factors()
    return directions.updates.combined(factors / max(1, len(lengths))), lengths


def centred_clipping_of(
    updates: Updates, centre: Tensor, radius: float | None, iterations: int
) -> Tensor:
    """Return centred clipping, float64 `[dim]`.

    Args:
        updates: The finite updates.
        centre: The first v, float64 `[dim]`.
        radius: tau; None takes the median distance from v each time.
        iterations: L.
    """
    for _ in range(iterations if len(updates) else 0):
        lengths = updates.distances_to(centre)
        reach = (
            lengths.quantile(0.5) if radius is None else torch.tensor(radius, dtype=torch.float64)
        )
        shares = torch.where(lengths > reach, reach / lengths, 1.0) / len(updates)
        centre = centre + (updates.combined(shares) - float(shares.sum()) * centre)
    return centre


def geometric_median_of(updates: Updates, weights: Tensor | None = None) -> Tensor:
    """Return the geometric median, float64 `[dim]`; weights float64 `[n]`."""
    count = len(updates)
    if not count:
        return updates.combined(torch.zeros(0, dtype=torch.float64))
    weights = torch.ones(count, dtype=torch.float64) if weights is None else weights
    peaks = torch.stack([block.abs().amax(dim=1) for block in updates.blocks()]).amax(dim=0).cpu()
    if float(peaks.max()) > _FAR:  # an update so far away pulls by its direction alone
        updates = updates.mixed(torch.diag((_FAR / peaks).clamp(max=1)))
    centre = median_of(updates)
    points = updates.spread(centre)  # where the coordinate median is the origin
    sizes = updates.sizes() + torch.linalg.vector_norm(centre).cpu()
    reach = (rounding(updates.dim) * sizes).nan_to_num(posinf=0)
    shares = _median_shares(points, weights / weights.sum(), reach)
    if float(shares.max()) == 1:
        return updates.combined(shares)
    # what is common to all is not rounded again
    return centre + (updates.combined(shares) - float(shares.sum()) * centre)


def smoothed_median_of(updates: Updates, smoothing: float = 0.1, iterations: int = 3) -> Tensor:
    """Return byzfl's geometric median, float64 `[dim]`: few steps from zero, distances from nu on.

    Pillutla et al. 2022, Algorithm 2: the smoothed Weiszfeld algorithm.
    """
    centre = torch.zeros(updates.dim, dtype=torch.float64, device=updates.rows.device)
    for _ in range(iterations if len(updates) else 0):
        inverse = 1 / updates.distances_to(centre).clamp(min=smoothing)
        centre = updates.combined(inverse / inverse.sum())
    return centre


def _median_shares(points: Tensor, weights: Tensor, reach: Tensor) -> Tensor:
    """The shares of points in their geometric median, float64 `[n]`.

    Args:
        points: float64 `[n, rank]`.
        weights: float64 `[n]`, adding up to 1.
        reach: How far rounding may have moved each point, float64 `[n]`.
    """
    between = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    sums = between @ weights
    best = int(sums.argmin())  # if any point is the median, it is one with the least sum
    slack = reach + weights @ reach
    equal = torch.nonzero(sums - sums[best] <= slack + slack[best]).flatten().tolist()
    medians = [place for place in equal if _is_median(points, weights, reach, between, place)]
    best = medians[0] if medians else best
    same = between[best] <= reach + reach[best]
    if medians:
        others = [place for place in medians if not same[place]]
        ends = [best, *others[:1]]  # of a segment, when there are two
        return torch.eye(len(points), dtype=torch.float64)[ends].mean(dim=0)
    pull = _pull(points, weights * ~same, points[best])
    held, strength = weights[same].sum(), torch.linalg.vector_norm(pull)
    if strength < _FREE * held:  # small steps would not get away from the point
        where = _lowest(points, weights, points[best], pull / strength * between[best].max())
    else:
        inverse = torch.where(same, 0.0, weights / between[best])
        where = points[best] + pull * (1 - held / strength) / inverse.sum()
    least, since = math.inf, 0
    for _ in range(_ITERATIONS):
        slope = _pull(points, weights, where)
        steepness = float(torch.linalg.vector_norm(slope))
        least, since = (steepness, 0) if steepness < 0.9 * least else (least, since + 1)
        if steepness <= _SOLVED or since > _PATIENCE:  # rounding lets it come no further down
            break
        where = _next(points, weights, where, slope)
    inverse = weights / torch.linalg.vector_norm(points - where, dim=1)
    shares: Tensor = inverse / inverse.sum()
    return shares


def _is_median(points: Tensor, weights: Tensor, reach: Tensor, between: Tensor, place: int) -> bool:
    """Whether the pull of the others is no more than a point's weight, but for rounding."""
    near = reach + reach[place]
    same = between[place] <= near
    pull = _pull(points, weights * ~same, points[place])
    turned = (weights * torch.where(same, 0.0, near / between[place])).sum()  # rounding turns it
    held = weights[same].sum() + turned + len(points) * EPSILON
    return bool(torch.linalg.vector_norm(pull) <= held)


def _lowest(points: Tensor, weights: Tensor, start: Tensor, way: Tensor) -> Tensor:
    """The lowest point on a way that leads down first: by halving, until rounding ends it."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high and high - low > EPSILON:
        down = float(_pull(points, weights, start + middle * way) @ way) > 0
        low, high = (middle, high) if down else (low, middle)
    return start + high * way


def _pull(points: Tensor, weights: Tensor, where: Tensor) -> Tensor:
    """The weighted sum of unit vectors towards the points, `[rank]`."""
    apart = points - where
    lengths = torch.linalg.vector_norm(apart, dim=1)
    return (weights * torch.where(lengths > 0, 1 / lengths, 0.0)) @ apart


def _next(points: Tensor, weights: Tensor, where: Tensor, slope: Tensor) -> Tensor:
    """Weiszfeld's next point, or Newton's, on the way of its step, where it is better."""
    apart = points - where
    lengths = torch.linalg.vector_norm(apart, dim=1)
    inverse = torch.where(lengths > 0, weights / lengths, 0.0)
    weiszfeld: Tensor = where + slope / inverse.sum()
    units = apart / lengths.clamp(min=1e-300)[:, None]
    curvature = inverse.sum() * torch.eye(points.shape[1]).double() - (units.T * inverse) @ units
    step, failed = torch.linalg.solve_ex(curvature, slope)
    if int(failed) or not torch.isfinite(step).all():
        return weiszfeld

    def height(place: Tensor) -> float:
        return float(weights @ torch.linalg.vector_norm(points - place, dim=1))

    steepness, least = float(_pull(points, weights, weiszfeld).norm()), height(weiszfeld)
    for share in _SHARES:  # of a step that is too long in a narrow valley
        newton: Tensor = where + share * step
        if float(_pull(points, weights, newton).norm()) < steepness or height(newton) < least:
            return newton
    return weiszfeld
