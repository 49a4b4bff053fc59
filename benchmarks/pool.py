"""The data that all systems read: a pool of a hundred shares, made once, before any timing.

Client c holds share c mod 100. fedsim reads it in one of two ways: up to a hundred clients by a
loader of the user's own (`load`), with the natural partition; more clients as `SharedPool`, for a
`DataSet` cannot say that several clients hold the same rows.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.basics.samples import SampleSpec
from fedsim.data.federated import (
    Arrays,
    ClientIds,
    ClientRows,
    DataRecipe,
    FederatedData,
    Ints,
    json_sha256,
)
from fedsim.data.partitions.partition import Partition
from fedsim.data.sets.formats import DATASETS
from fedsim.data.sets.user import DataSet

SHARES = 100
CLASSES = 10
SHARED = "benchmark_pool"  # the name of `SharedPool` in a scenario

_SHAPE = (1, 28, 28)
_NOISE, _PATTERN = 0.3, 0.15  # pixels much larger make a step of 0.1 diverge


def make(folder: Path, kind: str) -> Path:
    """Write the pool of a kind, unless it is there, and return its folder.

    An image is normal noise on a faint coarse pattern of its class, so that there is a loss to be
    lowered and systems can be held to the same one.

    Args:
        folder: Where pools are.
        kind: "equal", 200 samples per share; "lognormal", 20 to 2,000 of them, median 200.
    """
    place = folder / kind
    if (place / "offsets.npy").is_file():
        return place
    random = np.random.default_rng(2026)
    sizes = np.full(SHARES, 200)
    if kind == "lognormal":
        sizes = np.clip(np.exp(random.normal(np.log(200), 1, SHARES)), 20, 2000).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    y = random.integers(CLASSES, size=offsets[-1])
    patterns = random.standard_normal((CLASSES, 1, 7, 7), dtype=np.float32)
    x = random.standard_normal((len(y), *_SHAPE), dtype=np.float32) * np.float32(_NOISE)
    x += np.float32(_PATTERN) * patterns.repeat(4, axis=2).repeat(4, axis=3)[y]
    place.mkdir(parents=True, exist_ok=True)
    for name, array in (("x", x), ("y", y), ("offsets", offsets)):  # the last one says all is there
        partial = place / f"{name}.{os.getpid()}.npy"
        np.save(partial, array)
        partial.rename(place / f"{name}.npy")
    return place


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a pool's features, targets and offsets, mapped read-only."""
    x, y, offsets = (np.load(Path(path) / f"{n}.npy", mmap_mode="r") for n in ("x", "y", "offsets"))
    return x, y, offsets


def load(*, path: str, clients: int = SHARES) -> DataSet:
    """Return the first shares of a pool, each its client's own: a loader as a user would write it.

    Args:
        path: The pool's folder.
        clients: How many shares; at most 100.
    """
    x, y, offsets = read(path)
    end = offsets[clients]
    return DataSet(
        features=np.array(x[:end]),
        targets=np.array(y[:end]),
        groups=np.repeat(np.arange(clients), np.diff(offsets[: clients + 1])),
        test_features=np.array(x[:CLASSES]),
        test_targets=np.array(y[:CLASSES]),
        num_classes=CLASSES,
    )


class SharedPool(FederatedData):
    """Any number of clients over one mapped pool; nothing is kept of a client."""

    def __init__(self, path: str, num_clients: int) -> None:
        x, y, self._offsets = read(path)
        self._pool = Arrays(x, y)
        self._path = path
        self.clients_read = 0
        self.num_clients = num_clients
        self.spec = SampleSpec(_SHAPE, CLASSES)
        sizes = np.diff(self._offsets)
        self.manifest = {
            "data": {"name": SHARED, "samples": len(y)},
            "sizes": {"max": int(sizes.max()), "min": int(sizes.min())},
        }
        self.manifest_sha256 = json_sha256({**self.manifest, "clients": num_clients})

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedPool, (self._path, self.num_clients)

    def sizes(self, client_ids: ClientIds) -> Ints:
        """Return each client's number of samples."""
        shares = self._checked(client_ids) % SHARES
        sizes: Ints = self._offsets[shares + 1] - self._offsets[shares]
        return sizes

    def clients(self, client_ids: ClientIds, *, split: str = "train") -> ClientRows:
        """Return the pool, and the rows of each client's share."""
        shares = self._checked(client_ids, split) % SHARES
        self.clients_read += len(shares)
        rows = [np.arange(self._offsets[s], self._offsets[s + 1]) for s in shares]
        return ClientRows(*self._pool, rows)

    @property
    def test(self) -> Arrays:
        """Ten samples, for a server that must have some."""
        return Arrays(*(np.array(part[:CLASSES]) for part in self._pool))


class _SharedSource:
    def __init__(self, path: str) -> None:
        self._path = path

    def federate(self, partition: Partition, recipe: DataRecipe) -> FederatedData:
        assert partition.clients is not None
        return SharedPool(self._path, partition.clients)


def register() -> None:
    """Let scenarios of this process name `SharedPool`; its workers get it pickled."""

    def benchmark_pool(*, path: str) -> _SharedSource:
        """Clients that share the rows of a pool: client c holds share c mod 100."""
        return _SharedSource(path)

    DATASETS[SHARED] = benchmark_pool  # type: ignore[index]


def loss(model: str, params: Mapping[str, np.ndarray], path: str | Path) -> float:
    """Return the mean cross-entropy of a model over a whole pool, in float64."""
    import torch

    from benchmarks.systems import torch_models

    x, y, _ = read(path)
    net = torch_models.make(model).double()
    net.load_state_dict({n: torch.from_numpy(np.array(a, np.float64)) for n, a in params.items()})
    with torch.no_grad():
        parts = [
            torch.nn.functional.cross_entropy(
                net(torch.from_numpy(np.array(x[i : i + 2000])).double()),
                torch.from_numpy(np.array(y[i : i + 2000])),
                reduction="sum",
            )
            for i in range(0, len(y), 2000)
        ]
    return float(sum(parts)) / len(y)


def start_from(folder: Path, model: str) -> Path:
    """Write the model that all start from, as .npz and .safetensors, and return the former."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.systems import torch_models

    place = folder / f"{model}.npz"
    if not place.is_file():
        torch.manual_seed(2026)
        net = torch_models.make(model)
        save_file(dict(net.state_dict()), place.with_suffix(".safetensors"))
        partial = place.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **torch_models.named(net))
        partial.rename(place)
    return place
