"""Federated adversarial learning in float64, written from the papers. NumPy alone is imported.

Li, Song and Yang 2023 (arXiv:2208.03635), Algorithm 1, with PGD (Madry et al. 2018) as adversary,
and TRADES (Zhang et al. 2019), for softmax regression: logits = features @ W.T + b.
"""

import numpy as np


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def logits_of(model, features):
    return features @ model["W"].T + model["b"]


def losses(model, features, targets):
    """Return each sample's cross-entropy."""
    return -np.log(softmax(logits_of(model, features))[np.arange(len(targets)), targets])


def slope(model, features, targets):
    """Return the gradient of each sample's cross-entropy by its features."""
    apart = softmax(logits_of(model, features))
    apart[np.arange(len(targets)), targets] -= 1
    return apart @ model["W"]


def by_model(model, features, targets):
    """Return the gradient of the mean cross-entropy."""
    apart = softmax(logits_of(model, features))
    apart[np.arange(len(targets)), targets] -= 1
    return {"W": apart.T @ features / len(targets), "b": apart.mean(axis=0)}


def projected(points, around, radius, norm):
    change = points - around
    if norm == "inf":
        return around + np.clip(change, -radius, radius)
    length = np.linalg.norm(change, axis=1, keepdims=True)
    return around + change * np.minimum(1, radius / np.maximum(length, 1e-300))


def pgd(features, rises, *, radius, step, steps, norm, start=None, box=None):
    """Return the moved samples; `rises(points)` is the gradient of each sample's loss."""
    points = features if start is None else projected(features + start, features, radius, norm)
    if box is not None:
        points = np.clip(points, *box)
    for _ in range(steps):
        found = rises(points)
        if norm == "inf":
            way = np.sign(found)
        else:
            way = found / np.linalg.norm(found, axis=1, keepdims=True)
        points = projected(points + step * way, features, radius, norm)
        if box is not None:
            points = np.clip(points, *box)
    return points


def divergence(p, q):
    return (p * np.log(p / q)).sum(axis=1)


def divergence_slope(model, clean, points):
    """Return the gradient of KL(p || q(x)) by x, where q is the softmax at x."""
    return (softmax(logits_of(model, points)) - clean) @ model["W"]


def trades_by_model(model, features, targets, moved, beta):
    """Return the gradient of mean[loss(x, y) + beta * KL(p(x) || p(moved))], moved constant."""
    found = by_model(model, features, targets)
    p, q = softmax(logits_of(model, features)), softmax(logits_of(model, moved))
    apart = np.log(p / q)
    # by the logits at x: p * (log p/q - sum p log p/q); by those at the moved samples: q - p
    at_x = p * (apart - (p * apart).sum(axis=1, keepdims=True))
    n = len(targets)
    return {
        "W": found["W"] + beta / n * (at_x.T @ features + (q - p).T @ moved),
        "b": found["b"] + beta / n * (at_x + q - p).sum(axis=0),
    }


def client(model, batches, *, lr, attack, kind="adversarial", beta=0.0, mix=0.0, starts=None):
    """Return the model after these steps on moved samples.

    Args:
        model: {"W": [C, d], "b": [C]}.
        batches: (features, targets) of each step.
        lr: eta_local.
        attack: Arguments of `pgd`.
        kind: "adversarial", "trades" or "mixed".
        beta: Of "trades".
        mix: Weight of the moved samples' loss, of "mixed".
        starts: Where each step's attack begins, or None.
    """
    for step, (features, targets) in enumerate(batches):
        now, clean = dict(model), softmax(logits_of(model, features))
        start = None if starts is None else starts[step][: len(targets)]

        def rises(points, now=now, clean=clean, targets=targets):
            if kind == "trades":
                return divergence_slope(now, clean, points)
            return slope(now, points, targets)

        moved = pgd(features, rises, start=start, **attack)
        if kind == "trades":
            found = trades_by_model(model, features, targets, moved, beta)
        else:
            found = by_model(model, moved, targets)
            if kind == "mixed":
                plain = by_model(model, features, targets)
                found = {n: (1 - mix) * plain[n] + mix * found[n] for n in found}
        model = {n: tensor - lr * found[n] for n, tensor in model.items()}
    return model


def fal(model, cohorts, batches_of, counts, *, server_lr=1.0, starts_of=None, **options):
    """Return the model after the rounds; clients count by `counts`."""
    for server_round, cohort in enumerate(cohorts, start=1):
        share = np.array([counts[c] for c in cohort]) / sum(counts[c] for c in cohort)
        ends = [
            client(
                model,
                batches_of(server_round, c),
                starts=None if starts_of is None else starts_of(server_round, c),
                **options,
            )
            for c in cohort
        ]
        model = {
            n: tensor
            + server_lr * sum(p * (e[n] - tensor) for p, e in zip(share, ends, strict=True))
            for n, tensor in model.items()
        }
    return model
