"""Federated data as other rooms see them: arrays, and rows per client."""

import abc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics.samples import SampleSpec

TENTHS = (
    10  # parts of equal frequency that targets of numbers are divided into, to stand for classes
)

Ints = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32] | Ints
Targets = Ints | npt.NDArray[np.float32]
ClientIds = Sequence[int] | Ints


class Arrays(NamedTuple):
    """Samples, perhaps as read-only memory maps.

    Attributes:
        features: `[n, ...]`, C-contiguous; float32, or int64 tokens.
        targets: `[n]` int64 classes, or float32 numbers `[n, ...]`.
    """

    features: Features
    targets: Targets


class Samples(NamedTuple):
    """What a rule of division may look at.

    Attributes:
        labels: The class of each sample, `[n]`; where targets are numbers, the tenth of their
            distribution that each lies in, 0 to 9.
        groups: The number of each sample's natural owner (a writer, a role), `[n]`; None when the
            data set does not say.
        rows: The number of each sample in the data set, ascending, `[n]`; None means 0 to n-1.
        in_dataset: How many samples the data set has, those that the server holds out included;
            None means n.
    """

    labels: Ints
    groups: Ints | None = None
    rows: Ints | None = None
    in_dataset: int | None = None


class ClientRows(NamedTuple):
    """What one chunk of clients reads: a pool of samples, and which rows are whose.

    Attributes:
        features: The pool, `[n, ...]`; perhaps a read-only memory map.
        targets: The pool's targets, `[n, ...]`.
        rows: For each client asked for, in that order, the numbers of its rows in the pool.
    """

    features: Features
    targets: Targets
    rows: list[Ints]


class DataRecipe(NamedTuple):
    """What `prepare` was called with: enough to have the same data again, here or elsewhere.

    Attributes:
        data: The [data] table, complete.
        partition: The [partition] table, complete.
        seed: The scenario's seed.
        cache_dir: Where arrays are mapped from.
        reopen: Has the same data again, from the other fields and the hash of the manifest.
        content: What the data set's content is called in the cache, once it was read and when
            nothing but the content can tell.
    """

    data: dict[str, Any]
    partition: dict[str, Any]
    seed: int
    cache_dir: Path
    reopen: "Callable[[tuple[Any, ...], str], FederatedData]"
    content: str | None = None


class FederatedData(abc.ABC):
    """A data set divided among clients.

    It pickles as its recipe. Unpickled in another process of the machine it opens the same files;
    on another machine it prepares the data again, and refuses data that differ.

    Attributes:
        num_clients: Clients registered; their ids are 0...N-1.
        spec: What one sample looks like.
        manifest: What the data are and who holds what, in numbers and hashes, as JSON.
        manifest_sha256: Hash of everything that decides who holds what: contents and assignment.
        clients_read: How many client data sets this object has handed out.
        said: What was chosen from the data because the scenario does not say it, and what in them
            looks like a mistake, in lines.
    """

    num_clients: int
    spec: SampleSpec
    manifest: dict[str, Any]
    manifest_sha256: str
    said: tuple[str, ...] = ()

    def __init__(self, recipe: DataRecipe) -> None:
        self._recipe = recipe
        self.clients_read = 0

    @property
    def recipe(self) -> DataRecipe:
        """What the same data are had with."""
        return self._recipe

    @property
    def num_parts(self) -> int:
        """M where client c holds what client c mod M holds; N when no samples are shared."""
        return self.num_clients

    @property
    def is_whole(self) -> bool:
        """Whether the samples of every client can be had in this process."""
        return True

    @property
    def to_try(self) -> "FederatedData":
        """What a user's model is tried on before round 1: these, or samples in their place."""
        return self

    @property
    def num_classes(self) -> int:
        """Classes of the targets; 0 when they are numbers."""
        return self.spec.num_classes

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one sample's features."""
        return self.spec.feature_shape

    @property
    def raw_units(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
        """Mean and deviation of the raw features where these are standardised, else None.

        Both broadcast to a sample; of images they are `[channels, 1, 1]`. What a user's loader made
        of its features is not known here: its units are what it returned.
        """
        known = self.manifest.get("data", {})
        found = known.get("standardised", {}).get("features") if isinstance(known, dict) else None
        if found is None:
            return None
        shape = self.spec.feature_shape
        wide = (-1, 1, 1) if len(shape) == 3 else shape
        mean, deviation = (np.asarray(found[n], dtype=np.float64) for n in ("mean", "std"))
        return mean.reshape(wide), deviation.reshape(wide)

    @property
    def num_labels(self) -> int:
        """How many values `labels` has."""
        return self.spec.num_classes or TENTHS

    def labels(self, client_ids: ClientIds) -> list[Ints]:
        """Return the labels of each client's training samples, see `Samples.labels`."""
        held = self.clients(client_ids)
        return [held.targets[rows].astype(np.int64, copy=False) for rows in held.rows]

    @abc.abstractmethod
    def sizes(self, client_ids: ClientIds) -> Ints:
        """Return each client's number of training samples, at a cost that grows with `client_ids`.

        Raises:
            IndexError: If there is no such client.
        """

    @abc.abstractmethod
    def clients(self, client_ids: ClientIds, *, split: str = "train") -> ClientRows:
        """Return what the given clients hold.

        Args:
            client_ids: Any clients, in any order.
            split: "train", or "test" for their local test splits (empty without
                `[partition] test_fraction`).

        Raises:
            IndexError: If there is no such client.
            ValueError: If `split` is neither.
        """

    @property
    @abc.abstractmethod
    def test(self) -> Arrays:
        """The server's held-out test set, which no client holds."""

    def __reduce__(self) -> tuple[Any, ...]:
        data, partition, seed, cache_dir, reopen, content = self._recipe
        return reopen, ((data, partition, seed, cache_dir, content), self.manifest_sha256)

    def _checked(self, client_ids: ClientIds, split: str = "train") -> Ints:
        if split not in ("train", "test"):
            raise ValueError(f"split = {split!r}: must be 'train' or 'test'")
        ids = np.asarray(client_ids, dtype=np.int64).reshape(-1)
        wrong = ids[(ids < 0) | (ids >= self.num_clients)]
        if wrong.size:
            raise IndexError(
                f"client {wrong[0]} does not exist: ids are 0 to {self.num_clients - 1}"
            )
        return ids


def array_sha256(array: npt.NDArray[Any]) -> str:
    """Return the hash of an array's dtype, shape and content."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    if array.size:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def json_sha256(value: Mapping[str, Any]) -> str:
    """Return the hash of a JSON object, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def size_summary(sizes: Ints) -> dict[str, float | int]:
    """Return smallest, median, mean and largest of some sizes, and how many are zero."""
    return {
        "min": int(sizes.min()),
        "median": float(np.median(sizes)),
        "mean": float(sizes.mean()),
        "max": int(sizes.max()),
        "empty": int((sizes == 0).sum()),
    }
