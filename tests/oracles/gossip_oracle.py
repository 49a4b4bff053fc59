"""Gossip averaging in float64, written from the paper's Algorithm 3 and the simulators' protocol.

Tian et al. 2024 (arXiv:2404.04616). NumPy alone is imported, so that nothing here can agree with
the code under test by sharing it. A model is a dictionary of arrays; a graph a list of sets.
"""

import numpy as np


def average(own, received, *, beta=0.5, weights=None):
    """beta * theta_j + (1 - beta) * weighted mean of the received."""
    received = np.asarray(received, dtype=np.float64)
    shares = np.ones(len(received)) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = np.tensordot(shares / shares.sum(), received, axes=1)
    return beta * np.asarray(own, dtype=np.float64) + (1 - beta) * mean


def corrected_average(own, received, *, beta=0.5, weights=None, target="received", scale=1.0):
    """The average, rescaled about its mean to the mean variance of what it was made of."""
    sound = [k for k, tensor in enumerate(received) if np.isfinite(tensor).all()]
    received = [np.asarray(received[k], dtype=np.float64) for k in sound]
    own = np.asarray(own, dtype=np.float64)
    if not received:
        return own
    weights = np.ones(len(received)) if weights is None else np.asarray(weights, float)[sound]
    mix = average(own, received, beta=beta, weights=weights)
    tau = float(np.average([tensor.var() for tensor in received], weights=weights))
    if target == "all":
        tau = beta * own.var() + (1 - beta) * tau
    tau *= scale
    if mix.size == 1 or mix.var() <= 1e-12 * max(tau, 1e-30):
        return mix
    return mix.mean() + np.sqrt(tau / mix.var()) * (mix - mix.mean())


def metropolis(graph, node, other):
    """1 / (1 + max(d_i, d_j))."""
    return 1 / (1 + max(len(graph[node]), len(graph[other])))


def mix_node(own, received, *, beta, weights, corrected, target, scale):
    """One node's next model: listed tensors corrected, the others plainly averaged."""
    return {
        name: corrected_average(
            own[name], [model[name] for model in received],
            beta=beta, weights=weights, target=target, scale=scale,
        )
        if name in corrected
        else average(own[name], [model[name] for model in received], beta=beta, weights=weights)
        for name in own
    }  # fmt: skip


def synchronous_round(
    models, updates, graph, *, beta=0.5, mixing="uniform", corrected=(), target="received",
    scale=1.0, lost=(),
):  # fmt: skip
    """Train those in `updates`, exchange among them, average; `lost` has (sender, receiver)."""
    trained = [
        {name: model[name] + updates[k][name] for name in model} if k in updates else model
        for k, model in enumerate(models)
    ]
    after = list(trained)
    for node in updates:
        senders = [j for j in sorted(graph[node]) if j in updates and (j, node) not in lost]
        if not senders:
            continue
        weights, own = [1.0] * len(senders), beta
        if mixing == "metropolis":
            weights = [metropolis(graph, node, j) for j in senders]
            own = 1 - sum(weights)
        after[node] = mix_node(
            trained[node], [trained[j] for j in senders],
            beta=own, weights=weights, corrected=corrected, target=target, scale=scale,
        )  # fmt: skip
    return after


def buffered_ticks(models, ticks, graph, *, beta=0.5, ratio=1.0, corrected=(), target="received"):
    """The simulators' protocol; each tick is (updates of those that train, who is online).

    Returns:
        The models after every tick, and who averaged in it.
    """
    buffers = [[] for _ in models]
    found = []
    for updates, online in ticks:
        models = [
            {name: model[name] + updates[k][name] for name in model} if k in updates else model
            for k, model in enumerate(models)
        ]
        for sender in sorted(updates):
            for receiver in graph[sender]:
                if receiver in online:
                    buffers[receiver].append(models[sender])
        after, averaged = list(models), []
        for node in online:
            if buffers[node] and len(buffers[node]) >= ratio * len(graph[node]):
                after[node] = mix_node(
                    models[node], buffers[node],
                    beta=beta, weights=None, corrected=corrected, target=target, scale=1.0,
                )  # fmt: skip
                buffers[node] = []
                averaged.append(node)
        models = after
        found.append((models, averaged))
    return found
