"""Asynchronous federations from arXiv 2206.10189, 1903.03934 and 2106.06639, in plain floats."""

import math

import numpy as np


def synchronous(times, end):
    """(moment, [(client, version)]) of every aggregation before or at `end`."""
    longest, found, n = max(times), [], 0
    while (n + 1) * longest <= end:
        found.append(((n + 1) * longest, [(i, n) for i in range(len(times))]))
        n += 1
    return found


def asynchronous(times, end):
    """One client after another, each as it comes back."""
    back, version, found = list(times), [0] * len(times), []
    while True:
        client = min(range(len(times)), key=lambda i: (back[i], i))
        moment = back[client]
        if moment > end:
            return found
        found.append((moment, [(client, version[client])]))
        back[client], version[client] = moment + times[client], len(found)


def fixed(times, window, end):
    """All who are back at the next multiple of the window."""
    back, version, found = list(times), [0] * len(times), []
    while (len(found) + 1) * window <= end + 1e-9:
        moment = (len(found) + 1) * window
        there = [i for i in range(len(times)) if back[i] <= moment + 1e-9]
        found.append((moment, [(i, version[i]) for i in there]))
        for i in there:
            back[i], version[i] = moment + times[i], len(found)
    return found


def buffered(times, count, end):
    """The first so many to come back."""
    back, version, found = list(times), [0] * len(times), []
    while True:
        there = sorted(range(len(times)), key=lambda i: (back[i], i))[:count]
        moment = max(back[i] for i in there)
        if moment > end:
            return found
        found.append((moment, sorted((i, version[i]) for i in there)))
        for i in there:
            back[i], version[i] = moment + times[i], len(found)


def rates(schedule, clients):
    """How often each client is part of an aggregation."""
    counts = np.zeros(clients)
    for _, delivered in schedule:
        for client, _ in delivered:
            counts[client] += 1
    return counts / len(schedule)


def oldest(schedule):
    """The largest staleness."""
    return max(n - version for n, (_, there) in enumerate(schedule) for _, version in there)


def quadratics(schedule, centres, lr, weights, start=0.0):
    """The models of a server whose clients take one step on (x - c)^2 / 2."""
    models = [start]
    for _, delivered in schedule:
        step = 0.0
        for client, version in delivered:
            step += weights[client] * -lr * (models[version] - centres[client])
        models.append(models[-1] + step)
    return np.array(models)


def fedasync(model, models, ages, mixing, kind, exponent, slope, after):
    """The mean of the mixtures."""
    moved = np.zeros_like(model)
    for own, age in zip(models, ages, strict=True):
        if kind == "constant":
            counts = 1.0
        elif kind == "polynomial":
            counts = (age + 1.0) ** -exponent
        else:
            counts = 1.0 if age <= after else 1.0 / (slope * (age - after) + 1.0)
        moved += mixing * counts * (own - model)
    return model + moved / max(1, len(models))


def fedbuff(model, updates, ages, most, samples, lr):
    """The mean of the discounted updates that are not too old."""
    total, count = np.zeros_like(model), 0.0
    for update, age, held in zip(updates, ages, samples, strict=True):
        if most is None or age <= most:
            total += held * update / math.sqrt(1 + age)
            count += held
    return model + lr * total / count if count else model


def fedfix(model, updates, importance, known, lr):
    """The sum of importance over rate times update."""
    total = np.zeros_like(model)
    for client, update in updates.items():
        total += importance[client] / known[client] * update
    return model + lr * total
