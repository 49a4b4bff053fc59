"""One feature that is often right and hardly moved, many that are weak and easily turned around.

Tsipras, Santurkar, Engstrom, Turner and Madry, "Robustness May Be at Odds with Accuracy", ICLR 2019
(arXiv:1805.12152), section 2.1, scaled so that `deviation` is that of the weak features:

    y uniform in {-1, 1},   x_1 = y with probability `agreement`, else -y
    x_j ~ N(shift * y, deviation^2), j = 2...weak + 1

The mean of many weak features tells y almost surely, and a change of every feature by more than
`shift` turns what it tells around; the first feature alone is right with `agreement`, whatever
moves it by less than 1. Class 1 is y = 1. All clients' samples follow this law.

Everything of client k is drawn from (seed, "synthetic", k).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import Arrays


@dataclass(frozen=True)
class BrittleSource:
    """The generator with its arguments; see `brittle`."""

    weak: int
    agreement: float
    shift: float
    deviation: float
    samples: int
    test_fraction: float
    test_clients: int

    classes: ClassVar[int] = 2
    differs_by: ClassVar[str] = "one law says"

    @property
    def dimension(self) -> int:
        """Features per sample: the strong one and the weak ones."""
        return self.weak + 1

    @property
    def max_samples(self) -> int:
        """The most that a client has: every one has as many."""
        return self.samples

    def common(self, generator: np.random.Generator) -> None:
        """Draw nothing."""

    def size(self, generator: np.random.Generator) -> int:
        """Return a client's number of samples; nothing is drawn."""
        return self.samples

    def law(self, generator: np.random.Generator, common: None) -> None:
        """Draw nothing: all clients' samples follow one law."""

    def test_law(self, law: None) -> None:
        """The server's test samples follow it too."""

    def draw(self, law: None, samples: int, generator: np.random.Generator) -> Arrays:
        """Draw samples."""
        y = 2 * generator.integers(2, size=samples) - 1
        agrees = generator.random(samples) < self.agreement
        noise = generator.standard_normal((samples, self.weak))
        x = np.empty((samples, self.dimension), dtype=np.float32)
        x[:, 0] = np.where(agrees, y, -y)
        x[:, 1:] = self.shift * y[:, None] + self.deviation * noise
        return Arrays(x, (y > 0).astype(np.int64))


def brittle(
    *,
    weak: int = 40,
    agreement: float = 0.93,
    shift: float = 0.25,
    deviation: float = 0.5,
    samples: int = 100,
    test_fraction: float = 1.0,
    test_clients: int = 20,
) -> BrittleSource:
    """A strong feature and many weak ones that a small change turns around, made on demand.

    Args:
        weak: Weak features; >= 1.
        agreement: How often the strong feature is right; in [0, 1].
        shift: Mean of a weak feature times the class; in [0, 1e6].
        deviation: Standard deviation of a weak feature; in [0, 1e6].
        samples: Samples of every client; >= 1.
        test_fraction: Test samples held by the server for each of `test_clients` clients, as a
            fraction of that client's samples and in addition to them; in (0, 1].
        test_clients: How many clients the server's test set is drawn for (the first ones); >= 1.

    Raises:
        ScenarioError: If an argument is outside its range.
    """
    for name, value, holds, allowed in (
        ("weak", weak, weak >= 1, ">= 1"),
        ("agreement", agreement, 0 <= agreement <= 1, "in [0, 1]"),
        ("shift", shift, 0 <= shift <= 1e6, "in [0, 1e6]"),
        ("deviation", deviation, 0 <= deviation <= 1e6, "in [0, 1e6]"),
        ("samples", samples, samples >= 1, ">= 1"),
        ("test_fraction", test_fraction, 0 < test_fraction <= 1, "in (0, 1]"),
        ("test_clients", test_clients, test_clients >= 1, ">= 1"),
    ):
        if not holds:
            raise ScenarioError(f"[data] {name} = {value}: must be {allowed}")
    return BrittleSource(weak, agreement, shift, deviation, samples, test_fraction, test_clients)
