"""Synthetic clients made on demand: nothing exists of a client until somebody asks for it.

Li et al., "Federated Optimization in Heterogeneous Networks" (FedProx), MLSys 2020
(arXiv:1812.06127), section 5.1 and appendix C.1. For client k:

    u_k ~ N(0, alpha), W_k[i, j] ~ N(u_k, 1), b_k[j] ~ N(u_k, 1)       how its labels depend on x
    B_k ~ N(0, beta),  v_k[i] ~ N(B_k, 1),    x ~ N(v_k, diag(i^-1.2)), i = 1...dimension
    y = argmax softmax(W_k x + b_k)

Everything of client k is drawn from (seed, "synthetic", k), hence equal in every process.

alpha changes no label, neither here nor with the authors' generator: u_k moves all entries of W_k
and b_k alike, which adds the same number, u_k (1 + sum_i x_i), to all logits of a sample. Labels
differ between clients because each has a W_k of its own; beta alone says how far features differ.

Deviations: alpha and beta are standard deviations, as in the authors' code (the paper's notation
leaves it open; 0 and 1 mean the same either way). Sizes are the authors' lognormal(4, 2) + 50,
truncated at `max_samples`, which the authors' are not. Samples of the server's test set are drawn
in addition to the clients', from the same laws, so that no client's data depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.basics.samples import SampleSpec
from fedsim.data.federated import (
    Arrays,
    ClientIds,
    ClientRows,
    DataRecipe,
    FederatedData,
    Ints,
    array_sha256,
    json_sha256,
    size_summary,
)
from fedsim.data.partitions.drawing import local_test_counts
from fedsim.data.partitions.partition import DEFAULT_CLIENTS, Partition

SUMMARISED_CLIENTS = 1000  # whose sizes stand in the manifest
_MOST = 1e6  # standard deviations: what features in float32 bear
HASHED_CLIENTS = 3  # whose samples stand in the manifest's hash, beside the law itself

Matrix = npt.NDArray[np.float64]


class _Law(NamedTuple):
    """What a client's samples follow: x around `center`, y = argmax(x weights + bias)."""

    center: Matrix
    weights: Matrix
    bias: Matrix


class GeneratedSource(Protocol):
    """What makes clients on demand: a frozen record of its arguments, which name it."""

    @property
    def dimension(self) -> int:
        """Features per sample."""

    @property
    def classes(self) -> int:
        """Classes."""

    @property
    def max_samples(self) -> int:
        """The most that a client has."""

    @property
    def test_fraction(self) -> float:
        """The server's test samples of a client, as a fraction of the client's."""

    @property
    def test_clients(self) -> int:
        """How many clients' laws the server's test set is drawn from."""

    @property
    def differs_by(self) -> str:
        """Which keys say how clients differ, with the verb."""

    def common(self, generator: np.random.Generator) -> Any:
        """Draw what all clients' laws share."""

    def size(self, generator: np.random.Generator) -> int:
        """Draw a client's number of samples: the first draw from its generator."""

    def law(self, generator: np.random.Generator, common: Any) -> Any:
        """Draw a client's law: what follows the size."""

    def test_law(self, law: Any) -> Any:
        """Return what the server's test samples follow in place of a client's law."""

    def draw(self, law: Any, samples: int, generator: np.random.Generator) -> Arrays:
        """Draw samples of a client."""


@dataclass(frozen=True)
class SyntheticSource:
    """The generator with its arguments; see `synthetic`."""

    alpha: float
    beta: float
    dimension: int
    classes: int
    max_samples: int
    test_fraction: float
    test_clients: int

    differs_by: ClassVar[str] = "alpha and beta say"

    def common(self, generator: np.random.Generator) -> None:
        """Draw nothing: clients' laws share nothing."""

    def size(self, generator: np.random.Generator) -> int:
        """Draw a client's number of samples: the first draw from its generator."""
        return min(int(generator.lognormal(4, 2)) + 50, self.max_samples)

    def law(self, generator: np.random.Generator, common: None = None) -> _Law:
        """Draw a client's law: what follows the size."""
        u = generator.normal(0, self.alpha)
        b = generator.normal(0, self.beta)
        return _Law(
            center=generator.normal(b, 1, self.dimension),
            weights=generator.normal(u, 1, (self.dimension, self.classes)),
            bias=generator.normal(u, 1, self.classes),
        )

    def test_law(self, law: _Law) -> _Law:
        """Return the client's own law."""
        return law

    def draw(self, law: _Law, samples: int, generator: np.random.Generator) -> Arrays:
        """Draw samples of a client."""
        scale = np.arange(1, self.dimension + 1) ** -0.6  # standard deviation: variance is i^-1.2
        x = law.center + scale * generator.standard_normal((samples, self.dimension))
        # softmax keeps the order of the logits
        y = (x @ law.weights + law.bias).argmax(axis=1)
        return Arrays(x.astype(np.float32), y.astype(np.int64))


def synthetic(
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    dimension: int = 60,
    classes: int = 10,
    max_samples: int = 1000,
    test_fraction: float = 0.2,
    test_clients: int = 100,
) -> SyntheticSource:
    """Synthetic(alpha, beta) of the FedProx paper, made on demand for any number of clients.

    Args:
        alpha: How much local models differ (standard deviation of their mean); in
            [0, 1e6]. It changes no label: a mean of all weights moves all logits alike.
        beta: How much local features differ (standard deviation of their mean); in
            [0, 1e6].
        dimension: Features per sample; >= 1.
        classes: Classes; >= 2.
        max_samples: Upper bound of a client's samples, which number lognormal(4, 2) + 50; >= 1.
        test_fraction: Test samples held by the server for each of `test_clients` clients, as a
            fraction of that client's samples and in addition to them; in (0, 1].
        test_clients: How many clients' laws the server's test set is drawn from (the first ones);
            >= 1.

    Raises:
        ScenarioError: If an argument is outside its range.
    """
    for name, value, holds, allowed in (
        ("alpha", alpha, 0 <= alpha <= _MOST, f"in [0, {_MOST:g}]"),
        ("beta", beta, 0 <= beta <= _MOST, f"in [0, {_MOST:g}]"),
        ("dimension", dimension, dimension >= 1, ">= 1"),
        ("classes", classes, classes >= 2, ">= 2"),
        ("max_samples", max_samples, max_samples >= 1, ">= 1"),
        ("test_fraction", test_fraction, 0 < test_fraction <= 1, "in (0, 1]"),
        ("test_clients", test_clients, test_clients >= 1, ">= 1"),
    ):
        if not holds:
            raise ScenarioError(f"[data] {name} = {value}: must be {allowed}")
    return SyntheticSource(
        alpha, beta, dimension, classes, max_samples, test_fraction, test_clients
    )


class SyntheticData(FederatedData):
    """Clients that are made each time they are asked for; nothing grows with their number."""

    def __init__(self, source: GeneratedSource, partition: Partition, recipe: DataRecipe) -> None:
        super().__init__(recipe)
        name = recipe.data["name"]
        if not partition.rule.natural:
            raise ScenarioError(
                f"[partition] kind = '{recipe.partition['kind']}': {name} makes each client's "
                "samples itself; use kind = 'natural'"
            )
        if partition.parts is not None:
            raise ScenarioError(
                f'[partition] parts = {partition.parts} with [data] name = "{name}": every '
                "client's samples are made on demand, however many clients there are; leave it out"
            )
        for key in ("label_noise", *partition.skew.active):
            if key != "label_noise" or np.any(partition.label_noise):
                raise ScenarioError(
                    f'[partition] {key} with [data] name = "{name}": its {source.differs_by} how '
                    "clients differ, and its samples are made on demand; leave it out"
                )
        self._source = source
        self._test_fraction = partition.test_fraction
        self._seed = recipe.seed
        self._common = source.common(rng.generator(self._seed, "synthetic-common"))
        self.num_clients = partition.clients or DEFAULT_CLIENTS
        self.spec = SampleSpec((source.dimension,), source.classes)
        self._describe(recipe)

    def sizes(self, client_ids: ClientIds) -> Ints:
        """Return each client's number of training samples, drawing nothing else of it."""
        totals = self._totals(self._checked(client_ids))
        return totals - local_test_counts(totals, self._test_fraction)

    def clients(self, client_ids: ClientIds, *, split: str = "train") -> ClientRows:
        """Make the given clients' samples, one after the other in one pool."""
        ids = self._checked(client_ids, split)
        self.clients_read += len(ids)
        parts = [self._client(int(client_id), split) for client_id in ids]
        pool = self._joined(parts)
        ends = np.cumsum([len(part.targets) for part in parts], dtype=np.int64)
        rows = [
            np.arange(end - len(part.targets), end, dtype=np.int64)
            for part, end in zip(parts, ends, strict=True)
        ]
        return ClientRows(*pool, rows)

    @cached_property
    def test(self) -> Arrays:
        """The server's test set: fresh samples of the first `test_clients` clients' laws."""
        return self._joined([self._held_out(client_id) for client_id in self._test_clients])

    @property
    def _test_clients(self) -> range:
        return range(min(self._source.test_clients, self.num_clients))

    def _joined(self, parts: Sequence[Arrays]) -> Arrays:
        empty = Arrays(
            np.zeros((0, *self.feature_shape), dtype=np.float32), np.zeros(0, dtype=np.int64)
        )
        return Arrays(
            np.concatenate([empty.features, *(part.features for part in parts)]),
            np.concatenate([empty.targets, *(part.targets for part in parts)]),
        )

    def _generator(self, client_id: int) -> np.random.Generator:
        return rng.generator(self._seed, "synthetic", client_id)

    def _law(self, generator: np.random.Generator) -> Any:
        return self._source.law(generator, self._common)

    def _totals(self, ids: Ints) -> Ints:
        sizes = (self._source.size(self._generator(int(client_id))) for client_id in ids)
        return np.fromiter(sizes, dtype=np.int64, count=len(ids))

    def _client(self, client_id: int, split: str) -> Arrays:
        generator = self._generator(client_id)
        total = self._source.size(generator)
        samples = self._source.draw(self._law(generator), total, generator)
        # the samples are independent: the last ones are as good a test split as any
        cut = total - int(local_test_counts(np.array([total]), self._test_fraction)[0])
        part = slice(0, cut) if split == "train" else slice(cut, total)
        return Arrays(samples.features[part], samples.targets[part])

    def _held_out(self, client_id: int) -> Arrays:
        generator = self._generator(client_id)
        samples = int(np.ceil(self._source.size(generator) * self._source.test_fraction))
        law = self._source.test_law(self._law(generator))
        return self._source.draw(
            law, samples, rng.generator(self._seed, "synthetic-test", client_id)
        )

    def _describe(self, recipe: DataRecipe) -> None:
        counted = np.arange(min(self.num_clients, SUMMARISED_CLIENTS))
        totals = self._totals(counted)
        test_counts = local_test_counts(totals, self._test_fraction)
        test_clients = np.arange(len(self._test_clients))
        held_out = np.ceil(self._totals(test_clients) * self._source.test_fraction)
        content = {
            f"client {client_id}": {
                name: array_sha256(array)
                for name, array in self._client(client_id, "train")._asdict().items()
            }
            for client_id in range(min(self.num_clients, HASHED_CLIENTS))
        }
        decisive = {
            "data": self._source.__dict__,
            "clients": self.num_clients,
            "test_fraction": self._test_fraction,
            "seed": self._seed,
            "sha256": content,
        }
        self.manifest = {
            "data": {
                "name": recipe.data["name"],
                **self._source.__dict__,
                "feature_shape": list(self.feature_shape),
                "samples": f"made on demand from (seed, client), at most {self._source.max_samples}"
                " per client",
            },
            "held_out": {
                "samples": int(held_out.sum()),
                "drawn": f"in addition, from the laws of the first {len(test_clients)} clients",
            },
            "partition": {**recipe.partition, "clients": self.num_clients, "seed": recipe.seed},
            "sizes": {"clients_counted": len(counted), **size_summary(totals - test_counts)},
            "local_test": {"clients_counted": len(counted), "sizes": size_summary(test_counts)},
            "dropped": {"samples": 0, "reason": None},
            "sha256": content,
        }
        self.manifest_sha256 = json_sha256(decisive)
