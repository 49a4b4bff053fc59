"""Drawing some of many samples: exact counts, uniform choice, every draw from a generator."""

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.ties import ROUNDING, ranks, whole
from fedsim.data.federated import Ints


def choose(groups: Ints, counts: Ints, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Mark `counts[g]` members of each group g, drawn uniformly without replacement.

    Args:
        groups: The group of each member.
        counts: How many to mark of each group, at most its size.
        generator: Where to draw from.
    """
    order = np.lexsort((generator.random(len(groups)), groups))
    sizes = np.bincount(groups, minlength=len(counts))
    rank = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    marked = np.zeros(len(groups), dtype=np.bool_)
    marked[order] = rank < np.repeat(counts, sizes)
    return marked


def hand_out(labels: Ints, counts: Ints, generator: np.random.Generator) -> Ints:
    """Give each client its number of samples of each class, drawn uniformly among the class.

    Args:
        labels: The class of each sample, `[n]`.
        counts: Samples of each class that each client gets, `[classes, clients]`; a row's sum is at
            most the size of its class.
        generator: Where to draw from.

    Returns:
        The owner of each sample, `[n]`; -1 for what is left of a class.
    """
    classes, clients = counts.shape
    left = np.bincount(labels, minlength=classes) - counts.sum(axis=1)
    # samples sorted by class and shuffled within each: client 0 gets the first counts[0, 0], ...
    order = np.lexsort((generator.random(len(labels)), labels))
    takers = np.tile(np.append(np.arange(clients), -1), classes)
    owners = np.empty(len(labels), dtype=np.int64)
    owners[order] = np.repeat(takers, np.column_stack([counts, left]).reshape(-1))
    return owners


def cut_largest(sizes: Ints, total: int, floor: int) -> Ints:
    """Return how much each gives so that all give `total`: the largest are cut to one level.

    Args:
        sizes: What each has.
        total: What is needed; at most the sum of what lies above `floor`.
        floor: What nobody falls below by giving.

    Example:
        >>> cut_largest(np.array([9, 2, 7]), 5, 1).tolist()
        [3, 0, 2]
    """
    low, high = floor, max(int(sizes.max()), floor)
    while low < high:  # the highest level that frees enough
        level = (low + high + 1) // 2
        if np.maximum(sizes - level, 0).sum() >= total:
            low = level
        else:
            high = level - 1
    given: Ints = np.maximum(sizes - low, 0)
    donors = np.flatnonzero(given)
    given[donors[: given.sum() - total]] -= 1
    return given


def add_label_noise(
    targets: Ints, owners: Ints, shares: npt.NDArray[np.float64], classes: int, seed: int
) -> Ints:
    """Return the targets with a share of each client's drawn anew, uniformly over all classes.

    Args:
        targets: `[n]`.
        owners: The client of each sample, `[n]`.
        shares: How much of each client's samples is drawn anew, rounded to whole samples.
        classes: C; the new label may be the old one.
        seed: The scenario's seed.
    """
    generator = rng.generator(seed, "label noise")
    sizes = np.bincount(owners, minlength=len(shares))
    counts = whole(sizes * shares + 0.5)
    redrawn = choose(owners, counts, generator)
    return np.where(redrawn, generator.integers(classes, size=len(targets)), targets)


def stratified_counts(class_sizes: Ints, fraction: float) -> Ints:
    """Return how many of each class make that fraction of all, by largest remainders.

    Example:
        >>> stratified_counts(np.array([10, 10, 5]), 0.25).tolist()
        [3, 2, 1]
    """
    exact = np.asarray(class_sizes * fraction, dtype=np.float64)
    return largest_remainders(exact, int(whole(class_sizes.sum() * fraction + 0.5)))


def largest_remainders(exact: npt.NDArray[np.float64], total: int) -> Ints:
    """Return whole numbers next to `exact` that add up to `total`; ties go to the first.

    Args:
        exact: Numbers >= 0 whose sum is within one of `total`.
        total: What the result adds up to.

    Example:
        >>> largest_remainders(np.array([1.5, 0.7, 2.8]), 5).tolist()
        [1, 1, 3]
    """
    counts = whole(exact)
    left = total - int(counts.sum())
    slack = ROUNDING * np.maximum(1, exact)
    counts[ranks([(counts - exact, slack)]).argsort(kind="stable")[:left]] += 1
    return counts


def local_test_counts(sizes: Ints, fraction: float) -> Ints:
    """Return how many of each client's samples are its local test split; one is left to train.

    Example:
        >>> local_test_counts(np.array([0, 1, 2, 10, 25]), 0.1).tolist()
        [0, 0, 0, 1, 3]
    """
    wanted = whole(sizes * fraction + 0.5)
    counts: Ints = np.minimum(wanted, np.maximum(sizes - 1, 0))
    return counts
