"""FedPer over a network of one hidden layer in float64, written from the paper.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019 (arXiv:1912.00818),
Algorithms 1 and 2: each client trains base and personalization layers together, the server
averages the base by the samples, and a client's personalization layers go on from where that
client left them. NumPy alone is imported.
"""

import numpy as np

BASE, PERSONAL = ("V", "c"), ("W", "b")


def losses_and_gradient(model, features, targets):
    """Mean cross-entropy of `W relu(V x + c) + b`, and its gradient by name."""
    inner = features @ model["V"].T + model["c"]
    hidden = np.maximum(inner, 0)
    logits = hidden @ model["W"].T + model["b"]
    logits -= logits.max(axis=1, keepdims=True)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -np.log(chances[rows, targets]).mean()
    errors = chances.copy()
    errors[rows, targets] -= 1
    errors /= len(targets)
    below = (errors @ model["W"]) * (inner > 0)
    gradient = {
        "V": below.T @ features, "c": below.sum(axis=0), "W": errors.T @ hidden,
        "b": errors.sum(axis=0),
    }  # fmt: skip
    return loss, gradient


def client_update(base, personal, features, targets, *, lr, steps):
    """Algorithm 1: steps on all of a client's samples; returns (base, personal)."""
    model = {**base, **personal}
    for _ in range(steps):
        _, gradient = losses_and_gradient(model, features, targets)
        model = {name: model[name] - lr * gradient[name] for name in model}
    return {n: model[n] for n in BASE}, {n: model[n] for n in PERSONAL}


def rounds(start, samples, cohorts, *, lr, steps):
    """Algorithm 2 with absences: (base, personal layers of every client) after the cohorts' rounds.

    Args:
        start: The initial model, from which every client's personal layers start.
        samples: (features, targets) by client.
        cohorts: Who takes part, round by round.
        lr: Step size.
        steps: Steps per round.
    """
    base = {name: start[name] for name in BASE}
    personal = {client: {name: start[name] for name in PERSONAL} for client in range(len(samples))}
    for cohort in cohorts:
        trained, counts = [], []
        for client in cohort:
            features, targets = samples[client]
            mine, personal[client] = client_update(
                base, personal[client], features, targets, lr=lr, steps=steps
            )
            trained.append(mine)
            counts.append(len(targets))
        shares = np.array(counts) / sum(counts)
        base = {n: sum(s * t[n] for s, t in zip(shares, trained, strict=True)) for n in BASE}
    return base, personal
