"""EF21, EF21-W and error feedback in float64, written from the papers.

Richtarik et al. 2021 (arXiv:2106.05203), Algorithm 2; Richtarik et al. 2024 (arXiv:2402.10774),
Algorithm 2 and Theorem 3; Karimireddy et al. 2019 (arXiv:1901.09847), Algorithm 2. NumPy alone is
imported.
"""

import numpy as np


def top_k(v, k):
    """The k entries of largest size, of equal ones the first; elsewhere 0."""
    kept = np.zeros_like(v)
    places = sorted(range(len(v)), key=lambda i: (-abs(v[i]), i))[:k]
    kept[places] = v[places]
    return kept


def scaled_sign(v):
    return np.abs(v).sum() / len(v) * np.where(v >= 0, 1.0, -1.0)


def ef21(x, rounds, direction, weights, compress, gamma, *, present=None):
    """Return (x, u_i) after the rounds; every round first brings u_i up to date.

    `direction(i, x, t)` is client i's gradient, or what stands for it; u_i follows it divided by
    n w_i. `present[t]` are those who answer in round t; all do where it is None.
    """
    n = len(weights)
    own = np.zeros((n, len(x)))
    for t in range(rounds):
        for i in range(n) if present is None else present[t]:
            own[i] = own[i] + compress(direction(i, x, t) / (n * weights[i]) - own[i])
        x = x - gamma * (weights[:, None] * own).sum(axis=0)
    return x, own


def error_feedback(x, cohorts, update, compress, counts):
    """Return (model, errors by client) of weighted averaging with compressed updates."""
    errors = {}
    for t, cohort in enumerate(cohorts):
        moved = np.zeros_like(x)
        for i in cohort:
            wanted = update(i, x, t) + errors.get(i, 0)
            sent = compress(wanted)
            errors[i] = wanted - sent
            moved += counts[i] * sent
        x = x + moved / sum(counts[i] for i in cohort)
    return x, errors


def theory(smooth, each, alpha, *, mean, p=1.0):
    """gamma = 1 / (L + mean(L_i) * sqrt(B / theta)), our own constants below p = 1."""
    theta = 1 - np.sqrt(1 - alpha)
    beta = (1 - alpha) / theta
    if p < 1:
        rho = p * theta / (2 * (1 - p))
        theta, beta = p * theta - (1 - p) * rho, p * beta + (1 - p) * (1 + 1 / rho)
    average = {"arithmetic": np.mean(each), "quadratic": np.sqrt(np.mean(np.square(each)))}[mean]
    return 1 / (smooth + average * np.sqrt(beta / theta))
