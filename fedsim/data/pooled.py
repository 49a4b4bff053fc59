"""Data sets that exist as arrays: loaded once per machine, then mapped by every process.

The cache holds two kinds of entries: a data set's arrays, and a partition of it (which differs by
seed, and is small).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim import rng
from fedsim.data import cache
from fedsim.data.partition import (
    PARTITIONS,
    Partition,
    add_label_noise,
    choose,
    local_test_counts,
    stratified_counts,
)
from fedsim.data.source import (
    Arrays,
    ClientIds,
    ClientRows,
    FederatedData,
    Ints,
    Recipe,
    array_sha256,
    json_sha256,
    size_summary,
)
from fedsim.errors import ScenarioError


class Loaded(NamedTuple):
    """A data set's arrays: what may be trained on, and the official test split if there is one."""

    train: Arrays
    test: Arrays | None


@dataclass(frozen=True)
class PooledSource:
    """A data set that can be loaded whole.

    Attributes:
        name: The data set's name.
        num_classes: Classes of the targets, which are 0...C-1.
        test_fraction: Stratified share of the samples that the server holds out; 0 when the data
            set has an official test split.
        identity: What decides the arrays (files, package versions), as JSON: the cache's key.
        description: What the manifest says of the data set; no machine paths.
        load: Reads the arrays.
    """

    name: str
    num_classes: int
    test_fraction: float
    identity: dict[str, Any]
    description: dict[str, Any]
    load: Callable[[], Loaded]

    def federate(self, partition: Partition, recipe: Recipe) -> FederatedData:
        """Divide the data set among the partition's clients."""
        return PooledData(self, partition, recipe)


class PooledData(FederatedData):
    """Clients as rows of one mapped pool of samples."""

    def __init__(self, source: PooledSource, partition: Partition, recipe: Recipe) -> None:
        super().__init__(recipe)
        if partition.owners is None:
            allowed = ", ".join(
                sorted(kind for kind, factory in PARTITIONS.items() if factory().owners)
            )
            raise ScenarioError(
                f"[partition] kind = '{recipe.partition['kind']}': {source.name} has no clients of "
                f"its own; allowed: {allowed}"
            )
        key = {"name": source.name, "identity": source.identity}
        loaded = cache.entry(recipe.cache_dir, "data", key, lambda: _load(source))
        self._pool = Arrays(loaded.arrays["features"], loaded.arrays["targets"])
        division = cache.entry(
            recipe.cache_dir,
            "partition",
            {
                "sha256": loaded.info,
                "description": source.description,
                "partition": recipe.partition,
                "seed": recipe.seed,
            },
            lambda: _divide(source, partition, recipe, loaded),
        )
        if "train_targets" in division.arrays:  # with noise in the labels, which differs by seed
            self._pool = self._pool._replace(targets=division.arrays["train_targets"])
        # an official test split lies with the data set, a drawn one with the partition
        held_out = division.arrays if source.test_fraction else loaded.arrays
        self._test = Arrays(held_out["test_features"], held_out["test_targets"])
        self._parts = {
            split: (division.arrays[f"{split}_offsets"], division.arrays[f"{split}_rows"])
            for split in ("train", "local_test")
        }
        self.num_clients = partition.clients
        self.num_classes = source.num_classes
        self.feature_shape = self._pool.features.shape[1:]
        self.manifest = division.info["manifest"]
        self.manifest_sha256 = division.info["manifest_sha256"]

    def sizes(self, client_ids: ClientIds) -> Ints:
        """Return each client's number of training samples."""
        ids = self._checked(client_ids)
        offsets, _ = self._parts["train"]
        sizes: Ints = offsets[ids + 1] - offsets[ids]
        return sizes

    def clients(self, client_ids: ClientIds, *, split: str = "train") -> ClientRows:
        """Return the pool, and each client's rows of it in ascending order."""
        ids = self._checked(client_ids, split)
        offsets, rows = self._parts["train" if split == "train" else "local_test"]
        self.clients_read += len(ids)
        # copies: torch warns of arrays that cannot be written, and these are small
        mine = [rows[offsets[i] : offsets[i + 1]].copy() for i in ids]
        return ClientRows(*self._pool, mine)

    @property
    def test(self) -> Arrays:
        """The server's held-out test set."""
        return self._test


def _load(source: PooledSource) -> cache.Content:
    loaded = source.load()
    arrays: dict[str, npt.NDArray[Any]] = {
        "features": loaded.train.features,
        "targets": loaded.train.targets,
    }
    if loaded.test is not None:
        arrays |= {"test_features": loaded.test.features, "test_targets": loaded.test.targets}
    return cache.Content(arrays, {name: array_sha256(array) for name, array in arrays.items()})


def _divide(
    source: PooledSource, partition: Partition, recipe: Recipe, loaded: cache.Content
) -> cache.Content:
    features, targets = loaded.arrays["features"], loaded.arrays["targets"]
    class_sizes = np.bincount(targets, minlength=source.num_classes)
    arrays: dict[str, npt.NDArray[Any]] = {}
    if source.test_fraction:
        held_out_counts = stratified_counts(class_sizes, source.test_fraction)
        if held_out_counts.sum() in (0, len(targets)):
            raise ScenarioError(
                f"[data] test_fraction = {source.test_fraction}: of {len(targets)} samples it "
                "holds "
                f"out {held_out_counts.sum()}; some must be held out and some left to train on"
            )
        held_out = choose(targets, held_out_counts, rng.generator(recipe.seed, "held-out"))
        arrays |= {"test_features": features[held_out], "test_targets": targets[held_out]}
        test_hashes = {name: array_sha256(array) for name, array in arrays.items()}
        test_targets, available = targets[held_out], np.flatnonzero(~held_out)
    else:
        test_hashes = {name: loaded.info[name] for name in ("test_features", "test_targets")}
        test_targets, available = loaded.arrays["test_targets"], np.arange(len(targets))

    assert partition.owners is not None
    owners, notes = partition.owners(targets[available], recipe.seed)
    sizes = np.bincount(owners, minlength=partition.clients)
    test_counts = local_test_counts(sizes, partition.test_fraction)
    local_test = choose(owners, test_counts, rng.generator(recipe.seed, "local-test"))
    for name, part in (("train", ~local_test), ("local_test", local_test)):
        arrays[f"{name}_offsets"], arrays[f"{name}_rows"] = _by_client(
            owners[part], available[part], partition.clients
        )

    noisy: dict[str, Any] = {}
    if np.any(partition.label_noise):
        train = ~local_test
        arrays["train_targets"] = np.array(targets)
        arrays["train_targets"][available[train]] = add_label_noise(
            targets[available][train],
            owners[train],
            np.broadcast_to(np.asarray(partition.label_noise, dtype=np.float64), sizes.shape),
            source.num_classes,
            recipe.seed,
        )
        notes = {**notes, "labels_changed": int((arrays["train_targets"] != targets).sum())}
        noisy = {"train_targets": array_sha256(arrays["train_targets"])}
    content = {name: loaded.info[name] for name in ("features", "targets")} | test_hashes | noisy
    assignment = {
        name: array_sha256(arrays[name])
        for name in ("train_offsets", "train_rows", "local_test_offsets", "local_test_rows")
    }
    manifest = {
        "data": {
            **source.description,
            "classes": source.num_classes,
            "feature_shape": list(features.shape[1:]),
            "samples": len(targets),
            "samples_per_class": class_sizes.tolist(),
        },
        "held_out": {
            "samples": len(test_targets),
            "samples_per_class": np.bincount(test_targets, minlength=source.num_classes).tolist(),
            "drawn": "stratified by class" if source.test_fraction else "official test split",
        },
        "partition": {**recipe.partition, "seed": recipe.seed, **notes},
        "sizes": size_summary(sizes - test_counts),
        "local_test": {"samples": int(test_counts.sum()), "sizes": size_summary(test_counts)},
        "dropped": {"samples": 0, "reason": None},
        "sha256": content | assignment,
    }
    # who holds what is decided by these arrays alone, wherever they came from
    info = {"manifest": manifest, "manifest_sha256": json_sha256(content | assignment)}
    return cache.Content(arrays, info)


def _by_client(owners: Ints, rows: Ints, clients: int) -> tuple[Ints, Ints]:
    """Return (offsets `[clients + 1]`, rows sorted by client and then by number)."""
    offsets = np.zeros(clients + 1, dtype=np.int64)
    np.cumsum(np.bincount(owners, minlength=clients), out=offsets[1:])
    return offsets, rows[np.argsort(owners, kind="stable")].astype(np.int64, copy=False)
