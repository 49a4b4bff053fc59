"""q-FedAvg and agnostic federated learning in float64, written from the papers.

Li et al. 2020 (arXiv:1905.10497), Algorithm 2; Mohri et al. 2019 (arXiv:1902.00146), Algorithm 1,
with what its module says of clients that are absent. A model is a flat vector; `gradient(w,
features, targets)` is given, and `loss_of(w, client)`. NumPy alone is imported.
"""

import numpy as np


def descent(x, batches, gradient, lr):
    """The model after these steps."""
    w = x.copy()
    for features, targets in batches:
        w = w - lr * gradient(w, features, targets)
    return w


def qfedavg(x, cohorts, batches_of, loss_of, gradient, *, lr, q, lipschitz):
    """Return the model after the rounds."""
    for server_round, cohort in enumerate(cohorts, start=1):
        deltas, sizes = [], []
        for k in cohort:
            moved = lipschitz * (x - descent(x, batches_of(server_round, k), gradient, lr))
            loss = loss_of(x, k)
            deltas.append(loss**q * moved)
            sizes.append(q * loss ** (q - 1) * (moved @ moved) + lipschitz * loss**q)
        x = x - np.sum(deltas, axis=0) / np.sum(sizes)
    return x


def on_simplex(point):
    """The nearest point of the simplex, by bisection on what is taken off every entry."""
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(point - middle, 0).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(point - high, 0)


def afl(x, cohorts, batches_of, loss_of, gradient, *, clients, lr, mixture_lr):
    """Return (the model, lambda) after the rounds."""
    mixture = np.full(clients, 1 / clients)
    for server_round, cohort in enumerate(cohorts, start=1):
        ways = [descent(x, batches_of(server_round, k), gradient, lr) - x for k in cohort]
        ascent = np.zeros(clients)
        for k in cohort:
            ascent[k] = clients / len(cohort) * loss_of(x, k)
        x = x + np.average(ways, axis=0, weights=mixture[list(cohort)])
        mixture = on_simplex(mixture + mixture_lr * ascent)
    return x, mixture
