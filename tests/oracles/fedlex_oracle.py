"""FedLEx in float64, written from the three equations of the paper's figure. NumPy alone.

Interno et al., IJCNN 2024 (arXiv:2506.18640). Logistic regression as in `sgd_oracle`.
"""

import numpy as np


def scaled(d):
    """(D - min) / (max - min), or 1 where all deviate as far, but for rounding."""
    width = d.max() - d.min()
    return np.ones_like(d) if width <= 1e-14 * d.max() else (d - d.min()) / width


def guidance(initial, explored, *, absolute=False, average_first=False):
    """G of one tensor from each explorer's tensor after its exploration."""
    if not len(explored):
        return np.ones_like(initial)
    d = [np.abs(w - initial) if absolute else (initial - w) ** 2 for w in explored]
    if average_first:
        return scaled(sum(d) / len(d))
    return sum(scaled(each) for each in d) / len(d)


def model_guidance(initial, explored, *, floor=0.0, **options):
    """G of a model of named tensors, never below the floor."""
    return {
        name: np.maximum(guidance(initial[name], [w[name] for w in explored], **options), floor)
        for name in initial
    }


def guided_sgd(received, batches, g, gradient, *, lr, momentum=0.0, mask="step"):
    """Local SGD whose step, or gradient, is multiplied by G."""
    w = {name: values.copy() for name, values in received.items()}
    v = {name: np.zeros_like(values) for name, values in w.items()}
    for features, targets in batches:
        grads = gradient(w, features, targets)
        for name in w:
            d = grads[name] * (g[name] if mask == "gradient" else 1.0)
            v[name] = momentum * v[name] + d
            w[name] = w[name] - lr * v[name] * (g[name] if mask == "step" else 1.0)
    return w


def guided_adam(received, batches, g, gradient, *, lr, mask, betas=(0.9, 0.999), epsilon=1e-8):
    """Local Adam whose step, or gradient, is multiplied by G."""
    w = {name: values.copy() for name, values in received.items()}
    first = {name: np.zeros_like(values) for name, values in w.items()}
    second = {name: np.zeros_like(values) for name, values in w.items()}
    for step, (features, targets) in enumerate(batches, start=1):
        grads = gradient(w, features, targets)
        for name in w:
            d = grads[name] * (g[name] if mask == "gradient" else 1.0)
            first[name] = betas[0] * first[name] + (1 - betas[0]) * d
            second[name] = betas[1] * second[name] + (1 - betas[1]) * d**2
            m = first[name] / (1 - betas[0] ** step)
            s = second[name] / (1 - betas[1] ** step)
            taken = lr * m / (np.sqrt(s) + epsilon)
            w[name] = w[name] - taken * (g[name] if mask == "step" else 1.0)
    return w


def server(model, velocity, models, counts, *, momentum=0.0, server_lr=1.0):
    """v = mu v + (1 - mu) sum p_i (w_i - w); w + eta v."""
    shares = np.asarray(counts, dtype=np.float64) / np.sum(counts)
    after, moved = {}, {}
    for name in model:
        mean = sum(p * (m[name] - model[name]) for p, m in zip(shares, models, strict=True))
        moved[name] = momentum * velocity[name] + (1 - momentum) * mean
        after[name] = model[name] + server_lr * moved[name]
    return after, moved
