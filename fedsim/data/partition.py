"""How samples are divided among clients.

A rule gives each sample's owner, so that every sample belongs to exactly one client by
construction. Everything is drawn from (seed, "partition") and vectorised over samples and clients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim import rng
from fedsim.data.source import Ints, Samples
from fedsim.errors import ScenarioError

REDRAWS = 10  # of a Dirichlet partition that misses min_size, before samples are moved

Owners = Callable[[Samples, int], tuple[Ints, dict[str, Any]]]


@dataclass(frozen=True)
class Partition:
    """A rule of division among a number of clients.

    Attributes:
        clients: Number of clients.
        test_fraction: Share of each client's samples in its local test split.
        owners: `(samples, seed) -> (owner of each sample, notes for the manifest)`.
        label_noise: Share of a client's training labels that are drawn anew, uniformly over all
            classes: one for all clients, or one for each.
        natural: Whether samples stay with the owners that they come from.
    """

    clients: int
    test_fraction: float
    owners: Owners
    label_noise: float | tuple[float, ...] = 0.0
    natural: bool = False

    def __post_init__(self) -> None:
        shares = self.label_noise if isinstance(self.label_noise, tuple) else (self.label_noise,)
        for share in shares:
            if not 0 <= share <= 1:
                raise ScenarioError(f"[partition] label_noise = {share}: must be in [0, 1]")
        if isinstance(self.label_noise, tuple) and len(shares) != self.clients:
            raise ScenarioError(
                f"[partition] label_noise has {len(shares)} values for {self.clients} clients: "
                "give one number, or one per client"
            )
        if self.clients < 1:
            raise ScenarioError(f"[partition] clients = {self.clients}: must be >= 1")
        if not 0 <= self.test_fraction < 1:
            raise ScenarioError(
                f"[partition] test_fraction = {self.test_fraction}: must be in [0, 1)"
            )


def iid(
    *, clients: int = 10, label_noise: float | Sequence[float] = 0.0, test_fraction: float = 0.0
) -> Partition:
    """Shuffle the samples and deal them out; sizes differ by at most one.

    Args:
        clients: Number of clients; >= 1 and at most the number of samples.
        label_noise: Share of training labels redrawn uniformly, in [0, 1]; one, or one per client.
        test_fraction: Share of each client's samples in its local test split, in [0, 1).
    """
    return Partition(clients, test_fraction, partial(_iid, clients), _noise(label_noise))


def dirichlet(
    *,
    clients: int = 10,
    alpha: float = 0.5,
    min_size: int = 0,
    balanced: bool = False,
    label_noise: float | Sequence[float] = 0.0,
    test_fraction: float = 0.0,
) -> Partition:
    """Divide each class among the clients by proportions from a symmetric Dirichlet law.

    A partition that leaves a client below `min_size` is drawn anew up to ten times; then samples
    drawn from the largest clients move to the small ones, and the manifest says how many.

    Args:
        clients: Number of clients; >= 1 and at most the number of samples.
        alpha: Concentration; > 0, small means few classes per client.
        min_size: Samples that each client has at least, its local test split included; >= 0.
        balanced: Whether a client that has more than the average gets nothing of further classes.
        label_noise: Share of training labels redrawn uniformly, in [0, 1]; one, or one per client.
        test_fraction: Share of each client's samples in its local test split, in [0, 1).

    Source: Hsu et al., 2019 (arXiv:1909.06335) and Yurochkin et al., ICML 2019 (arXiv:1905.12022),
    in the form of flwr-datasets' DirichletPartitioner.
    Deviations: samples of a class are shuffled before they are divided; too small a client ends in
    moved samples instead of an error.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise ScenarioError(f"[partition] alpha = {alpha}: must be finite and > 0")
    if min_size < 0:
        raise ScenarioError(f"[partition] min_size = {min_size}: must be >= 0")
    owners = partial(_dirichlet, clients, alpha, min_size, balanced)
    return Partition(clients, test_fraction, owners, _noise(label_noise))


def natural(*, clients: int = 10, test_fraction: float = 0.0) -> Partition:
    """Leave the samples with the clients that they come from.

    Args:
        clients: Number of clients; >= 1.
        test_fraction: Share of each client's samples in its local test split, in [0, 1).
    """
    return Partition(clients, test_fraction, partial(_natural, clients), natural=True)


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "natural": natural,
}


def _natural(clients: int, samples: Samples, seed: int) -> tuple[Ints, dict[str, Any]]:
    if samples.groups is None:
        allowed = ", ".join(sorted(k for k, factory in PARTITIONS.items() if not factory().natural))
        raise ScenarioError(
            "[partition] kind = 'natural': the data set does not say whose samples are whose; "
            f"allowed: {allowed}"
        )
    return samples.groups, {}


def _iid(clients: int, samples: Samples, seed: int) -> tuple[Ints, dict[str, Any]]:
    _check_clients(clients, len(samples.labels))
    owners = np.arange(len(samples.labels), dtype=np.int64) % clients
    return rng.generator(seed, "partition").permutation(owners), {}


def _dirichlet(
    clients: int, alpha: float, min_size: int, balanced: bool, samples: Samples, seed: int
) -> tuple[Ints, dict[str, Any]]:
    targets = samples.labels
    _check_clients(clients, len(targets))
    reachable = len(targets) // clients
    if min_size > reachable:
        raise ScenarioError(
            f"[partition] min_size = {min_size}: {len(targets)} samples give each of {clients} "
            f"clients at most {reachable}"
        )
    for attempt in range(1 + REDRAWS):
        generator = rng.generator(seed, "partition", attempt)
        owners = _draw_dirichlet(clients, alpha, balanced, targets, generator)
        sizes = np.bincount(owners, minlength=clients)
        if sizes.min() >= min_size:
            break
    moved = _fill_up(owners, sizes, min_size, generator)
    return owners, {"draws": attempt + 1, "moved_to_reach_min_size": moved}


def _draw_dirichlet(
    clients: int, alpha: float, balanced: bool, targets: Ints, generator: np.random.Generator
) -> Ints:
    class_sizes = np.bincount(targets)
    cuts = np.zeros((len(class_sizes), clients + 1), dtype=np.int64)
    sizes = np.zeros(clients, dtype=np.int64)
    for label, class_size in enumerate(class_sizes):
        shares = _proportions(clients, alpha, generator)
        if balanced:
            shares[sizes > len(targets) / clients] = 0
            if shares.sum() == 0:  # everything went to clients that are full: use the others evenly
                shares = (sizes <= len(targets) / clients).astype(np.float64)
            shares /= shares.sum()
        cuts[label, 1:-1] = np.floor(np.cumsum(shares)[:-1] * class_size).clip(max=class_size)
        cuts[label, -1] = class_size
        sizes += np.diff(cuts[label])
    # samples sorted by class and shuffled within each: client 0 gets the first counts[0, 0], ...
    order = np.lexsort((generator.random(len(targets)), targets))
    counts = np.diff(cuts, axis=1)
    owners = np.empty(len(targets), dtype=np.int64)
    owners[order] = np.repeat(np.tile(np.arange(clients), len(class_sizes)), counts.reshape(-1))
    return owners


def _proportions(
    clients: int, alpha: float, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    # so small a concentration underflows; its law is by then a single client, chosen uniformly
    if alpha * clients < 1e-6:
        shares = np.zeros(clients)
        shares[generator.integers(clients)] = 1
        return shares
    return np.asarray(generator.dirichlet(np.full(clients, alpha)), dtype=np.float64)


def _fill_up(owners: Ints, sizes: Ints, min_size: int, generator: np.random.Generator) -> int:
    """Move samples from the largest clients to those below `min_size`; return how many moved."""
    missing = np.maximum(min_size - sizes, 0)
    total = int(missing.sum())
    if total == 0:
        return 0
    # the largest are cut down to a common level, the highest that frees enough
    low, high = min_size, int(sizes.max())
    while low < high:
        level = (low + high + 1) // 2
        if np.maximum(sizes - level, 0).sum() >= total:
            low = level
        else:
            high = level - 1
    given = np.maximum(sizes - low, 0)
    donors = np.flatnonzero(given)
    given[donors[: given.sum() - total]] -= 1
    owners[choose(owners, given, generator)] = generator.permutation(
        np.repeat(np.arange(len(sizes)), missing)
    )
    return total


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
    counts = np.floor(sizes * shares + 0.5).astype(np.int64)
    redrawn = choose(owners, counts, generator)
    return np.where(redrawn, generator.integers(classes, size=len(targets)), targets)


def _noise(label_noise: float | Sequence[float]) -> float | tuple[float, ...]:
    return tuple(label_noise) if isinstance(label_noise, Sequence) else label_noise


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


def stratified_counts(class_sizes: Ints, fraction: float) -> Ints:
    """Return how many of each class make that fraction of all, by largest remainders.

    Example:
        >>> stratified_counts(np.array([10, 10, 5]), 0.25).tolist()
        [3, 2, 1]
    """
    exact = class_sizes * fraction
    counts: Ints = np.floor(exact).astype(np.int64)
    left = int(np.floor(class_sizes.sum() * fraction + 0.5)) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts


def local_test_counts(sizes: Ints, fraction: float) -> Ints:
    """Return how many of each client's samples are its local test split; one is left to train.

    Example:
        >>> local_test_counts(np.array([0, 1, 2, 10, 25]), 0.1).tolist()
        [0, 0, 0, 1, 3]
    """
    wanted = np.floor(sizes * fraction + 0.5).astype(np.int64)
    counts: Ints = np.minimum(wanted, np.maximum(sizes - 1, 0))
    return counts


def _check_clients(clients: int, samples: int) -> None:
    if clients > samples:
        raise ScenarioError(
            f"[partition] clients = {clients}: the data set has {samples} training samples; "
            f"use at most {samples}"
        )
