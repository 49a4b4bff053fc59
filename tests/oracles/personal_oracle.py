"""APFL, Ditto, pFedMe and Per-FedAvg in float64, written from the papers.

Deng et al. (arXiv:2003.13461), Algorithm 1; Li et al. 2021 (arXiv:2012.04221), Algorithm 1; Dinh et
al. 2020 (arXiv:2006.08848), Algorithm 1; Fallah et al. 2020 (arXiv:2002.07948), equations 6 to 8. A
model is a flat vector; `gradient(w, features, targets)` is given. NumPy alone is imported.
"""

import numpy as np


def apfl_client(w, v, alpha, batches, gradient, *, lr, alpha_lr, after=False, once=False, ridge=0):
    """Return (w, v, alpha) after the local steps; alpha_lr None leaves alpha as it is."""
    for place, (features, targets) in enumerate(batches):
        stepped = w - lr * gradient(w, features, targets)
        shared = stepped if after else w
        slope = gradient(alpha * v + (1 - alpha) * shared, features, targets)
        moved = v - lr * alpha * slope
        if alpha_lr is not None and not (once and place):
            alpha = np.clip(alpha - alpha_lr * ((v - shared) @ slope + ridge * alpha), 0, 1)
        w, v = stepped, moved
    return w, v, alpha


def apfl_outputs_client(w, v, alpha, batches, held_out, network, *, lr, alpha_lr):
    """Return (w, v, alpha) after the local steps, where outputs are mixed; models are by name.

    Args:
        w: The shared model.
        v: The private one.
        alpha: The share of the private one's outputs.
        batches: (features, targets) of each step.
        held_out: The samples for alpha of each step; None takes those of the step.
        network: (outputs of a model, loss and slope of outputs, gradient of a model by that slope).
        lr: Step size of the models.
        alpha_lr: That of alpha.
    """
    outputs, loss, gradient = network
    for place, (features, targets) in enumerate(batches):
        mixed = alpha * outputs(v, features) + (1 - alpha) * outputs(w, features)
        slope = loss(mixed, targets)[1]
        by_v = gradient(v, features, alpha * slope)
        by_w = gradient(w, features, loss(outputs(w, features), targets)[1])
        seen, labels = (features, targets) if held_out is None else held_out[place]
        mine, theirs = outputs(v, seen), outputs(w, seen)
        by_alpha = ((mine - theirs) * loss(alpha * mine + (1 - alpha) * theirs, labels)[1]).sum()
        v = {name: v[name] - lr * by_v[name] for name in v}
        w = {name: w[name] - lr * by_w[name] for name in w}
        alpha = np.clip(alpha - alpha_lr * by_alpha, 0, 1)
    return w, v, alpha


def ditto_client(w, v, batches, gradient, *, lr, strength):
    """Return (w, v) after the local steps."""
    received = w
    for features, targets in batches:
        v = v - lr * (gradient(v, features, targets) + strength * (v - received))
        w = w - lr * gradient(w, features, targets)
    return w, v


def pfedme_client(w, batches, gradient, *, lr, strength, inner_steps, inner_lr):
    """Return (w, theta) after the local steps."""
    theta = w
    for features, targets in batches:
        theta = w
        for _ in range(inner_steps):
            slope = gradient(theta, features, targets) + strength * (theta - w)
            theta = theta - inner_lr * slope
        w = w - lr * strength * (w - theta)
    return w, theta


def per_fedavg_client(w, batches, gradient, *, lr, alpha, delta=None):
    """Return w after the local steps; delta None is the first-order form."""
    for features, targets in batches:
        ahead = gradient(w - alpha * gradient(w, features, targets), features, targets)
        step = ahead
        if delta is not None:
            plus = gradient(w + delta * ahead, features, targets)
            minus = gradient(w - delta * ahead, features, targets)
            step = ahead - alpha * (plus - minus) / (2 * delta)
        w = w - lr * step
    return w


def averaged(x, cohorts, train, counts):
    """Return the model after the rounds; `train(round, client, x)` gives a client's model."""
    for server_round, cohort in enumerate(cohorts, start=1):
        models = [train(server_round, client, x) for client in cohort]
        x = np.average(models, axis=0, weights=[counts[client] for client in cohort])
    return x
