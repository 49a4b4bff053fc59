"""The Flag Aggregator in n dimensions and float64, written from the paper (arXiv:2302.05865).

Every pass takes the singular vectors of the tall matrix whose columns are the weighted unit
gradients and pair differences; ordered pairs are all there, each twice. NumPy alone is imported, so
that nothing here can agree with the code under test by sharing it.
"""

import numpy as np

EPSILON = 1e-7


def unit_columns(gradients):
    """`[n, p]`, the finite gradients of unit length; a zero gradient stays zero."""
    rows = np.asarray(gradients, dtype=np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(largest > 0, largest, 1)
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).T


def pair_columns(unit):
    """`[n, pairs]`, the unit differences of all ordered pairs that do not coincide."""
    workers = unit.shape[1]
    found = []
    for i in range(workers):
        for j in range(workers):
            difference = unit[:, i] - unit[:, j]
            if difference @ difference > 1e-24:
                found.append(difference / np.linalg.norm(difference))
    return np.array(found).reshape(len(found), len(unit)).T


def objective(basis, unit, pair_weight=0.0, *, smoothing=0.0):
    """Equation 5: sum_i sqrt(1 - v_i) + lambda / (p - 1) sum_{i != j} sqrt(1 - v_ij)."""

    def rest(columns):
        values = ((basis.T @ columns) ** 2).sum(axis=0)
        return np.sqrt(np.maximum(0.0, 1 - values) + smoothing).sum()

    total = rest(unit)
    if pair_weight:
        total += pair_weight / max(1, unit.shape[1] - 1) * rest(pair_columns(unit))
    return total


def rank(unit):
    singular = np.linalg.svd(unit, compute_uv=False)
    return int((singular**2 > 1e-10 * singular[0] ** 2).sum())


def subspace(unit, dim, *, pair_weight=0.0, iterations=5, tolerance=1e-10):
    """The basis Y `[n, m]` of the best pass."""
    pairs = pair_columns(unit) if pair_weight else unit[:, :0]
    workers = unit.shape[1]
    dim = min(dim, rank(unit))
    columns = np.hstack([unit, pairs])
    weights = np.hstack([
        np.ones(workers), np.full(pairs.shape[1], pair_weight / max(1, workers - 1))
    ])  # fmt: skip
    omega, best, kept = weights, np.inf, None
    for _ in range(iterations):
        left, _, _ = np.linalg.svd(columns * np.sqrt(omega), full_matrices=False)
        basis = left[:, :dim]
        reached = objective(basis, unit, pair_weight)
        decrease = best - reached
        if decrease > 0:
            best, kept = reached, basis
        if decrease <= tolerance or reached <= 1e-10:
            break
        values = ((basis.T @ columns) ** 2).sum(axis=0)
        omega = weights / np.sqrt(np.maximum(0.0, 1 - values) + EPSILON)
    return kept


def default_dim(workers):
    """ceil((p + 1) / 2)."""
    return int(np.ceil((workers + 1) / 2))


def flag(gradients, *, subspace_dim=None, **options):
    """F(G) = (1/p) Y Y^T Ghat 1."""
    unit = unit_columns(gradients)
    workers = unit.shape[1]
    if not workers or not unit.any():
        return np.zeros(len(unit))
    basis = subspace(unit, subspace_dim or default_dim(workers), **options)
    return basis @ (basis.T @ unit.sum(axis=1)) / workers


def explained(gradients, *, subspace_dim=None, **options):
    """The mean of the v_i."""
    unit = unit_columns(gradients)
    basis = subspace(unit, subspace_dim or default_dim(unit.shape[1]), **options)
    return ((basis.T @ unit) ** 2).sum(axis=0).mean()


def server_step(model, velocity, gradient, *, lr, momentum=0.0, weight_decay=0.0):
    """SGD on the aggregated gradient: returns (model, velocity)."""
    velocity = momentum * velocity + gradient + weight_decay * model
    return model - lr * velocity, velocity
