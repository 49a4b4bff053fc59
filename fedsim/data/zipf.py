"""Sparse binary features whose frequencies follow Zipf's law, made on demand.

The setting in which adaptive server optimisers gain most (Reddi et al., "Adaptive Federated
Optimization", ICLR 2021, arXiv:2003.00295): most features are rare, and what a rare one means is
told by few clients in few rounds. For client k:

    f_j ~ j^-exponent (sums to 1),   p_k ~ Dirichlet(concentration * f)
    x has `active` ones, drawn without replacement by p_k;   P(y = 1 | x) = sigmoid(w x)
    w_j ~ N(0, signal^2), the same for all clients

The server's test set has features that are all as common, so that rare ones count as much as
others; `uniform_test = false` draws it from the clients' laws.

Everything of client k is drawn from (seed, "synthetic", k), and w from (seed, "synthetic-common").
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import Arrays

_LEAST = 1e-300  # of a probability, so that its logarithm is finite
_BLOCK = 2**22  # numbers that are drawn at once

Vector = npt.NDArray[np.float64]


class FeatureLaw(NamedTuple):
    """What samples follow.

    Attributes:
        features: `[dimension]`, how likely each feature is.
        weights: `[dimension]`, w.
    """

    features: Vector
    weights: Vector


@dataclass(frozen=True)
class ZipfSource:
    """The generator with its arguments; see `zipf`."""

    dimension: int
    active: int
    exponent: float
    concentration: float
    signal: float
    samples: int
    uniform_test: bool
    test_fraction: float
    test_clients: int

    classes: ClassVar[int] = 2
    differs_by: ClassVar[str] = "concentration says"

    @property
    def max_samples(self) -> int:
        """The most that a client has: every one has as many."""
        return self.samples

    def common(self, generator: np.random.Generator) -> Vector:
        """Draw what all clients share: w, `[dimension]`."""
        return self.signal * generator.standard_normal(self.dimension)

    def size(self, generator: np.random.Generator) -> int:
        """Return a client's number of samples; nothing is drawn."""
        return self.samples

    def law(self, generator: np.random.Generator, common: Vector) -> FeatureLaw:
        """Draw a client's law."""
        frequency = np.arange(1, self.dimension + 1) ** -self.exponent
        mean = frequency / frequency.sum()
        return FeatureLaw(generator.dirichlet(self.concentration * mean), common)

    def test_law(self, law: FeatureLaw) -> FeatureLaw:
        """Return what the server's test samples follow in place of a client's law."""
        if not self.uniform_test:
            return law
        return law._replace(features=np.full(self.dimension, 1 / self.dimension))

    def draw(self, law: FeatureLaw, samples: int, generator: np.random.Generator) -> Arrays:
        """Draw samples."""
        x = np.zeros((samples, self.dimension), dtype=np.float32)
        chance = np.log(np.maximum(law.features, _LEAST))
        rows = max(1, _BLOCK // self.dimension)
        for first in range(0, samples, rows):
            part = x[first : first + rows]
            # the largest of log p + Gumbel noise are a draw by p without replacement
            score = chance + generator.gumbel(size=part.shape)
            ones = np.argpartition(-score, self.active - 1, axis=1)[:, : self.active]
            np.put_along_axis(part, ones, 1.0, axis=1)
        positive = 1 / (1 + np.exp(-(x @ law.weights)))
        y = generator.random(samples) < positive
        return Arrays(x, y.astype(np.int64))


def zipf(
    *,
    dimension: int = 300,
    active: int = 6,
    exponent: float = 1.1,
    concentration: float = 60.0,
    signal: float = 2.0,
    samples: int = 40,
    uniform_test: bool = True,
    test_fraction: float = 0.5,
    test_clients: int = 100,
) -> ZipfSource:
    """Sparse binary features of Zipf's frequencies, two classes, made on demand.

    Args:
        dimension: Features per sample; >= 1.
        active: How many of them are 1; in 1 to `dimension`.
        exponent: The j-th feature is as common as j to the minus this; in [0, 10].
        concentration: How alike clients' features are; > 0 and at most 1e9.
        signal: Standard deviation of the features' true weights; in [0, 1e6].
        samples: Samples of every client; >= 1.
        uniform_test: Whether all features are as common in the server's test set; else it follows
            the clients' laws.
        test_fraction: Test samples held by the server for each of `test_clients` clients, as a
            fraction of that client's samples and in addition to them; in (0, 1].
        test_clients: How many clients' laws the server's test set is drawn from (the first ones);
            >= 1.

    Raises:
        ScenarioError: If an argument is outside its range.
    """
    for name, value, holds, allowed in (
        ("dimension", dimension, dimension >= 1, ">= 1"),
        ("active", active, 1 <= active <= dimension, f"in 1 to dimension = {dimension}"),
        ("exponent", exponent, 0 <= exponent <= 10, "in [0, 10]"),
        ("concentration", concentration, 0 < concentration <= 1e9, "> 0 and at most 1e9"),
        ("signal", signal, 0 <= signal <= 1e6, "in [0, 1e6]"),
        ("samples", samples, samples >= 1, ">= 1"),
        ("test_fraction", test_fraction, 0 < test_fraction <= 1, "in (0, 1]"),
        ("test_clients", test_clients, test_clients >= 1, ">= 1"),
    ):
        if not holds:
            raise ScenarioError(f"[data] {name} = {value}: must be {allowed}")
    return ZipfSource(
        dimension, active, exponent, concentration, signal, samples, uniform_test, test_fraction,
        test_clients,
    )  # fmt: skip
