"""Data sets that exist as arrays: loaded once per machine, then mapped by every process.

The cache holds two kinds of entries: a data set's arrays, and a partition of it (which differs by
seed, and is small).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from fedsim.basics.errors import RunError
from fedsim.data import cache
from fedsim.data.federated import (
    Arrays,
    ClientIds,
    ClientRows,
    DataRecipe,
    FederatedData,
    Ints,
    array_sha256,
    json_sha256,
)
from fedsim.data.loaded import PooledSource, read_spec
from fedsim.data.partitions.division import divide
from fedsim.data.partitions.partition import Partition


class PooledData(FederatedData):
    """Clients as rows of one mapped pool of samples."""

    def __init__(self, source: PooledSource, partition: Partition, recipe: DataRecipe) -> None:
        loaded, content = _pool(source, recipe)
        super().__init__(recipe._replace(content=content))
        source = _completed(source, loaded)
        division = cache.entry(
            recipe.cache_dir,
            "partition",
            {
                "sha256": loaded.info["sha256"],
                "description": source.description,
                "standardise": loaded.info["standardise"],
                "partition": {**recipe.partition, **partition.rule.identity},
                "seed": recipe.seed,
            },
            lambda: divide(source, partition, recipe, loaded),
        )
        # what differs by seed and partition lies with the division: a test set that was drawn,
        # standardised features, labels with noise, features of clients' own
        arrays = {**loaded.arrays, **division.arrays}
        self._pool = Arrays(
            arrays.get("client_features", arrays["features"]),
            arrays.get("train_targets", arrays["targets"]),
        )
        self._test = Arrays(arrays["test_features"], arrays["test_targets"])
        self._parts = {
            split: (division.arrays[f"{split}_offsets"], division.arrays[f"{split}_rows"])
            for split in ("train", "local_test")
        }
        self._labels = division.arrays.get("labels")
        self.num_clients = division.info["clients"]
        self._num_parts: int = division.info["parts"]
        self.spec = read_spec(loaded)
        self.said = tuple(loaded.info["said"])
        self.manifest = division.info["manifest"]
        self.manifest_sha256 = division.info["manifest_sha256"]

    @property
    def num_parts(self) -> int:
        """Parts that clients share, or the number of clients."""
        return self._num_parts

    def sizes(self, client_ids: ClientIds) -> Ints:
        """Return each client's number of training samples."""
        ids = self._checked(client_ids)
        ids = ids % self._num_parts
        offsets, _ = self._parts["train"]
        sizes: Ints = offsets[ids + 1] - offsets[ids]
        return sizes

    def clients(self, client_ids: ClientIds, *, split: str = "train") -> ClientRows:
        """Return the pool, and each client's rows of it in ascending order."""
        ids = self._checked(client_ids, split)
        offsets, rows = self._parts["train" if split == "train" else "local_test"]
        self.clients_read += len(ids)
        ids = ids % self._num_parts
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


def is_cached(source: PooledSource, root: Path) -> bool:
    """Return whether the arrays of a data set lie in a cache already."""
    return source.identity is not None and cache.holds(root, "data", _key(source))


def _key(source: PooledSource) -> dict[str, Any]:
    return {"name": source.name, "identity": source.identity}


def _pool(source: PooledSource, recipe: DataRecipe) -> tuple[cache.Content, str | None]:
    """Return the data set's arrays from the cache, and what their content is called, if it is."""
    if source.identity is not None:
        return cache.entry(recipe.cache_dir, "data", _key(source), lambda: _load(source)), None
    loaded = None if recipe.content else _load(source)
    content = recipe.content if loaded is None else json_sha256(loaded.info)

    def make() -> cache.Content:
        made = _load(source) if loaded is None else loaded
        if json_sha256(made.info) != content:  # this is another machine than the one that knows
            raise RunError(
                f"[data] name = '{source.name}': gives other data here than where the run was "
                "started: give every machine the same files, and draw nothing without a seed"
            )
        return made

    key = {"name": source.name, "content": content}
    return cache.entry(recipe.cache_dir, "data", key, make), content


def _completed(source: PooledSource, loaded: cache.Content) -> PooledSource:
    """Add to a source what is known of it once it was read."""
    fraction = loaded.info["test_fraction"]
    return replace(
        source,
        test_fraction=source.test_fraction if fraction is None else fraction,
        description={**source.description, **loaded.info["notes"]},
    )


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
    info = {
        "sha256": {name: array_sha256(array) for name, array in arrays.items()},
        "spec": list(loaded.spec),
        "group_names": list(loaded.group_names),
        "test_fraction": loaded.test_fraction,
        "standardise": list(loaded.standardise),
        "notes": dict(loaded.notes),
        "said": list(loaded.said),
    }
    return cache.Content(arrays, info)
