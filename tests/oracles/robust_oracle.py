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


def trimmed_mean(updates, num_byzantine):
    """Sort each coordinate, leave out f at both ends, average."""
    columns = np.sort(finite(updates), axis=0)
    return columns[num_byzantine : len(columns) - num_byzantine].mean(axis=0)


def nearest_mean(rows, centre, count):
    """Of each coordinate, the mean of the values nearest a centre; of equal ones the smaller."""
    found = []
    for column, middle in zip(rows.T, centre, strict=True):
        found.append(np.mean(sorted(column, key=lambda v: (abs(v - middle), v))[:count]))
    return np.array(found)


def meamed(updates, num_byzantine):
    rows = finite(updates)
    return nearest_mean(rows, coordinate_median(rows), len(rows) - num_byzantine)


def phocas(updates, num_byzantine):
    rows = finite(updates)
    return nearest_mean(rows, trimmed_mean(rows, num_byzantine), len(rows) - num_byzantine)


def bulyan(updates, num_byzantine):
    """Krum again and again, each time without the row that it chose; then around the median."""
    left = list(finite(updates))
    chosen = []
    for _ in range(len(left) - 2 * num_byzantine):
        # at least one neighbour, as long as there is another row
        f = min(num_byzantine, max(len(left) - 3, len(left) - 2 - (len(left) - 1)))
        scores = krum_scores(np.array(left), f)
        chosen.append(left.pop(int(np.argmin(scores))))
    rows = np.array(chosen)
    return nearest_mean(rows, coordinate_median(rows), len(rows) - 2 * num_byzantine)


def sum_of_distances(updates, point, weights=None):
    lengths = np.linalg.norm(finite(updates) - point, axis=1)
    return float(lengths.sum() if weights is None else lengths @ weights)


def centred_clipping(updates, radius, iterations, centre):
    v = np.array(centre, dtype=np.float64)
    for _ in range(iterations):
        rows = finite(updates)
        step = np.zeros_like(v)
        for row in rows:
            step += (row - v) * min(1.0, radius / max(np.linalg.norm(row - v), 1e-300))
        v = v + step / len(rows)
    return v


def nearest_neighbour_mixing(updates, num_byzantine):
    rows = finite(updates)
    mixed = []
    for mine in rows:
        order = np.argsort([((mine - other) ** 2).sum() for other in rows], kind="stable")
        mixed.append(rows[order[: len(rows) - num_byzantine]].mean(axis=0))
    return np.array(mixed)


def clipping(updates, norm):
    return np.array([row * min(1.0, norm / np.linalg.norm(row)) for row in finite(updates)])


def adaptive_clipping(updates, num_byzantine):
    rows = finite(updates)
    lengths = np.sort(np.linalg.norm(rows, axis=1))
    clipped = int(2 * num_byzantine / len(rows) * (len(rows) - num_byzantine) + 1e-9)
    return clipping(rows, lengths[len(rows) - clipped - 1])


# --- what the Flag Aggregator's library does, from its description -------------------------------


def lower_median(rows):
    return np.sort(rows, axis=0)[(len(rows) - 1) // 2]


def flag_scores(rows, neighbours):
    scores = []
    for i, mine in enumerate(rows):
        lengths = sorted(np.linalg.norm(mine - other) for j, other in enumerate(rows) if j != i)
        scores.append(sum(lengths[:neighbours]))
    return np.argsort(scores, kind="stable")


def flag_multi_krum(updates, num_byzantine):
    rows = finite(updates)
    best = flag_scores(rows, len(rows) - num_byzantine - 1)
    return rows[best[: len(rows) - num_byzantine - 2]].mean(axis=0)


def flag_meamed(updates, num_byzantine):
    rows = finite(updates)
    return nearest_mean(rows, lower_median(rows), len(rows) - num_byzantine)


def flag_bulyan(updates, num_byzantine):
    """Means of the best, each without the best of the one before; then around their median."""
    rows = finite(updates)
    most = len(rows) - num_byzantine - 2
    order = flag_scores(rows, most)
    means = np.array([rows[order[i:most]].mean(axis=0) for i in range(most - num_byzantine)])
    return nearest_mean(means, lower_median(means), len(means) - 2 * num_byzantine)
