"""What a participation rule is, and what rules share: draws, subsets, rates.

What is drawn is participation itself: availability, invitation and answer in one. A rule that needs
memory (a Markov chain) keeps it in `state`, which a checkpoint holds.
"""

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.federation.participation.rates import ClientRates, Floats


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
        """Return how many clients the scenario expects per round, rounded; at least one."""

    @property
    def needs_labels(self) -> bool:
        """Whether `learn_labels` must be called before the first round."""
        return False

    def learn_labels(  # noqa: B027 - most rules do not ask
        self, counts: npt.NDArray[np.int64], *, seed: int
    ) -> None:
        """Take up how many samples of each class the clients hold, if participation follows them.

        Args:
            counts: `[clients, classes]`.
            seed: The scenario's seed.
        """

    def rates(self, num_clients: int) -> Floats | None:
        """Return the share of rounds in which each client takes part, float64 `[N]`, if known."""
        return None

    def note(self, num_clients: int) -> str | None:
        """Return a sentence on how participation differs from the scenario's numbers, or None."""
        return None

    def over_selected(self, factor: float) -> "Participation":
        """Return the rule that selects so many times as many clients.

        Args:
            factor: >= 1.

        Raises:
            ScenarioError: If the rule has no cohort size that could be exceeded.
        """
        raise ScenarioError(
            f"[devices] over_select = {factor:g} with [participation] kind = "
            f'"{type(self).__name__.lower()}": the rule has no cohort size to select more than; '
            'use kind = "uniform", or leave over_select out'
        )

    def manifest(self) -> dict[str, Any]:
        """Return what a manifest must hold of the files that the rule reads, with their hash."""
        return {}

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


def round_generator(seed: int, server_round: int) -> np.random.Generator:
    """Return the generator of who takes part in a round."""
    return rng.generator(seed, "participation", server_round)


def uniform_subset(
    generator: np.random.Generator, num_clients: int, size: int
) -> npt.NDArray[np.int64]:
    """Return so many of the clients, each subset as likely as any other, ascending."""
    # without shuffling numpy draws a small subset by Floyd's method: work and memory grow with the
    # subset, not with the clients registered
    chosen = generator.choice(num_clients, size=size, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64, copy=False)


def independent_subset(
    generator: np.random.Generator, num_clients: int, rate: float | Floats
) -> npt.NDArray[np.int64]:
    """Return the clients for whom an independent coin of their rate shows heads, ascending.

    With one rate for all the cost grows with the subset, not with the clients.
    """
    if not isinstance(rate, float):
        return np.flatnonzero(generator.random(num_clients) < rate).astype(np.int64)
    # independent coins of equal rate are a binomial count and then a uniform subset
    return uniform_subset(generator, num_clients, int(generator.binomial(num_clients, rate)))


class RatedParticipation(Participation, abc.ABC):
    """A rule in which every client has a rate: the share of rounds in which it takes part.

    Args:
        rates: The rates.
    """

    def __init__(self, rates: ClientRates) -> None:
        self._rates = rates

    @property
    def needs_labels(self) -> bool:
        """Whether the rates follow the labels."""
        return self._rates.needs_labels

    def learn_labels(self, counts: npt.NDArray[np.int64], *, seed: int) -> None:
        """Fix the clients' rates, see `label_rates`."""
        self._rates.learn(counts, seed=seed)

    def rates(self, num_clients: int) -> Floats:
        """Return the clients' rates, float64 `[N]`."""
        return self._rates.of(num_clients)

    def expected_cohort(self, num_clients: int) -> int:
        """Return the sum of the scenario's rates, rounded; at least one."""
        return self._rates.expected_cohort(num_clients)
