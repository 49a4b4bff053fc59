"""Updates of kinds on which ties are the rule: what a rounding or an order could decide."""

import numpy as np


def generic(draw, clients, dim):
    return draw.normal(size=(clients, dim))


def duplicates(draw, clients, dim):
    """Exact copies, of one row or of several."""
    return generic(draw, clients, dim)[draw.integers(draw.integers(1, clients + 1), size=clients)]


def mirrored(draw, clients, dim):
    """x and -x; of an odd number the last has no partner."""
    half = generic(draw, clients // 2, dim)
    return np.concatenate([half, -half, generic(draw, clients % 2, dim)])


def mirrored_about_zero(draw, clients, dim):
    """The same with zero between them."""
    half = generic(draw, clients // 2, dim)
    return np.concatenate([half, -half, np.zeros((clients % 2, dim))])


def lattice(draw, clients, dim):
    return draw.integers(-1, 2, size=(clients, dim)).astype(float)


def equidistant(draw, clients, dim):
    """Rows of one entry each: whatever tells them apart is the order of columns."""
    return draw.uniform(0.5, 2) * np.eye(max(clients, dim))[:clients]


def collinear(draw, clients, dim):
    steps = draw.integers(-4, 5, size=(clients, 1)).astype(float)
    return generic(draw, 1, dim) + steps * generic(draw, 1, dim)


def clusters(draw, clients, dim):
    """Two clusters of copies, as large as each other but for one row."""
    one, other = generic(draw, 2, dim)
    return np.where(np.arange(clients)[:, None] % 2, one, other)


def one_dimension(draw, clients, dim):
    return generic(draw, clients, 1)


def whole_numbers(draw, clients, dim):
    return draw.integers(-4, 5, size=(clients, 1)).astype(float)


def cancelling(draw, clients, dim):
    """c x, x / 10 and -(c + 1 / 10) x by turns, whose sum is zero but for rounding."""
    factors = draw.uniform(0.2, 3, size=-(-clients // 3))
    three = np.stack([factors, 0.1 + 0 * factors, -(factors + 0.1)], axis=1)
    return three.reshape(-1, 1)[:clients] * generic(draw, 1, dim)


def with_zeros(draw, clients, dim):
    rows = generic(draw, clients, dim)
    rows[draw.permutation(clients)[: clients // 2]] = 0
    return rows


def far_attackers(draw, clients, dim):
    """Copies far away besides generic rows."""
    rows = generic(draw, clients, dim)
    rows[: max(1, (clients - 3) // 4)] = 1e9 * generic(draw, 1, dim)
    return rows


def offset(draw, clients, dim):
    """Mirrored pairs about a point that is long beside their distance."""
    return 1e4 + mirrored(draw, clients, dim)


KINDS = {
    make.__name__: make
    for make in (
        generic, duplicates, mirrored, mirrored_about_zero, lattice, equidistant, collinear,
        clusters, one_dimension, whole_numbers, cancelling, with_zeros, far_attackers, offset,
    )
}  # fmt: skip
