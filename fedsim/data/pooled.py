"""Data sets that exist as arrays: loaded once per machine, then mapped by every process.

The cache holds two kinds of entries: a data set's arrays, and a partition of it (which differs by
seed, and is small).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

from fedsim.data import cache
from fedsim.data.division import divide, read_spec
from fedsim.data.partition import Partition
from fedsim.data.source import (
    Arrays,
    ClientIds,
    ClientRows,
    FederatedData,
    Ints,
    Recipe,
    array_sha256,
)
from fedsim.samples import SampleSpec


class Loaded(NamedTuple):
    """A data set read whole.

    Attributes:
        train: What may be trained on.
        test: The official test split, if there is one.
        spec: What one sample looks like.
        groups: The number of each training sample's natural owner, `[n]`, if the data set says so.
        group_names: What the data set calls these owners, by number.
    """

    train: Arrays
    test: Arrays | None
    spec: SampleSpec
    groups: Ints | None = None
    group_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class PooledSource:
    """A data set that can be loaded whole.

    Attributes:
        name: The data set's name.
        test_fraction: Stratified share of the samples that the server holds out; 0 when the data
            set has an official test split.
        identity: What decides the arrays (files, package versions), as JSON: the cache's key.
        description: What the manifest says of the data set; no machine paths.
        load: Reads the arrays.
    """

    name: str
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
        key = {"name": source.name, "identity": source.identity}
        loaded = cache.entry(recipe.cache_dir, "data", key, lambda: _load(source))
        self._pool = Arrays(loaded.arrays["features"], loaded.arrays["targets"])
        division = cache.entry(
            recipe.cache_dir,
            "partition",
            {
                "sha256": loaded.info["sha256"],
                "description": source.description,
                "partition": recipe.partition,
                "seed": recipe.seed,
            },
            lambda: divide(source, partition, recipe, loaded),
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
        self._labels = division.arrays.get("labels")
        self.num_clients = partition.clients
        self.spec = read_spec(loaded)
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

    def labels(self, client_ids: ClientIds) -> list[Ints]:
        """Return the labels of each client's training samples."""
        if self._labels is None:  # the targets are classes
            return super().labels(client_ids)
        return [self._labels[rows] for rows in self.clients(client_ids).rows]

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
    if loaded.groups is not None:
        arrays["groups"] = loaded.groups
    hashes = {name: array_sha256(array) for name, array in arrays.items()}
    names = list(loaded.group_names)
    return cache.Content(
        arrays, {"sha256": hashes, "spec": list(loaded.spec), "group_names": names}
    )
