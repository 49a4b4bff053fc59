"""Federated averaging of multinomial logistic regression in float64, written from the papers.

McMahan et al. 2017 (arXiv:1602.05629), Algorithm 1; the proximal term of Li et al. 2020
(arXiv:1812.06127), equation 2; Adam of Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1; AdamW
of Loshchilov and Hutter 2019 (arXiv:1711.05101), Algorithm 2. NumPy alone is imported, so that
nothing here can agree with the code under test by sharing it.
"""

import numpy as np

NAMES = ("W", "b")


def probabilities(model, features):
    """Softmax of `W x + b`, one row per sample."""
    logits = features @ model["W"].T + model["b"]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def loss(model, features, targets):
    """Mean cross-entropy."""
    return float(-np.log(probabilities(model, features)[np.arange(len(targets)), targets]).mean())


def accuracy(model, features, targets):
    """Share of samples whose largest logit is their class."""
    return float((probabilities(model, features).argmax(axis=1) == targets).mean())


def gradient(model, features, targets):
    """Gradient of the mean cross-entropy."""
    errors = probabilities(model, features)
    errors[np.arange(len(targets)), targets] -= 1
    errors /= len(targets)
    return {"W": errors.T @ features, "b": errors.sum(axis=0)}


def no_memory():
    """Moments before the first step."""
    return {"steps": 0, "first": dict.fromkeys(NAMES, 0.0), "second": dict.fromkeys(NAMES, 0.0)}


def client_update(
    received, batches, memory, *, lr, momentum=0.0, weight_decay=0.0, clip=None, proximal=0.0,
    adam=False, decoupled=False, betas=(0.9, 0.999), epsilon=1e-8,
):  # fmt: skip
    """Train on the batches in turn; returns (model, memory, mean loss over the samples seen).

    The gradient of the whole objective, proximal term included, is clipped; weight decay belongs to
    the optimiser and comes after.
    """
    w = {name: received[name].copy() for name in NAMES}
    steps = memory["steps"]
    first, second = dict(memory["first"]), dict(memory["second"])
    total = seen = 0.0
    for features, targets in batches:
        total += loss(w, features, targets) * len(targets)
        seen += len(targets)
        g = gradient(w, features, targets)
        for name in NAMES:  # gradient of mu/2 |w - w_t|^2
            g[name] = g[name] + proximal * (w[name] - received[name])
        if clip is not None:
            norm = np.sqrt(sum((g[name] ** 2).sum() for name in NAMES))
            scale = min(1.0, clip / (norm + 1e-6))
            g = {name: scale * g[name] for name in NAMES}
        steps += 1
        for name in NAMES:
            d = g[name] + (0.0 if decoupled else weight_decay) * w[name]
            if adam:
                first[name] = betas[0] * first[name] + (1 - betas[0]) * d
                second[name] = betas[1] * second[name] + (1 - betas[1]) * d**2
                m = first[name] / (1 - betas[0] ** steps)
                v = second[name] / (1 - betas[1] ** steps)
                apart = weight_decay * w[name] if decoupled else 0.0  # AdamW's Algorithm 2, line 12
                w[name] = w[name] - lr * (m / (np.sqrt(v) + epsilon) + apart)
            else:
                first[name] = momentum * first[name] + d
                w[name] = w[name] - lr * first[name]
    memory = {"steps": steps, "first": first, "second": second}
    return w, memory, (total / seen if seen else 0.0)


def server_update(model, models, counts, *, server_lr=1.0, weighted=True):
    """w + eta_g * sum_k p_k (w_k - w), with p_k = n_k / n, or 1/K."""
    shares = np.asarray(counts if weighted else np.ones(len(counts)), dtype=np.float64)
    shares = shares / shares.sum()
    return {
        name: model[name]
        + server_lr * sum(p * (m[name] - model[name]) for p, m in zip(shares, models, strict=True))
        for name in NAMES
    }
