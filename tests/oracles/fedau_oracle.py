"""FedAU and the baselines it is compared with, written from specs/fedau.md.

Wang and Ji 2024 (arXiv:2306.03401), Gu et al. 2021 (arXiv:2106.04159), Jhunjhunwala et al. 2022
(arXiv:2207.14130). NumPy alone is imported, so that nothing here can agree with the code under test
by sharing it. A weight is the mean of a list of intervals, not a recursion.
"""

import numpy as np


class Client:
    """What the server knows of one client: its closed intervals, and the open one."""

    def __init__(self):
        self.closed, self.open = [], 0

    @property
    def weight(self):
        return float(np.mean(self.closed)) if self.closed else 1.0

    def count(self, took_part, cutoff):
        self.open += 1
        if took_part or self.open >= cutoff:
            self.closed.append(self.open)
            self.open = 0


def follow(participation, cutoff=np.inf):
    """Returns (weights used in every round, `[rounds, clients]`; the clients afterwards)."""
    clients = [Client() for _ in range(np.shape(participation)[1])]
    used = []
    for took_part in participation:
        used.append([client.weight for client in clients])
        for client, present in zip(clients, took_part, strict=True):
            client.count(present, cutoff)
    return np.array(used), clients


def bernoulli_limit(rate, cutoff):
    """E[min(G, K)] of a geometric gap G."""
    return (1 - (1 - rate) ** cutoff) / rate


def markov_limit(rate, activation, cutoff):
    """E[gap] / E[intervals per gap] of a two-state chain, whose mean gap is 1/p."""
    leave = activation * (1 / rate - 1)
    stay_away = 1 - activation
    # P(gap > m) = leave * stay_away^(m - 1) for m >= 1; a gap g is closed ceil(g / K) times
    closures = 1 + sum(leave * stay_away ** (cutoff * j - 1) for j in range(1, 10_000))
    return 1 / rate / closures


def fedau(x, updates, weights, *, clients, lr=1.0):
    """x + (eta / N) sum_A omega_n Delta_n; `updates` and `weights` by participant."""
    return x + lr / clients * sum(
        (weights[n] * update for n, update in updates.items()), np.zeros_like(x)
    )


def average_participating(x, updates, *, lr=1.0):
    """x + eta mean_A Delta_n; nobody: x."""
    return x + lr * np.mean(list(updates.values()), axis=0) if updates else x


def average_all(x, updates, *, clients, lr=1.0):
    """x + (eta / N) sum_A Delta_n."""
    return x + lr / clients * sum(updates.values(), np.zeros_like(x))


def known(x, updates, rates, *, clients, lr=1.0):
    """x + (eta / N) sum_A Delta_n / p_n."""
    return average_all(x, {n: u / rates[n] for n, u in updates.items()}, clients=clients, lr=lr)


def mifa(x, updates, memory, *, lr=1.0):
    """y_n <- Delta_n for A, then x + eta mean_N y_n; returns (x, y)."""
    memory = memory.copy()
    for n, update in updates.items():
        memory[n] = update
    return x + lr * memory.mean(axis=0), memory


def fedvarp(x, updates, memory, *, lr=1.0):
    """x + eta (mean_A (Delta_n - y_n) + mean_N y_n), then y_n <- Delta_n; returns (x, y)."""
    if not updates:
        return x, memory
    fresh = np.mean([update - memory[n] for n, update in updates.items()], axis=0)
    x = x + lr * (fresh + memory.mean(axis=0))
    memory = memory.copy()
    for n, update in updates.items():
        memory[n] = update
    return x, memory
