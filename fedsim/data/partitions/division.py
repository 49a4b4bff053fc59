"""Who holds what: a data set held out, divided among clients and split, once per seed and rule."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.basics.samples import SampleSpec
from fedsim.data import cache
from fedsim.data.federated import (
    TENTHS,
    DataRecipe,
    Ints,
    Samples,
    array_sha256,
    json_sha256,
    size_summary,
)
from fedsim.data.loaded import PooledSource, read_spec
from fedsim.data.partitions.drawing import (
    add_label_noise,
    choose,
    local_test_counts,
    stratified_counts,
)
from fedsim.data.partitions.partition import DROPPED, Assignment, Partition
from fedsim.data.partitions.skew import skewed
from fedsim.data.reading.standardise import standardised

NAMED_CLIENTS = 100  # whose natural owners are named in the manifest

Arrays = dict[str, npt.NDArray[Any]]


class _HeldOut(NamedTuple):
    """The server's test set: its arrays if they were drawn, their hashes, and what is left."""

    arrays: Arrays
    hashes: dict[str, str]
    labels: Ints
    available: Ints


def divide(
    source: PooledSource, partition: Partition, recipe: DataRecipe, loaded: cache.Content
) -> cache.Content:
    """Hold the test set out, divide the rest among clients, and split theirs.

    Args:
        source: The data set.
        partition: The rule of division.
        recipe: What the data were asked for with.
        loaded: The data set's arrays, as the cache holds them.

    Returns:
        What the cache keeps of the division: each split's rows in client order with offsets, the
        held-out samples when they were drawn, targets with noise and features with skew when there
        are any (copies of the pool), the number of clients, and the manifest. Where clients share
        parts, "client" stands for a part in all of this but the number of clients.

    Raises:
        ScenarioError: If the rule cannot divide this data set.
    """
    spec = read_spec(loaded)
    _check(partition, spec)
    features, targets = loaded.arrays["features"], loaded.arrays["targets"]
    labels = targets if spec.has_classes else tenths(targets)
    classes = spec.num_classes or TENTHS
    held_out = _hold_out(source, recipe.seed, loaded, labels, classes)
    arrays = dict(held_out.arrays)

    available, groups = held_out.available, loaded.arrays.get("groups")
    in_training = None if groups is None else groups[available]
    samples = Samples(labels[available], in_training, available, len(targets))
    assignment = partition.assign(samples, recipe.seed)
    parts = _parted(assignment, available, partition.test_fraction, recipe.seed)
    arrays |= _by_split(parts)
    if not spec.has_classes:
        arrays["labels"] = labels
    trained = arrays["train_rows"]
    trained = trained if assignment.rows is None else np.unique(trained)
    altered = _altered(loaded, held_out, partition, parts, trained, recipe.seed)
    arrays |= altered.arrays

    content = _hashes(loaded, held_out, altered.arrays, arrays)
    registered = (partition.parts and partition.clients) or parts.clients
    # who holds what is decided by these arrays alone, wherever they came from
    decisive: dict[str, Any] = dict(content)
    if partition.parts:
        decisive["shared"] = {"clients": registered, "parts": parts.clients}
    data = {
        **source.description,
        "classes": spec.num_classes,
        "feature_shape": list(features.shape[1:]),
        "samples": len(targets),
        "samples_per_class": np.bincount(labels, minlength=classes).tolist(),
        **({"standardised": altered.statistics} if altered.statistics else {}),
    }
    manifest = {
        "data": data,
        "held_out": _held_out_entry(source, held_out, classes, has_classes=spec.has_classes),
        "partition": {
            **_without_folder(recipe.partition),
            "seed": recipe.seed,
            **assignment.notes,
            **altered.notes,
        },
        **_clients_entries(parts, registered, shared=bool(partition.parts)),
        "dropped": _dropped_entry(len(available) - len(np.unique(parts.rows)), assignment),
        "sha256": content,
    }
    if assignment.keeps_groups:
        manifest["owners"] = _named(assignment, samples, loaded.info["group_names"])
    info = {
        "manifest": manifest,
        "manifest_sha256": json_sha256(decisive),
        "clients": registered,
        "parts": parts.clients,
    }
    return cache.Content(arrays, info)


class _Parts(NamedTuple):
    """Who holds what.

    Attributes:
        clients: How many clients, or parts that clients share, there are.
        owners: int64 `[n]`, whose each sample is.
        rows: int64 `[n]`, where it lies in the pool.
        local_test: bool `[n]`, whether its client tests with it.
        sizes: int64 `[clients]`.
        test_counts: int64 `[clients]`, how many of them each tests with.
    """

    clients: int
    owners: Ints
    rows: Ints
    local_test: npt.NDArray[np.bool_]
    sizes: Ints
    test_counts: Ints


def _parted(assignment: Assignment, available: Ints, test_fraction: float, seed: int) -> _Parts:
    """The samples that have an owner, and which of them their client tests with."""
    clients = assignment.clients
    assert clients is not None
    owned = assignment.owners != DROPPED
    held = available if assignment.rows is None else available[assignment.rows]
    owners, rows = assignment.owners[owned], held[owned]
    sizes = np.bincount(owners, minlength=clients)
    test_counts = local_test_counts(sizes, test_fraction)
    local_test = choose(owners, test_counts, rng.generator(seed, "local-test"))
    return _Parts(clients, owners, rows, local_test, sizes, test_counts)


class _Altered(NamedTuple):
    """Arrays in place of the pool's, what the manifest notes of them, and standardised columns."""

    arrays: Arrays
    notes: dict[str, Any]
    statistics: dict[str, Any]


def _altered(
    loaded: cache.Content,
    held_out: _HeldOut,
    partition: Partition,
    parts: _Parts,
    trained: Ints,
    seed: int,
) -> _Altered:
    """Standardise, change labels, and make the features of clients differ, as it is asked for."""
    features, targets = loaded.arrays["features"], loaded.arrays["targets"]
    made = _Altered(Arrays(), {}, {})
    if fields := loaded.info["standardise"]:
        pool = {**loaded.arrays, **held_out.arrays}
        changed, statistics = standardised(pool, fields, trained)
        made = made._replace(arrays=changed, statistics=statistics)
        features, targets = (changed.get(n, loaded.arrays[n]) for n in ("features", "targets"))
    if np.any(partition.label_noise):
        train = ~parts.local_test
        noisy = made.arrays["train_targets"] = np.array(targets)
        noisy[parts.rows[train]] = add_label_noise(
            targets[parts.rows][train],
            parts.owners[train],
            np.broadcast_to(np.asarray(partition.label_noise, dtype=np.float64), parts.sizes.shape),
            read_spec(loaded).num_classes,
            seed,
        )
        made.notes["labels_changed"] = int((noisy != targets).sum())
    if partition.skew.active:
        made.arrays["client_features"] = skewed(
            features, *_by_client(parts.owners, parts.rows, parts.clients), partition.skew, seed
        )
    return made


def _by_split(parts: _Parts) -> Arrays:
    """The rows of either split in client order, with offsets."""
    arrays: Arrays = {}
    for name, part in (("train", ~parts.local_test), ("local_test", parts.local_test)):
        arrays[f"{name}_offsets"], arrays[f"{name}_rows"] = _by_client(
            parts.owners[part], parts.rows[part], parts.clients
        )
    return arrays


def _hashes(
    loaded: cache.Content, held_out: _HeldOut, altered: Arrays, arrays: Arrays
) -> dict[str, str]:
    """The hash of every array that decides who holds what."""
    pool = loaded.info["sha256"]
    content = {name: pool[name] for name in ("features", "targets")} | held_out.hashes
    content |= {name: array_sha256(array) for name, array in altered.items()}
    return content | {
        name: array_sha256(arrays[name])
        for name in ("train_offsets", "train_rows", "local_test_offsets", "local_test_rows")
    }


def _held_out_entry(
    source: PooledSource, held_out: _HeldOut, classes: int, *, has_classes: bool
) -> dict[str, Any]:
    stratum = "class" if has_classes else "tenth of the targets"
    return {
        "samples": len(held_out.labels),
        "samples_per_class": np.bincount(held_out.labels, minlength=classes).tolist(),
        "drawn": f"stratified by {stratum}" if source.test_fraction else source.test_origin,
    }


def _clients_entries(parts: _Parts, registered: int, *, shared: bool) -> dict[str, Any]:
    sizes, test_counts = parts.sizes, parts.test_counts
    entries: dict[str, Any] = {"clients": registered}
    if shared:
        entries["shared"] = _shared(sizes, registered)
        which = np.arange(registered) % parts.clients
        sizes, test_counts = sizes[which], test_counts[which]
    entries["sizes"] = size_summary(sizes - test_counts)
    entries["local_test"] = {
        "samples": int(test_counts.sum()), "sizes": size_summary(test_counts)
    }  # fmt: skip
    return entries


def _dropped_entry(dropped: int, assignment: Assignment) -> dict[str, Any]:
    return {"samples": dropped, "reason": assignment.why_dropped if dropped else None}


def _shared(sizes: Ints, clients: int) -> dict[str, Any]:
    """Say how many clients hold each sample where client c holds part c mod `len(sizes)`."""
    parts = len(sizes)
    holders = np.full(parts, clients // parts)
    holders[: clients % parts] += 1
    return {
        "parts": parts,
        "rule": f"client c holds part c mod {parts}",
        "clients_per_part": {"min": int(holders.min()), "max": int(holders.max())},
        "samples_held_by_several_clients": int(sizes[holders > 1].sum()),
        "shares": int((sizes * holders).sum()),  # samples, each counted once per holder
    }


def _check(partition: Partition, spec: SampleSpec) -> None:
    if np.any(partition.label_noise) and not spec.has_classes:
        raise ScenarioError(
            "[partition] label_noise: the targets are numbers, and only classes can be drawn anew; "
            "leave it out"
        )
    partition.skew.check_samples(spec)


def _hold_out(
    source: PooledSource, seed: int, loaded: cache.Content, labels: Ints, classes: int
) -> _HeldOut:
    if not source.test_fraction:
        names = ("test_features", "test_targets")
        hashes = {name: loaded.info["sha256"][name] for name in names}
        targets = loaded.arrays["test_targets"]
        test_labels = targets if read_spec(loaded).has_classes else tenths(targets)
        return _HeldOut({}, hashes, test_labels, np.arange(len(labels)))
    counts = stratified_counts(np.bincount(labels, minlength=classes), source.test_fraction)
    if counts.sum() in (0, len(labels)):
        raise ScenarioError(
            f"[data] test_fraction = {source.test_fraction}: of {len(labels)} samples it holds "
            f"out {counts.sum()}; some must be held out and some left to train on"
        )
    drawn = choose(labels, counts, rng.generator(seed, "held-out"))
    arrays = {f"test_{name}": loaded.arrays[name][drawn] for name in ("features", "targets")}
    hashes = {name: array_sha256(array) for name, array in arrays.items()}
    return _HeldOut(arrays, hashes, labels[drawn], np.flatnonzero(~drawn))


def _without_folder(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table whose path names the file and not where this machine has it."""
    path = table.get("path")
    return table if path is None else {**table, "path": Path(path).name}


def _named(assignment: Assignment, samples: Samples, names: list[str]) -> dict[str, Any]:
    """Say how many natural owners have a client, and who are those of the first clients."""
    assert samples.groups is not None
    owned = assignment.owners != DROPPED
    pairs = np.unique(np.stack([assignment.owners[owned], samples.groups[owned]]), axis=1)
    shown = []
    for client_id in range(min(assignment.clients or 0, NAMED_CLIENTS)):
        mine = pairs[1, pairs[0] == client_id].tolist()
        first = [names[owner] if names else str(owner) for owner in mine[:3]]
        more = [f"{len(mine) - 3} more"] if len(mine) > 3 else []
        shown.append(", ".join(first + more))
    return {
        "in_data": len(names) or len(np.unique(samples.groups)),
        "in_training": len(np.unique(samples.groups)),
        "with_a_client": pairs.shape[1],
        "of_first_clients": shown,
    }


def _by_client(owners: Ints, rows: Ints, clients: int) -> tuple[Ints, Ints]:
    """Return (offsets `[clients + 1]`, rows sorted by client and then by number)."""
    offsets = np.zeros(clients + 1, dtype=np.int64)
    np.cumsum(np.bincount(owners, minlength=clients), out=offsets[1:])
    return offsets, rows[np.argsort(owners, kind="stable")].astype(np.int64, copy=False)


def tenths(targets: npt.NDArray[Any]) -> Ints:
    """Return the tenth of the targets' distribution that each lies in, 0 to 9.

    Equal targets lie in the same tenth; of targets with several numbers the first one counts.

    Example:
        >>> tenths(np.arange(20.0)).tolist()
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    """
    first = targets.reshape(len(targets), -1)[:, 0]
    ordered = np.sort(first)
    below: Ints = np.searchsorted(ordered, first, side="left").astype(np.int64)
    return below * TENTHS // max(len(first), 1)
