"""FedExP, written from its paper: Jhunjhunwala, Wang and Joshi, ICLR 2023 (arXiv:2301.09604).

NumPy alone is imported, so that nothing here can agree with the code under test by sharing it.
"""

import numpy as np


def extrapolation(updates, *, epsilon):
    """max(1, sum_i |Delta_i|^2 / (2 M (|mean Delta|^2 + epsilon))), as the paper has it."""
    clients = len(updates)
    mean = sum(updates) / clients
    squares = sum(float(np.dot(u, u)) for u in updates)
    return max(1.0, squares / (2 * clients * (float(np.dot(mean, mean)) + epsilon)))


def weighted_extrapolation(updates, weights, *, epsilon):
    """The same with p_i in place of 1 / M."""
    shares = np.asarray(weights, dtype=float) / np.sum(weights)
    mean = sum(p * u for p, u in zip(shares, updates, strict=True))
    squares = sum(p * float(np.dot(u, u)) for p, u in zip(shares, updates, strict=True))
    return max(1.0, squares / (2 * (float(np.dot(mean, mean)) + epsilon))), mean


def follow(x, rounds, *, epsilon, weighted=False):
    """(eta_g, x) after every round of (updates, examples); no updates leave x alone."""
    x, found = np.asarray(x, dtype=float), []
    for updates, examples in rounds:
        lr = None
        if updates:
            weights = examples if weighted else [1] * len(updates)
            lr, mean = weighted_extrapolation(updates, weights, epsilon=epsilon)
            x = x + lr * mean
        found.append((lr, x))
    return found
