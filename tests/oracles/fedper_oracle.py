"""FedPer, FedRep and FedBABU over a network of one hidden layer in float64, from the papers.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019 (arXiv:1912.00818),
Algorithms 1 and 2: each client trains base and personalization layers together, the server
averages the base by the samples, and a client's personalization layers go on from where that
client left them. Collins et al., ICML 2021 (arXiv:2102.07078), Algorithm 1: the client trains its
head with the base received, then the base with that head. Oh, Kim and Yun, ICLR 2022
(arXiv:2106.06042), Algorithm 1: the head is never trained. NumPy alone is imported.
"""

import numpy as np

BASE, PERSONAL = ("V", "c"), ("W", "b")


def logits_of(model, features):
    """`W relu(V x + c) + b`."""
    hidden = np.maximum(features @ model["V"].T + model["c"], 0)
    return hidden @ model["W"].T + model["b"]


def cross_entropy(logits, targets):
    """The mean cross-entropy, and its slope by the logits."""
    logits = logits - logits.max(axis=1, keepdims=True)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -np.log(chances[rows, targets]).mean()
    errors = chances.copy()
    errors[rows, targets] -= 1
    return loss, errors / len(targets)


def gradient_of(model, features, errors):
    """The gradient by name of what has such a slope by the logits."""
    inner = features @ model["V"].T + model["c"]
    below = (errors @ model["W"]) * (inner > 0)
    return {
        "V": below.T @ features, "c": below.sum(axis=0), "W": errors.T @ np.maximum(inner, 0),
        "b": errors.sum(axis=0),
    }  # fmt: skip


def losses_and_gradient(model, features, targets):
    """Mean cross-entropy, and its gradient by name."""
    loss, errors = cross_entropy(logits_of(model, features), targets)
    return loss, gradient_of(model, features, errors)


def client_update(base, personal, features, targets, *, lr, steps):
    """Algorithm 1: steps on all of a client's samples; returns (base, personal)."""
    model = {**base, **personal}
    for _ in range(steps):
        _, gradient = losses_and_gradient(model, features, targets)
        model = {name: model[name] - lr * gradient[name] for name in model}
    return {n: model[n] for n in BASE}, {n: model[n] for n in PERSONAL}


def trained_in_turn(model, phases, *, lr, momentum=0.0, weight_decay=0.0):
    """FedRep's local training: each phase steps some tensors alone; an optimiser for each tensor.

    Args:
        model: The tensors by name.
        phases: (names of the tensors that are trained, batches of features and targets) of each.
        lr: Step size.
        momentum: Heavy ball, without dampening.
        weight_decay: L2 coefficient.
    """
    model, velocity = dict(model), {}
    for names, batches in phases:
        for features, targets in batches:
            _, gradient = losses_and_gradient(model, features, targets)
            for name in names:
                step = gradient[name] + weight_decay * model[name]
                velocity[name] = momentum * velocity.get(name, 0) + step
                model[name] = model[name] - lr * velocity[name]
    return model


def averaged(start, counts, cohorts, train):
    """Algorithm 2 with absences: (base, personal layers of every client) after the cohorts' rounds.

    Args:
        start: The initial model, from which every client's personal layers start.
        counts: Samples by client.
        cohorts: Who takes part, round by round.
        train: `(server_round, client, model) -> model`, of all tensors.
    """
    base = {name: start[name] for name in BASE}
    personal = {client: {name: start[name] for name in PERSONAL} for client in range(len(counts))}
    for server_round, cohort in enumerate(cohorts, start=1):
        trained = [train(server_round, client, {**base, **personal[client]}) for client in cohort]
        for client, model in zip(cohort, trained, strict=True):
            personal[client] = {name: model[name] for name in PERSONAL}
        shares = np.array([counts[client] for client in cohort], dtype=float)
        shares /= shares.sum()
        base = {n: sum(s * t[n] for s, t in zip(shares, trained, strict=True)) for n in BASE}
    return base, personal


def rounds(start, samples, cohorts, *, lr, steps):
    """FedPer's rounds, each of so many steps on all of a client's samples; see `averaged`."""

    def train(server_round, client, model):
        base, personal = client_update(model, model, *samples[client], lr=lr, steps=steps)
        return {**base, **personal}

    return averaged(start, [len(targets) for _, targets in samples], cohorts, train)
