"""Robust aggregation rules in float64, written from their papers. NumPy alone is imported."""

import numpy as np


def finite(updates):
    rows = np.asarray(updates, dtype=np.float64)
    return rows[np.isfinite(rows).all(axis=1)]


def unit_mean(gradients):
    """(1/p) sum_i g_i / ||g_i||, zero rows counted."""
    rows = finite(gradients)
    largest = np.abs(rows).max(axis=1, initial=0.0)
    total = np.zeros(rows.shape[1])
    for row, peak in zip(rows, largest, strict=True):
        if peak:
            total += row / peak / np.linalg.norm(row / peak)
    return total / max(1, len(rows))


def coordinate_median(updates):
    """The middle value, or the mean of the middle two, coordinate by coordinate."""
    found = []
    for column in finite(updates).T:
        values = sorted(column)
        middle = len(values) // 2
        odd = len(values) % 2
        found.append(values[middle] if odd else (values[middle - 1] + values[middle]) / 2)
    return np.array(found)


def krum_scores(rows, num_byzantine):
    """s(i), the sum of the n - f - 2 smallest squared distances to others."""
    scores = []
    for i, mine in enumerate(rows):
        squared = sorted(((mine - other) ** 2).sum() for j, other in enumerate(rows) if j != i)
        scores.append(sum(squared[: max(0, len(rows) - num_byzantine - 2)]))
    return scores


def multi_krum(updates, num_byzantine, num_selected=None):
    """The mean of the m best rows, equal scores in the order of the rows."""
    rows = finite(updates)
    scores = krum_scores(rows, num_byzantine)
    order = sorted(range(len(rows)), key=lambda i: (scores[i], i))
    count = len(rows) - num_byzantine if num_selected is None else num_selected
    return rows[order[:count]].mean(axis=0)
