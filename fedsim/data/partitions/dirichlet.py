"""Label skew by Dirichlet laws: each class over the clients, or each client over the classes."""

from functools import partial

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.ties import whole
from fedsim.data.federated import Ints, Samples
from fedsim.data.partitions.drawing import choose, cut_largest, hand_out
from fedsim.data.partitions.partition import (
    Assignment,
    PartitionRule,
    check_clients,
    check_min_size,
    check_number,
    partition_rule,
)
from fedsim.data.partitions.sizes import Law, check_law, law_sizes, law_weights

REDRAWS = 10  # of a partition that misses min_size, before samples are moved

# Concentrations beyond which floating point fails; the law is by then one class, or the common one.
_VANISHING, _HUGE = 1e-6, 1e15

Floats = npt.NDArray[np.float64]


@partition_rule()
def dirichlet(*, alpha: float = 0.5, min_size: int = 0, balanced: bool = False) -> PartitionRule:
    """Divide each class among the clients by proportions from a symmetric Dirichlet law.

    A partition that leaves a client below `min_size` is drawn anew up to ten times; then samples
    drawn from the largest clients move to the small ones, and the manifest says how many.

    Args:
        alpha: Concentration; > 0, small means few classes per client.
        min_size: Samples that each client has at least, its local test split included; >= 0.
        balanced: Whether a client that has more than the average gets nothing of further classes.

    Source: Yurochkin et al., ICML 2019 (arXiv:1905.12022), in the form of flwr-datasets'
    DirichletPartitioner.
    Deviations: samples of a class are shuffled before they are divided; too small a client ends in
    moved samples instead of an error.
    """
    check_number("alpha", alpha, above=0)
    check_number("min_size", min_size)
    return PartitionRule(partial(_dirichlet, alpha, min_size, balanced))


def _dirichlet(
    alpha: float, min_size: int, balanced: bool, samples: Samples, clients: int, seed: int
) -> Assignment:
    labels = samples.labels
    check_clients(clients, len(labels))
    check_min_size(min_size, clients, len(labels))
    for attempt in range(1 + REDRAWS):
        generator = rng.generator(seed, "partition", attempt)
        owners = draw_dirichlet(clients, alpha, balanced, labels, generator)
        sizes = np.bincount(owners, minlength=clients)
        if sizes.min() >= min_size:
            break
    moved = _fill_up(owners, sizes, min_size, generator)
    return Assignment(owners, {"draws": attempt + 1, "moved_to_reach_min_size": moved})


def draw_dirichlet(
    clients: int, alpha: float, balanced: bool, labels: Ints, generator: np.random.Generator
) -> Ints:
    """Draw one partition, whatever its sizes; return the owner of each sample."""
    class_sizes = np.bincount(labels)
    average = len(labels) / clients
    cuts = np.zeros((len(class_sizes), clients + 1), dtype=np.int64)
    sizes = np.zeros(clients, dtype=np.int64)
    for label, class_size in enumerate(class_sizes):
        shares = _proportions(clients, alpha, generator)
        if balanced:
            shares[sizes > average] = 0
            if shares.sum() == 0:  # everything went to clients that are full: use the others evenly
                shares = (sizes <= average).astype(np.float64)
            shares /= shares.sum()
        exact = np.cumsum(shares)[:-1] * class_size
        cuts[label, 1:-1] = whole(exact).clip(max=class_size)
        cuts[label, -1] = class_size
        sizes += np.diff(cuts[label])
    return hand_out(labels, np.diff(cuts, axis=1), generator)


def _proportions(clients: int, alpha: float, generator: np.random.Generator) -> Floats:
    if alpha * clients < _VANISHING:
        shares = np.zeros(clients)
        shares[generator.integers(clients)] = 1
        return shares
    if alpha > _HUGE:
        return np.full(clients, 1 / clients)
    return np.asarray(generator.dirichlet(np.full(clients, alpha)), dtype=np.float64)


def _fill_up(owners: Ints, sizes: Ints, min_size: int, generator: np.random.Generator) -> int:
    """Move samples from the largest clients to those below `min_size`; return how many moved."""
    missing = np.maximum(min_size - sizes, 0)
    total = int(missing.sum())
    if total:
        given = cut_largest(sizes, total, min_size)
        owners[choose(owners, given, generator)] = generator.permutation(
            np.repeat(np.arange(len(sizes)), missing)
        )
    return total


@partition_rule()
def dirichlet_client(
    *,
    alpha: float = 0.5,
    law: Law = "equal",
    sigma: float = 1.0,
    exponent: float = 1.0,
    min_size: int = 1,
) -> PartitionRule:
    """Draw each client's own law over the classes from a Dirichlet law; sizes are set apart.

    Client c draws q ~ Dirichlet(alpha p), where p is the law of all training samples, and then its
    samples by q without replacement. A class that runs out is shared at random among the clients
    that ask for it. A client draws the samples that it then lacks from the classes that are left,
    by its own law as far as that goes. All samples are dealt out.

    Args:
        alpha: Concentration; > 0, small means few classes per client, large the law of all.
        law: What sizes are proportional to, see `sizes`.
        sigma: Of the law "log_normal"; >= 0.
        exponent: Of the law "power"; >= 0.
        min_size: Samples that each client has at least, its local test split included; >= 0.

    Source: Hsu et al., 2019 (arXiv:1909.06335).
    Deviations: sizes may be unequal. flwr-datasets' InnerDirichletPartitioner has one alpha for
    every class (on balanced data: our alpha divided by the number of classes), and its clients
    fetch samples one by one, so that who comes late misses first choices.
    """
    check_number("alpha", alpha, above=0)
    check_law(law, sigma, exponent)
    check_number("min_size", min_size)
    return PartitionRule(partial(_dirichlet_client, alpha, law, sigma, exponent, min_size))


def _dirichlet_client(
    alpha: float,
    law: Law,
    sigma: float,
    exponent: float,
    min_size: int,
    samples: Samples,
    clients: int,
    seed: int,
) -> Assignment:
    total = len(samples.labels)
    check_clients(clients, total)
    check_min_size(min_size, clients, total)
    generator = rng.generator(seed, "partition")
    weights = law_weights(law, clients, generator, sigma=sigma, exponent=exponent)
    sizes, moved = law_sizes(weights, total, min_size)
    present, classes, stock = np.unique(samples.labels, return_inverse=True, return_counts=True)
    laws = _client_laws(clients, alpha, stock / total, generator)
    counts = _without_replacement(sizes, laws, stock, alpha, generator)
    owners = hand_out(classes.reshape(-1), counts.T, generator)
    return Assignment(owners, {"moved_to_reach_min_size": moved, "classes": len(present)})


def _client_laws(
    clients: int, alpha: float, prior: Floats, generator: np.random.Generator
) -> Floats:
    """Draw each client's law over the classes, `[clients, classes]`."""
    if alpha < _VANISHING:
        ends = np.cumsum(prior)
        chosen = np.searchsorted(ends[:-1], generator.random(clients) * ends[-1], side="right")
        return np.asarray(chosen[:, None] == np.arange(len(prior)), dtype=np.float64)
    if alpha > _HUGE:
        return np.tile(prior, (clients, 1))
    return np.asarray(generator.dirichlet(alpha * prior, size=clients), dtype=np.float64)


def _without_replacement(
    sizes: Ints, laws: Floats, stock: Ints, alpha: float, generator: np.random.Generator
) -> Ints:
    """Return how many samples of each class each client gets, `[clients, classes]`.

    A client of whose classes nothing is left draws a new law over what is left. Each turn serves
    everybody or exhausts a class, so that there are at most as many turns as classes.
    """
    counts = np.zeros(laws.shape, dtype=np.int64)
    left = np.array(stock, dtype=np.int64)
    for _ in range(len(stock)):
        asking = np.flatnonzero(counts.sum(axis=1) < sizes)
        if not len(asking):
            return counts
        shares = laws[asking] * (left > 0)
        totals = shares.sum(axis=1, keepdims=True)
        lost = totals[:, 0] < 1e-12  # nothing is left of this client's classes
        totals[lost] = 1
        shares = shares / totals
        if lost.any():
            some = np.flatnonzero(left)
            drawn = _client_laws(int(lost.sum()), alpha, left[some] / left.sum(), generator)
            shares[lost] = 0.0
            shares[np.ix_(lost, some)] = drawn
        asked = generator.multinomial(sizes[asking] - counts[asking].sum(axis=1), shares)
        for label in np.flatnonzero(asked.sum(axis=0) > left):
            requests = np.repeat(np.arange(len(asking)), asked[:, label])
            served = generator.permutation(requests)[: left[label]]
            asked[:, label] = np.bincount(served, minlength=len(asking))
        counts[asking] += asked
        left -= asked.sum(axis=0)
    # rounding may waste a turn on an empty class: what is then left goes round as it comes
    missing = np.repeat(np.arange(len(sizes)), sizes - counts.sum(axis=1))
    labels = generator.permutation(np.repeat(np.arange(len(stock)), left))
    np.add.at(counts, (missing, labels[: len(missing)]), 1)
    return counts
