"""FedLD in float64, written from the paper's figure and equations S1 to S6. NumPy alone.

Zeng et al., MICCAI 2024 (arXiv:2408.12300). The direct form: principal gradients in the space of
parameters, every client's projection in turn. Nothing here goes by the Gram matrix' coefficients.
"""

import math

import numpy as np


def principal_gradients(updates):
    """Eigenvalues of the uncentred Gram matrix over m, falling, and w_j = G^T e_j as rows."""
    g = np.asarray(updates, dtype=np.float64)
    values, vectors = np.linalg.eigh(g @ g.T / len(g))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    return values, (g.T @ vectors).T


def revised(updates, keep=0.8, *, calibrate=True):
    """Each client's revised update.

    Args:
        updates: `[m, d]`.
        keep: rho.
        calibrate: Whether w_j is turned towards the majority first (no effect on projections).
    """
    g = np.asarray(updates, dtype=np.float64)
    m = len(g)
    values, principal = principal_gradients(g)
    k = max(1, math.floor(keep * m + 1e-9))
    out = np.zeros_like(g)
    for j in range(k):
        if values[j] <= 1e-10 * values[0]:
            continue
        w = principal[j]
        inner = g @ w
        inner = np.where(
            np.abs(inner) <= 1e-12 * np.linalg.norm(g, axis=1) * np.linalg.norm(w), 0.0, inner
        )
        if calibrate and (inner >= 0).sum() < (inner < 0).sum():
            w, inner = -w, -inner
        for i in range(m):
            share = values[j] / values.sum()
            length = np.linalg.norm(g[i]) * share * np.sign(inner[i])
            out[i] += length * w / np.linalg.norm(w)
    return out


def aggregate(updates, keep=0.8):
    """Mean of the revised updates."""
    return revised(updates, keep).mean(axis=0)


def cross_entropy(logits, labels):
    """Mean cross-entropy of a batch."""
    return float(-np.log(softmax(logits)[np.arange(len(labels)), labels]).mean())


def softmax(logits):
    """Row by row."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def penalty(logits, space="probability", reduction="batch"):
    """log(1 + ||A||_F^2), or the mean over samples of log(1 + ||A_b||^2)."""
    a = softmax(logits) if space == "probability" else np.asarray(logits, dtype=np.float64)
    if reduction == "batch":
        return math.log(1 + float((a**2).sum()))
    return float(np.mean([math.log(1 + float((row**2).sum())) for row in a]))


def penalty_gradient(logits):
    """2 / (1 + ||P||_F^2) * P_b (P_b - ||P_b||^2), of the batch form on probabilities."""
    p = softmax(np.asarray(logits, dtype=np.float64))
    return 2 / (1 + (p**2).sum()) * p * (p - (p**2).sum(axis=1, keepdims=True))


def server(model, rounds, keep=0.8):
    """Rounds of named updates `{name: [m, d]}`: S1's gate per tensor, then S2 to S6."""
    model = {name: values.copy() for name, values in model.items()}
    history = dict.fromkeys(model)
    for updates in rounds:
        for name, g in updates.items():
            first = history[name] is None or not history[name].any()
            move = g.mean(axis=0) if first or g.shape[1] == 1 else aggregate(g, keep)
            history[name] = move if history[name] is None else 0.99 * history[name] + 0.01 * move
            model[name] = model[name] + move
    return model
