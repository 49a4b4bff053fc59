"""Who takes part in a round, as a function of (seed, round) alone.

What is drawn is participation itself: availability, invitation and answer in one. A rule that needs
memory (a Markov chain, a trace) keeps it in `state`, which a checkpoint holds.
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

from fedsim import rng
from fedsim.errors import ScenarioError


class Participation(abc.ABC):
    """A rule that says which clients take part in which round."""

    @abc.abstractmethod
    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return the round's participants: sorted unique client ids, perhaps none.

        Args:
            server_round: 1...T.
            num_clients: Clients registered.
            seed: The scenario's seed.

        Raises:
            ScenarioError: If the rule cannot be followed with so many clients.
        """

    @abc.abstractmethod
    def expected_cohort(self, num_clients: int) -> int:
        """Return how many clients are expected per round, rounded; at least one."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as JSON; nothing for a rule without memory."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned.

        Raises:
            ValueError: If the rule has no memory and the state holds something.
        """
        if state:
            name = type(self).__name__.lower()
            raise ValueError(f"participation '{name}' has no state, the checkpoint has {state}")


def _generator(seed: int, server_round: int) -> np.random.Generator:
    return rng.generator(seed, "participation", server_round)


def _subset(generator: np.random.Generator, num_clients: int, size: int) -> npt.NDArray[np.int64]:
    # without shuffling numpy draws a small subset by Floyd's method: work and memory grow with the
    # subset, not with the clients registered
    chosen = generator.choice(num_clients, size=size, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64, copy=False)


@final
class Full(Participation):
    """Every client in every round."""

    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return all clients."""
        return np.arange(num_clients, dtype=np.int64)

    def expected_cohort(self, num_clients: int) -> int:
        """Return the number of clients."""
        return num_clients


@final
class Uniform(Participation):
    """A cohort of fixed size, drawn uniformly without replacement.

    Args:
        cohort_size: Clients per round; >= 1 and at most the number of clients.

    Raises:
        ScenarioError: If `cohort_size` is below 1.
    """

    def __init__(self, *, cohort_size: int = 10) -> None:
        if cohort_size < 1:
            raise ScenarioError(f"[participation] cohort_size = {cohort_size}: must be >= 1")
        self._cohort_size = cohort_size

    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return the round's cohort, at a cost that grows with the cohort alone."""
        self._check(num_clients)
        return _subset(_generator(seed, server_round), num_clients, self._cohort_size)

    def expected_cohort(self, num_clients: int) -> int:
        """Return the cohort's size."""
        self._check(num_clients)
        return self._cohort_size

    def _check(self, num_clients: int) -> None:
        if self._cohort_size > num_clients:
            raise ScenarioError(
                f"[participation] cohort_size = {self._cohort_size}: there are {num_clients} "
                f"clients; use at most {num_clients}"
            )


@final
class Bernoulli(Participation):
    """Each client on its own with a given probability; a round may stay empty.

    Args:
        rate: Probability of taking part in a round, in (0, 1]; or one per client, each in [0, 1].

    Raises:
        ScenarioError: If a rate is outside its range.
    """

    def __init__(self, *, rate: float | Sequence[float] = 0.1) -> None:
        if isinstance(rate, Sequence):
            for client_id, value in enumerate(rate):
                if not 0 <= value <= 1:
                    raise ScenarioError(
                        f"[participation] rate = {value} for client {client_id}: must be in [0, 1]"
                    )
            if not any(rate):
                raise ScenarioError("[participation] rate: at least one must be > 0")
        elif not 0 < rate <= 1:
            raise ScenarioError(f"[participation] rate = {rate}: must be in (0, 1]")
        self._rate = tuple(rate) if isinstance(rate, Sequence) else rate

    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return who takes part; with one common rate the cost grows with the cohort alone."""
        generator = _generator(seed, server_round)
        if isinstance(self._rate, tuple):
            self._check(self._rate, num_clients)
            return np.flatnonzero(generator.random(num_clients) < self._rate).astype(np.int64)
        # independent coins of equal rate are a binomial count and then a uniform subset
        size = int(generator.binomial(num_clients, self._rate))
        return _subset(generator, num_clients, size)

    def expected_cohort(self, num_clients: int) -> int:
        """Return the sum of the clients' rates, rounded; at least one."""
        if isinstance(self._rate, tuple):
            self._check(self._rate, num_clients)
            return max(1, round(math.fsum(self._rate)))
        return max(1, round(num_clients * self._rate))

    @staticmethod
    def _check(rates: tuple[float, ...], num_clients: int) -> None:
        if len(rates) != num_clients:
            raise ScenarioError(
                f"[participation] rate has {len(rates)} values for {num_clients} clients: "
                "give one number, or one per client"
            )


PARTICIPATION: dict[str, Callable[..., Participation]] = {
    "full": Full,
    "uniform": Uniform,
    "bernoulli": Bernoulli,
}
