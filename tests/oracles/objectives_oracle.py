"""Local objectives of federated learning in float64, written from their papers.

FedSAM: Qu et al. 2022 (arXiv:2206.02618), Algorithm 1; FedLC: Zhang et al. 2022 (arXiv:2209.00189),
section 4; FedRS: Li and Zhan 2021, equation 5; FedNTD: Lee et al. 2022 (arXiv:2106.03097),
equations 3 to 5. A model is a flat vector; `gradient(w,
features, targets)` is given. NumPy alone is imported.
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
