"""Local objectives of federated learning in float64, written from their papers.

FedSAM: Qu et al. 2022 (arXiv:2206.02618), Algorithm 1. A model is a flat vector; `gradient(w,
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
