"""Server optimisers, written from specs/fedopt.md: Reddi et al. 2021 (arXiv:2003.00295).

NumPy alone is imported, so that nothing here can agree with the code under test by sharing it. Each
coordinate is followed by itself, in Python's floats.
"""

import math

import numpy as np

RULES = ("sgd", "adagrad", "adam", "yogi")


def second_moment(rule, v, delta, beta2):
    """v_t of one coordinate."""
    if rule == "adagrad":
        return v + delta * delta
    if rule == "adam":
        return beta2 * v + (1 - beta2) * delta * delta
    above = (v > delta * delta) - (v < delta * delta)
    return v - (1 - beta2) * delta * delta * above


def follow(
    rule, x, means, *, lr, beta1=0.0, beta2=0.0, tau=1e-3, v0=None, correction=None, momentum=0.0
):
    """(m, v, x), each `[dim]`, after every round; a mean of None is a round without replies.

    `correction` maps the number of the round, from 1 and rounds without replies counted, to the
    exponent of Adam's bias correction.
    """
    x = [float(value) for value in x]
    m = [0.0] * len(x)
    v = [tau**2 if v0 is None else v0] * len(x)
    found = []
    for number, mean in enumerate(means, start=1):
        for j in range(len(x)) if mean is not None else ():
            delta = float(mean[j])
            if rule == "sgd":
                m[j] = momentum * m[j] + delta
                x[j] += lr * m[j]
                continue
            m[j] = beta1 * m[j] + (1 - beta1) * delta
            v[j] = second_moment(rule, v[j], delta, beta2)
            step = lr
            if correction is not None:
                t = correction(number)
                step *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
            x[j] += step * m[j] / (math.sqrt(v[j]) + tau)
        found.append((np.array(m), np.array(v), np.array(x)))
    return found


def mean_update(updates, weights):
    """sum_i p_i Delta_i with p_i in proportion to the weights; None without any."""
    total = sum(weights)
    if not total:
        return None
    return sum(w / total * np.asarray(u) for w, u in zip(weights, updates, strict=True))
