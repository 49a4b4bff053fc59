"""Rules that choose updates by their distances to others: Krum, Multi-Krum and Bulyan.

- Krum and Multi-Krum: Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with
  Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017. Symbols: V_i update of client i,
  s(i) its score, n clients, f num_byzantine, m num_selected.
- Bulyan: El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in
  Byzantium", ICML 2018 (arXiv:1802.07927). Symbols: theta = n - 2 f, beta = theta - 2 f.

Others' variants, for comparisons: byzfl's Krum sums n - f - 1 distances; Flower's Bulyan takes the
theta best scores at once; the library released with the Flag Aggregator (arXiv:2302.05865) sums
n - f - 1 distances that are not squared and averages n - f - 2 updates, and its Bulyan takes
theta - 2 means of ever fewer of the updates, ordered by the n - f - 2 smallest such distances.

Deviations of Bulyan: Krum's n' - f - 2 neighbours among the n' left are none at the end of the
selection; it then takes one, and with nobody else left none.

Equal scores (the papers: any) go as `fedsim.aggregators.ties` has it. With one neighbour the two
nearest always have equal scores: Krum of three updates, the last steps of Bulyan with f <= 2.
"""

import functools

import torch
from torch import Tensor

from fedsim.aggregators.bounds import BULYAN, KRUM, MAJORITY, Bound
from fedsim.aggregators.coordinatewise import around_median_of
from fedsim.aggregators.ties import Distances, by_score, entries
from fedsim.aggregators.updates import Updates
from fedsim.basics.ties import Ints, shares


def multi_krum(updates: Tensor, *, num_byzantine: int, num_selected: int | None = None) -> Tensor:
    """Return the mean of the m updates with the lowest scores; m = 1 is Krum.

    The score s(i) is the sum of the n - f - 2 smallest squared distances from V_i to the others.
    Distances come of the Gram matrix in float64, and of the differences themselves where updates
    are much closer than they are long, so that these are told apart. Equal scores go by the score
    with a neighbour more, and so on, then by the smaller sum of entries; updates that are equal by
    all of that share the places they take, so that Krum gives their mean.

    Args:
        updates: `[clients, dim]`; rows that are not finite are dropped, and n counts the others.
        num_byzantine: f >= 0, how many of the rows may be anything; n >= 2 f + 3 unless f is 0.
        num_selected: m, in 1...n; None takes n - f.

    Returns:
        `[dim]`, in the dtype and on the device of `updates`; zero without rows.

    Raises:
        ValueError: If n rows are too few for f or m.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])
        >>> multi_krum(rows, num_byzantine=1), multi_krum(rows, num_byzantine=1, num_selected=1)
        (tensor([1.5000]), tensor([2.]))
    """
    found = multi_krum_of(Updates.of(updates), num_byzantine, num_selected)
    return found.to(updates.dtype)


def bulyan(updates: Tensor, *, num_byzantine: int) -> Tensor:
    """Return each coordinate's mean over the n - 4 f values nearest the median of n - 2 f updates.

    Those are chosen by Krum, one after another, each out of what is left. Equal scores go as in
    `multi_krum`, but in the end by client: where neither distances nor sums of entries tell updates
    apart that differ (a symmetry maps them on each other), the order of clients decides.

    Args:
        updates: `[clients, dim]`; rows that are not finite are dropped, and n counts the others.
        num_byzantine: f >= 0; n >= 4 f + 3 unless f is 0.

    Returns:
        `[dim]`, in the dtype and on the device of `updates`; zero without rows.

    Raises:
        ValueError: If n rows are too few for f.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [100.0]])
        >>> bulyan(rows, num_byzantine=1)
        tensor([3.])
    """
    return bulyan_of(Updates.of(updates), num_byzantine).to(updates.dtype)


def check_selected(clients: int, num_selected: int | None) -> None:
    """Refuse an m that is not in 1...n.

    Raises:
        ValueError: Naming it.
    """
    if num_selected is not None and not 1 <= num_selected <= clients:
        raise ValueError(
            f"num_selected = {num_selected}: must be in 1..{clients}, the updates to choose of"
        )


def multi_krum_of(
    updates: Updates,
    num_byzantine: int,
    num_selected: int | None = None,
    *,
    bound: Bound = KRUM,
    neighbours: int | None = None,
    squared: bool = True,
    weights: Tensor | None = None,
) -> Tensor:
    """Return Multi-Krum, float64 `[dim]`.

    Args:
        updates: The finite updates.
        num_byzantine: f.
        num_selected: m; None takes n - f.
        bound: Least n for f.
        neighbours: How many distances make a score; None takes n - f - 2.
        squared: Whether distances are squared.
        weights: float64 `[n]`, of the mean; None counts updates equally.
    """
    clients = len(updates)
    if not clients:
        return updates.combined(torch.zeros(0, dtype=torch.float64))
    bound.require(clients, num_byzantine)
    check_selected(clients, num_selected)
    selected = clients - num_byzantine if num_selected is None else num_selected
    others = clients - num_byzantine - 2 if neighbours is None else neighbours
    order = _order(updates, others, squared=squared)
    chosen = torch.from_numpy(shares(order, 0, selected))
    if weights is not None:
        chosen = chosen * weights
    total = float(selected) if weights is None else float(chosen.sum())
    return updates.combined(chosen) / total


def krum_byzfl_of(updates: Updates, num_byzantine: int, num_selected: int | None) -> Tensor:
    """Return byzfl's Krum or Multi-Krum: n - f - 1 neighbours, and n >= 2 f + 1."""
    nearest = len(updates) - num_byzantine - 1
    return multi_krum_of(updates, num_byzantine, num_selected, bound=MAJORITY, neighbours=nearest)


def krum_flag_of(updates: Updates, num_byzantine: int, num_selected: int | None) -> Tensor:
    """Return the Flag authors' Multi-Krum: n - f - 1 distances, not squared, and m = n - f - 2."""
    clients = len(updates)
    if num_selected is None and num_byzantine:
        num_selected = clients - num_byzantine - 2
    nearest = clients - num_byzantine - 1
    return multi_krum_of(
        updates, num_byzantine, num_selected, neighbours=nearest, squared=False
    )  # fmt: skip


def bulyan_of(updates: Updates, num_byzantine: int, *, repeated: bool = True) -> Tensor:
    """Return Bulyan, float64 `[dim]`; not `repeated`, the best scores are taken at once."""
    clients = len(updates)
    if not clients:
        return updates.combined(torch.zeros(0, dtype=torch.float64))
    BULYAN.require(clients, num_byzantine)
    count = clients - 2 * num_byzantine
    if repeated:
        chosen = _one_by_one(updates, num_byzantine, count)
    else:
        order = _order(updates, max(1, clients - num_byzantine - 2))
        chosen = order.argsort(kind="stable")[:count].tolist()
    places = torch.eye(clients, dtype=torch.float64)[sorted(chosen)]
    return around_median_of(updates.mixed(places), 2 * num_byzantine)


def bulyan_flag_of(updates: Updates, num_byzantine: int) -> Tensor:
    """Return the Flag authors' Bulyan, float64 `[dim]`; see the module's text."""
    clients = len(updates)
    if not clients:
        return updates.combined(torch.zeros(0, dtype=torch.float64))
    BULYAN.require(clients, num_byzantine)
    most = clients - num_byzantine - 2
    if (
        most - num_byzantine < 1
    ):  # without Byzantine updates the library refuses; here any n will do
        return updates.combined(torch.full((clients,), 1 / clients, dtype=torch.float64))
    order = _order(updates, most, squared=False)
    means = torch.zeros(most - num_byzantine, clients, dtype=torch.float64)
    for place, row in enumerate(means):
        row += torch.from_numpy(shares(order, place, most)) / (most - place)
    return around_median_of(updates.mixed(means), 2 * num_byzantine, lower=True)


def _order(updates: Updates, neighbours: int, *, squared: bool = True) -> Ints:
    """The rank of each update by the sum of its smallest distances to others, int64 `[n]`."""
    distances = Distances.of(updates, squared=squared)
    return by_score(distances, neighbours, lambda: entries(updates))


def _one_by_one(updates: Updates, num_byzantine: int, count: int) -> list[int]:
    """The clients that Krum chooses one after another, each out of those left."""
    distances, sums = Distances.of(updates), functools.cache(lambda: entries(updates))
    left = list(range(len(updates)))
    chosen = []
    for _ in range(count):
        others = len(left) - 1
        neighbours = min(others, max(1, others - 1 - num_byzantine))
        order = by_score(distances, neighbours, sums, torch.tensor(left))
        chosen.append(left.pop(int(order.argmin())))  # the first of equal ones
    return chosen
