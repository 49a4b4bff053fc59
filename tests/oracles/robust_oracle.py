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


def least(places, *keys):
    """Those with the least first key, among these those with the least second, and so on.

    Equal is what differs by 1e-11 of itself: far more than rounding makes, far less than chance.
    """
    for key in keys:
        bound = min(key[i] for i in places)
        places = [i for i in places if key[i] <= bound + 1e-11 * abs(bound)]
    return places


def best(count, *keys):
    """How much of each is among the best: the last ones share what is left when they are equal."""
    left, taken = list(range(len(keys[0]))), np.zeros(len(keys[0]))
    while count > 0:
        equal = least(left, *keys)
        taken[equal] = min(1, count / len(equal))
        left = [i for i in left if i not in equal]
        count -= len(equal)
    return taken


def krum_scores(rows, num_byzantine):
    """s(i), the sum of the n - f - 2 smallest squared distances to others."""
    scores = []
    for i, mine in enumerate(rows):
        squared = sorted(((mine - other) ** 2).sum() for j, other in enumerate(rows) if j != i)
        scores.append(sum(squared[: max(0, len(rows) - num_byzantine - 2)]))
    return scores


def keys(distances, neighbours):
    """The scores; by what equal ones go: a neighbour more, and more, until all count."""
    ordered = np.array([sorted(np.delete(mine, i)) for i, mine in enumerate(distances)])
    first = max(0, min(neighbours, len(ordered) - 1))
    return [ordered[:, :count].sum(axis=1) for count in range(first, len(ordered))]


def krum_keys(rows, num_byzantine):
    squares = [[((mine - other) ** 2).sum() for other in rows] for mine in rows]
    return [*keys(squares, len(rows) - num_byzantine - 2), rows.sum(axis=1)]


def multi_krum(updates, num_byzantine, num_selected=None):
    """The mean of the m best rows."""
    rows = finite(updates)
    count = len(rows) - num_byzantine if num_selected is None else num_selected
    return best(count, *krum_keys(rows, num_byzantine)) @ rows / count


def trimmed_mean(updates, num_byzantine):
    """Sort each coordinate, leave out f at both ends, average."""
    columns = np.sort(finite(updates), axis=0)
    return columns[num_byzantine : len(columns) - num_byzantine].mean(axis=0)


def nearest_mean(rows, centre, count):
    """Of each coordinate, the mean of the values nearest a centre; equal ones share the rest."""
    return np.array([
        best(count, np.abs(column - middle)) @ column / count
        for column, middle in zip(rows.T, centre, strict=True)
    ])  # fmt: skip


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
        equal = least(range(len(left)), *krum_keys(np.array(left), f))
        chosen.append(left.pop(equal[0]))
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
        squared = [((mine - other) ** 2).sum() for other in rows]
        count = len(rows) - num_byzantine
        mixed.append(best(count, squared) @ rows / count)
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


def flag_keys(rows, neighbours):
    lengths = [[np.linalg.norm(mine - other) for other in rows] for mine in rows]
    return [*keys(lengths, neighbours), rows.sum(axis=1)]


def flag_multi_krum(updates, num_byzantine):
    rows = finite(updates)
    count = len(rows) - num_byzantine - 2
    return best(count, *flag_keys(rows, count + 1)) @ rows / count


def flag_meamed(updates, num_byzantine):
    rows = finite(updates)
    return nearest_mean(rows, lower_median(rows), len(rows) - num_byzantine)


def flag_bulyan(updates, num_byzantine):
    """Means of the best, each without the best of the one before; then around their median."""
    rows = finite(updates)
    most = len(rows) - num_byzantine - 2
    order = flag_keys(rows, most)
    left = [best(most, *order) - best(i, *order) for i in range(most - num_byzantine)]
    means = np.array([each @ rows / each.sum() for each in left])
    return nearest_mean(means, lower_median(means), len(means) - 2 * num_byzantine)
