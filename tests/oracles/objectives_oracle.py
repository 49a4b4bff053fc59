"""Local objectives of federated learning in float64, written from their papers.

FedSAM: Qu et al. 2022 (arXiv:2206.02618), Algorithm 1; FedLC: Zhang et al. 2022 (arXiv:2209.00189),
section 4; FedRS: Li and Zhan 2021, equation 5; FedNTD: Lee et al. 2022 (arXiv:2106.03097),
equations 3 to 5; MOON: Li, He and Song 2021 (arXiv:2103.16257), Algorithm 1. A model is a flat
vector; `gradient(w, features, targets)` is given. NumPy alone is imported.
"""

import numpy as np


def sharpness_aware(gradient, rho):
    """Return the gradient at w + rho g / |g|."""

    def found(w, features, targets):
        g = gradient(w, features, targets)
        return gradient(w + rho * g / np.linalg.norm(g), features, targets)

    return found


def averaged(x, cohorts, batches_of, counts, gradient_of, *, lr):
    """Return the model after the rounds of federated averaging, clients weighted by their examples.

    `gradient_of(server_round, client, received)` is the gradient that this client descends.
    """
    for server_round, cohort in enumerate(cohorts, start=1):
        models = []
        for k in cohort:
            w, gradient = x.copy(), gradient_of(server_round, k, x)
            for features, targets in batches_of(server_round, k):
                w = w - lr * gradient(w, features, targets)
            models.append(w)
        x = np.average(models, axis=0, weights=[counts[k] for k in cohort])
    return x


def softmax_gradient(w, features, targets, classes, adjust):
    """Gradient of the mean cross-entropy of adjusted logits, W x + b with w = (W, b) flat.

    `adjust` is (factors, less), each `[classes]`: the logits are factors * (W x + b) - less.
    """
    factors, less = adjust
    cut = w.size - classes
    logits = factors * (features @ w[:cut].reshape(classes, -1).T + w[cut:]) - less
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(targets)), targets] -= 1
    errors = factors * p / len(targets)
    return np.concatenate([(errors.T @ features).reshape(-1), errors.sum(axis=0)])


def calibrated(counts, tau):
    """FedLC's adjustment: tau n^(-1/4) less, of a class that is not there with n = 1e-8."""
    counts = np.asarray(counts, dtype=np.float64)
    return np.ones(len(counts)), tau * np.where(counts > 0, counts, 1e-8) ** -0.25


def restricted(counts, alpha):
    """FedRS's adjustment: alpha times the logits of classes that are not there."""
    return np.where(np.asarray(counts) > 0, 1.0, alpha), np.zeros(len(counts))


def not_true_gradient(w, received, features, targets, classes, *, beta, tau):
    """Gradient of beta times FedNTD's distillation from `received`, of W x + b, w = (W, b) flat."""

    def not_true(model):
        cut = model.size - classes
        logits = features @ model[:cut].reshape(classes, -1).T + model[cut:]
        powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / tau)
        powers[np.arange(len(targets)), targets] = 0
        return powers / powers.sum(axis=1, keepdims=True)

    errors = beta * (not_true(w) - not_true(received)) / tau / len(targets)
    return np.concatenate([(errors.T @ features).reshape(-1), errors.sum(axis=0)])


def as_layers(w, features, hidden, classes):
    """Return (W1, b1, W2, b2) of a flat vector."""
    ends = np.cumsum([hidden * features, hidden, classes * hidden])
    one, b1, two, b2 = np.split(w, ends)
    return one.reshape(hidden, features), b1, two.reshape(classes, hidden), b2


def hidden_of(w, features, sizes):
    """What goes into the last layer of an MLP with one hidden layer of rectifiers."""
    one, b1, _, _ = as_layers(w, *sizes)
    return np.maximum(features @ one.T + b1, 0)


def mlp_gradient(w, features, targets, sizes, by_hidden=None):
    """Gradient of the mean cross-entropy, and of a term with this gradient by the hidden values."""
    _, _, two, b2 = as_layers(w, *sizes)
    z = hidden_of(w, features, sizes)
    logits = z @ two.T + b2
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(targets)), targets] -= 1
    p /= len(targets)
    below = (p @ two + (0 if by_hidden is None else by_hidden)) * (z > 0)
    parts = (below.T @ features, below.sum(axis=0), p.T @ z, p.sum(axis=0))
    return np.concatenate([part.reshape(-1) for part in parts])


def contrast_slope(z, there, before, *, tau):
    """Gradient by z of the mean of MOON's term, each `[batch, width]`."""

    def cosine(a, b):
        # a row of zeros is like nothing
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        lengths, own = (np.where(x > 0, x, 1) for x in (lengths, (a * a).sum(axis=1)))
        value = (a * b).sum(axis=1) / lengths
        return value, b / lengths[:, None] - value[:, None] * a / own[:, None]

    (near, by_near), (far, by_far) = cosine(z, there), cosine(z, before)
    share = 1 / (1 + np.exp((near - far) / tau))  # of the last local model in the softmax
    return (share / tau / len(z))[:, None] * (by_far - by_near)


def moon(x, cohorts, batches_of, counts, sizes, *, lr, mu, tau):
    """Return (the model after the rounds, the clients' last local models)."""
    last = {}
    for server_round, cohort in enumerate(cohorts, start=1):
        models = []
        for k in cohort:
            w, before = x.copy(), last.get(k, x)
            for features, targets in batches_of(server_round, k):
                z, there, old = (hidden_of(each, features, sizes) for each in (w, x, before))
                slope = mu * contrast_slope(z, there, old, tau=tau)
                w = w - lr * mlp_gradient(w, features, targets, sizes, slope)
            models.append(w)
            last[k] = w
        x = np.average(models, axis=0, weights=[counts[k] for k in cohort])
    return x, last
