"""SCAFFOLD, FedNova, FedDyn and FedProx in float64, written from the papers.

Karimireddy et al. 2020 (arXiv:1910.06378), Algorithm 1; Wang et al. 2020 (arXiv:2007.07481),
equation 10; Acar et al. 2021 (arXiv:2111.04263), Algorithm 1; Li et al. 2020 (arXiv:1812.06127),
equation 2. A model is a flat vector; `gradient(w, features, targets)` is given. NumPy alone is
imported.
"""

import numpy as np


def scaffold_client(x, c, c_i, batches, gradient, *, lr, option):
    """Return (y, c_i+)."""
    y = x.copy()
    for features, targets in batches:
        y = y - lr * (gradient(y, features, targets) - c_i + c)
    if option == "II":
        return y, c_i - c + (x - y) / (len(batches) * lr)
    counts = [len(targets) for _, targets in batches]
    there = [gradient(x, *batch) for batch in batches]
    return y, sum(n * g for n, g in zip(counts, there, strict=True)) / sum(counts)


def scaffold(x, cohorts, batches_of, clients, gradient, *, lr, server_lr, option):
    """Return (model, c, all c_i) after the rounds."""
    c, own = np.zeros_like(x), [np.zeros_like(x) for _ in range(clients)]
    for server_round, cohort in enumerate(cohorts, start=1):
        ways, changes = [], []
        for i in cohort:
            batches = batches_of(server_round, i)
            y, after = scaffold_client(x, c, own[i], batches, gradient, lr=lr, option=option)
            ways.append(y - x)
            changes.append(after - own[i])
            own[i] = after
        x = x + server_lr * np.mean(ways, axis=0)
        c = c + np.sum(changes, axis=0) / clients
    return x, c, own


def descent(x, batches, gradient, *, lr, momentum=0.0):
    """Return (the model after these steps, |a|_1): the coefficients added up one by one."""
    w, moment, ages = x.copy(), np.zeros_like(x), []
    for features, targets in batches:
        moment = momentum * moment + gradient(w, features, targets)
        w = w - lr * moment
        ages.append(0)
        # the gradient of k steps ago has moved the model by 1 + rho + ... + rho^k
        ages = [age + 1 for age in ages]
    return w, sum(sum(momentum**k for k in range(age)) for age in ages)


def fednova(x, cohorts, batches_of, counts, gradient, *, lr, momentum, server_lr):
    """Return the model after the rounds."""
    for server_round, cohort in enumerate(cohorts, start=1):
        p = np.array([counts[i] for i in cohort]) / sum(counts[i] for i in cohort)
        found = [
            descent(x, batches_of(server_round, i), gradient, lr=lr, momentum=momentum)
            for i in cohort
        ]
        tau = np.array([norm for _, norm in found])
        per_step = np.array([(w - x) / norm for w, norm in found])
        x = x + server_lr * (p @ tau) * (p @ per_step)
    return x


def feddyn(x, cohorts, batches_of, clients, gradient, *, lr, alpha):
    """Return (model, h, all lambda_k) after the rounds."""
    h, slopes = np.zeros_like(x), [np.zeros_like(x) for _ in range(clients)]
    for server_round, cohort in enumerate(cohorts, start=1):
        models = []
        for k in cohort:
            w = x.copy()
            for features, targets in batches_of(server_round, k):
                w = w - lr * (gradient(w, features, targets) - slopes[k] + alpha * (w - x))
            slopes[k] = slopes[k] - alpha * (w - x)
            models.append(w)
        h = h - alpha / clients * sum(w - x for w in models)
        x = np.mean(models, axis=0) - h / alpha
    return x, h, slopes


def fedprox(x, cohorts, batches_of, counts, gradient, *, lr, mu):
    """Return the model after the rounds, clients weighted by their examples."""
    for server_round, cohort in enumerate(cohorts, start=1):
        models = []
        for k in cohort:
            w = x.copy()
            for features, targets in batches_of(server_round, k):
                w = w - lr * (gradient(w, features, targets) + mu * (w - x))
            models.append(w)
        x = np.average(models, axis=0, weights=[counts[k] for k in cohort])
    return x
