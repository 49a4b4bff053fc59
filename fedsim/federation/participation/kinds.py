"""Who takes part in a round, as a function of (seed, round) alone: the rules.

Rates that change over the rounds are in `seasons`, recorded participation in `trace`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError
from fedsim.federation.participation.participation import (
    Participation,
    RatedParticipation,
    independent_subset,
    round_generator,
    uniform_subset,
)
from fedsim.federation.participation.rates import ClientRates, Floats
from fedsim.federation.participation.seasons import Sine, Staircase
from fedsim.federation.participation.trace import Trace

__all__ = [
    "PARTICIPATION",
    "Bernoulli",
    "Cyclic",
    "Full",
    "Markov",
    "Participation",
    "RatedParticipation",
    "Sine",
    "Staircase",
    "Trace",
    "Uniform",
]


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

    def rates(self, num_clients: int) -> Floats:
        """Return 1 for everybody."""
        return np.ones(num_clients)


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
        return uniform_subset(round_generator(seed, server_round), num_clients, self._cohort_size)

    def expected_cohort(self, num_clients: int) -> int:
        """Return the cohort's size."""
        self._check(num_clients)
        return self._cohort_size

    def rates(self, num_clients: int) -> Floats:
        """Return the cohort's share of the clients."""
        self._check(num_clients)
        return np.full(num_clients, self._cohort_size / num_clients)

    def over_selected(self, factor: float) -> "Uniform":
        """Return the rule of a cohort that is larger by a factor, rounded up."""
        return Uniform(cohort_size=math.ceil(factor * self._cohort_size - 1e-9))

    def _check(self, num_clients: int) -> None:
        if self._cohort_size > num_clients:
            raise ScenarioError(
                f"[participation] cohort_size = {self._cohort_size}: more than all clients, use at "
                f"most {num_clients}"
            )


@final
class Bernoulli(RatedParticipation):
    """Each client on its own with a given probability; a round may stay empty.

    Args:
        rate: Probability of taking part in a round, in (0, 1]; or one per client, each in [0, 1].
        label_alpha: Lets the rates follow the clients' labels: alpha_p of the Dirichlet law that
            says which classes take part often, > 0; the smaller, the stronger. `rate` is their
            mean. None gives every client `rate`.
        min_rate: The smallest rate with `label_alpha`, in (0, rate].

    Raises:
        ScenarioError: If an argument is outside its range.
    """

    def __init__(
        self,
        *,
        rate: float | Sequence[float] = 0.1,
        label_alpha: float | None = None,
        min_rate: float = 0.02,
    ) -> None:
        super().__init__(ClientRates(rate, label_alpha, min_rate))

    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return who takes part; with one common rate the cost grows with the cohort alone."""
        common = self._rates.common
        return independent_subset(
            round_generator(seed, server_round),
            num_clients,
            self._rates.of(num_clients) if common is None else float(common),
        )


class _Chain(NamedTuple):
    """The state of a Markov chain per client after so many transitions."""

    seed: int
    server_round: int
    active: npt.NDArray[np.bool_]


@final
class Markov(RatedParticipation):
    """Each client as a Markov chain of two states, so that participation comes in spells.

    An absent client becomes active with probability a, an active one absent with probability
    a (1/p - 1), where p is its rate. Where that exceeds 1 it is 1, and the absent become active
    with probability p / (1 - p). Spells last 1 / (a (1/p - 1)) rounds on average. The chains begin
    in their stationary law and make one transition before each round, the first included.

    Args:
        rate: Share of rounds in which a client takes part, in (0, 1]; or one per client, each in
            [0, 1].
        label_alpha: Lets the rates follow the clients' labels: alpha_p of the Dirichlet law that
            says which classes take part often, > 0; the smaller, the stronger. `rate` is their
            mean. None gives every client `rate`.
        min_rate: The smallest rate with `label_alpha`, in (0, rate].
        activation: a, the largest probability of becoming active, in (0, 1].

    Raises:
        ScenarioError: If an argument is outside its range.
    """

    def __init__(
        self,
        *,
        rate: float | Sequence[float] = 0.1,
        label_alpha: float | None = None,
        min_rate: float = 0.02,
        activation: float = 0.05,
    ) -> None:
        super().__init__(ClientRates(rate, label_alpha, min_rate))
        if not 0 < activation <= 1:
            raise ScenarioError(f"[participation] activation = {activation}: must be in (0, 1]")
        self._activation = activation
        self._chain: _Chain | None = None  # the last one asked for; another is computed anew

    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return who is active; steps forward from the round asked for last, or from the start."""
        rates, chain = self._rates.of(num_clients), self._chain
        if (
            chain is None
            or (chain.seed, len(chain.active)) != (seed, num_clients)
            or chain.server_round > server_round
        ):
            chain = _Chain(seed, 0, round_generator(seed, 0).random(num_clients) < rates)
        up, down = self._transitions(rates)
        active = chain.active
        for next_round in range(chain.server_round + 1, server_round + 1):
            draw = round_generator(seed, next_round).random(num_clients)
            active = np.where(active, draw >= down, draw < up)
        self._chain = _Chain(seed, server_round, active)
        return np.flatnonzero(active).astype(np.int64)

    def state(self) -> dict[str, Any]:
        """Return the chains' round, seed and number, and who is active."""
        if self._chain is None:
            return {}
        seed, server_round, active = self._chain
        ids = np.flatnonzero(active).tolist()
        return {"round": server_round, "seed": seed, "clients": len(active), "active": ids}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned.

        Raises:
            ValueError: If it is another rule's.
        """
        if state and set(state) != {"round", "seed", "clients", "active"}:
            raise ValueError(
                f"participation 'markov': the checkpoint has {sorted(state)}, expected active, "
                "clients, round, seed"
            )
        self._chain = None
        if state:
            active = np.isin(np.arange(state["clients"]), state["active"])
            self._chain = _Chain(state["seed"], state["round"], active)

    def _transitions(self, rates: Floats) -> tuple[Floats, Floats]:
        """The probabilities of becoming active and absent."""
        with np.errstate(divide="ignore"):  # rates of 0 and 1
            up = np.minimum(self._activation, rates / (1 - rates))
            down = np.minimum(1.0, self._activation * (1 / rates - 1))
        return up, down


@final
class Cyclic(RatedParticipation):
    """Each client in turns of fixed length: off, on, and so on.

    A client of rate p is on for max(1, round(c p)) rounds and off for the rest of the cycle of c,
    at least one round; so its true rate is a multiple of 1 / c, or c / (c + 1) when it is on for c.
    It begins at a random place in an off phase.

    Args:
        rate: Share of rounds in which a client takes part, in (0, 1]; or one per client.
        label_alpha: Lets the rates follow the clients' labels: alpha_p of the Dirichlet law that
            says which classes take part often, > 0; the smaller, the stronger. `rate` is their
            mean. None gives every client `rate`.
        min_rate: The smallest rate with `label_alpha`, in (0, rate].
        cycle: c, the rounds of a cycle, at least 2.

    Raises:
        ScenarioError: If an argument is outside its range.
    """

    def __init__(
        self,
        *,
        rate: float | Sequence[float] = 0.1,
        label_alpha: float | None = None,
        min_rate: float = 0.02,
        cycle: int = 100,
    ) -> None:
        super().__init__(ClientRates(rate, label_alpha, min_rate))
        if isinstance(rate, Sequence) and 0 in rate:
            raise ScenarioError(
                f"[participation] rate = 0 for client {rate.index(0)}: must be in (0, 1], for a "
                "cycle has a round in which the client is on"
            )
        if cycle < 2:
            raise ScenarioError(f"[participation] cycle = {cycle}: must be >= 2")
        self._cycle = cycle

    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return who is on."""
        on, off = self._phases(num_clients)
        start = round_generator(seed, 0).integers(0, off)  # rounds before a client is on at first
        return np.flatnonzero((server_round - 1 - start) % (on + off) < on).astype(np.int64)

    def rates(self, num_clients: int) -> Floats:
        """Return the share of rounds in which each client is on, float64 `[N]`."""
        on, off = self._phases(num_clients)
        return on / (on + off)

    def note(self, num_clients: int) -> str | None:
        """Say what becomes of rates that are no whole number of rounds in a cycle."""
        asked, found = self._rates.of(num_clients), self.rates(num_clients)
        if np.allclose(asked, found, rtol=0, atol=1e-9):
            return None
        return (
            f"[participation] cycle = {self._cycle}: clients are on for whole rounds of a cycle, "
            f"in {found.mean():.4g} of the rounds on average, where the rates are "
            f"{asked.mean():.4g}"
        )

    def _phases(self, num_clients: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The rounds for which each client is on and off."""
        rates = self._rates.of(num_clients)
        on = np.maximum(1, np.rint(self._cycle * rates).astype(np.int64))
        return on, np.maximum(1, self._cycle - on)


PARTICIPATION: dict[str, Callable[..., Participation]] = {
    "full": Full,
    "uniform": Uniform,
    "bernoulli": Bernoulli,
    "markov": Markov,
    "cyclic": Cyclic,
    "sine": Sine,
    "staircase": Staircase,
    "trace": Trace,
}
