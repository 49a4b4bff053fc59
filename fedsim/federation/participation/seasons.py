"""Participation whose rates change over the rounds, as those of phones do over day and night."""

import abc
import math
from collections.abc import Sequence
from typing import Literal, final

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.federation.participation.participation import (
    RatedParticipation,
    independent_subset,
    round_generator,
)
from fedsim.federation.participation.rates import ClientRates, Floats

_LONGEST = 1_000_000  # rounds of a period
Shift = int | Sequence[int] | Literal["random"]


class SeasonalParticipation(RatedParticipation, abc.ABC):
    """Each client on its own, at a rate that is its mean rate times a factor of the season.

    Args:
        rates: The clients' mean rates.
        period: Rounds after which the seasons repeat.
        shift: By how many rounds a client's seasons come later.
    """

    def __init__(self, rates: ClientRates, period: int, shift: Shift) -> None:
        super().__init__(rates)
        if isinstance(shift, str) and shift != "random":
            raise ScenarioError(
                f"[participation] shift = '{shift}': must be rounds, a list with one number of "
                'rounds per client, or "random"'
            )
        self._period, self._shift = period, shift

    @abc.abstractmethod
    def _factors(self, place: npt.NDArray[np.int64]) -> Floats:
        """Return the factors at places of the period, 0...period - 1."""

    def rates_in(self, server_round: int, *, num_clients: int, seed: int) -> Floats:
        """Return each client's probability of taking part in a round, float64 `[N]`."""
        place = (server_round - 1 - self._shifts(num_clients, seed)) % self._period
        return np.clip(self._rates.of(num_clients) * self._factors(place), 0.0, 1.0)

    def participants(
        self, server_round: int, *, num_clients: int, seed: int
    ) -> npt.NDArray[np.int64]:
        """Return who takes part; with one rate and shift the cost grows with the cohort alone."""
        generator = round_generator(seed, server_round)
        common = self._rates.common
        if common is None or not isinstance(self._shift, int):
            chances = self.rates_in(server_round, num_clients=num_clients, seed=seed)
            return independent_subset(generator, num_clients, chances)
        place = np.array((server_round - 1 - self._shift) % self._period)
        chance = min(1.0, max(0.0, common * float(self._factors(place))))
        return independent_subset(generator, num_clients, chance)

    def rates(self, num_clients: int) -> Floats:
        """Return each client's mean rate over a period, float64 `[N]`."""
        return self._mean(self._rates.of(num_clients))

    def note(self, num_clients: int) -> str | None:
        """Say whose rates the bounds of a probability cut, and what becomes of the mean."""
        factors = self._factors(np.arange(self._period))
        rates = self._rates.of(num_clients)
        if factors.min() >= 0 and rates.max() * factors.max() <= 1:
            return None
        asked, found = rates.mean() * factors.mean(), self.rates(num_clients).mean()
        return (
            "[participation] rates are cut at 0 and 1 in some rounds: clients take part in "
            f"{found:.4g} of the rounds on average, not in {asked:.4g}"
        )

    def expected_cohort(self, num_clients: int) -> int:
        """Return the mean number of participants over a period, rounded; at least one.

        Raises:
            ScenarioError: If rates or shifts are listed for another number of clients.
        """
        if not isinstance(self._shift, str):
            self._shifts(num_clients, seed=0)
        stated = np.broadcast_to(self._rates.stated(num_clients), num_clients)
        return max(1, round(math.fsum(self._mean(stated))))

    def _mean(self, rates: Floats) -> Floats:
        factors = self._factors(np.arange(self._period))
        found = np.zeros(len(rates))
        for factor in factors:  # a period may be long and the clients many
            found += np.clip(rates * factor, 0.0, 1.0)
        return found / self._period

    def _shifts(self, num_clients: int, seed: int) -> npt.NDArray[np.int64]:
        if isinstance(self._shift, str):
            random = rng.generator(seed, "participation shifts")
            return random.integers(0, self._period, size=num_clients)
        if isinstance(self._shift, int):
            return np.full(num_clients, self._shift, dtype=np.int64)
        if len(self._shift) != num_clients:
            raise ScenarioError(
                f"[participation] shift has {len(self._shift)} values for {num_clients} clients: "
                'give one number, one per client, or "random"'
            )
        return np.array(self._shift, dtype=np.int64)


@final
class Sine(SeasonalParticipation):
    """Each client on its own, at a rate that rises and falls as a sine over the rounds.

    In round t client i takes part with the probability
    min(1, max(0, p_i (1 + A sin(2 pi (t - 1 - s_i) / P)))); its mean over a period is p_i unless
    the bounds cut it.

    Args:
        rate: p, the mean share of rounds in which a client takes part, in (0, 1]; or one per
            client, each in [0, 1].
        label_alpha: Lets the mean rates follow the clients' labels: alpha_p of the Dirichlet law
            that says which classes take part often, > 0; the smaller, the stronger. `rate` is
            their mean. None gives every client `rate`.
        min_rate: The smallest mean rate with `label_alpha`, in (0, rate].
        amplitude: A, the swing as a share of the mean rate, >= 0; above 1 a client is away for
            a part of every period.
        period: P, rounds of a full swing, from 2 to a million.
        shift: s, rounds by which the swing comes later: one number for all, one per client, or
            "random", a number in 0...period - 1 for each client.

    Raises:
        ScenarioError: If an argument is outside its range.

    Source: the form p_i f(t) is that of Xiang et al., NeurIPS 2024 (arXiv:2409.17446).
    Deviations: the constants are free, and clients may have their seasons at different times.
    """

    def __init__(
        self,
        *,
        rate: float | Sequence[float] = 0.1,
        label_alpha: float | None = None,
        min_rate: float = 0.02,
        amplitude: float = 0.5,
        period: int = 20,
        shift: int | Sequence[int] | Literal["random"] = 0,
    ) -> None:
        if not 0 <= amplitude < math.inf:
            raise ScenarioError(f"[participation] amplitude = {amplitude}: must be >= 0")
        if not 2 <= period <= _LONGEST:
            raise ScenarioError(
                f"[participation] period = {period}: must be in 2..{_LONGEST} rounds"
            )
        super().__init__(ClientRates(rate, label_alpha, min_rate), period, shift)
        self._amplitude = amplitude

    def _factors(self, place: npt.NDArray[np.int64]) -> Floats:
        swing: Floats = 1 + self._amplitude * np.sin(2 * np.pi * place / self._period)
        return swing


@final
class Staircase(SeasonalParticipation):
    """Each client on its own, at a rate that steps from level to level and begins again.

    In round t client i takes part with the probability min(1, p_i L_k), where the levels
    L_0, L_1, ... take turns of fixed length.

    Args:
        rate: p, what the levels are multiples of, in (0, 1]; or one per client, each in [0, 1].
        label_alpha: Lets p follow the clients' labels: alpha_p of the Dirichlet law that says
            which classes take part often, > 0; the smaller, the stronger. `rate` is the mean of p.
            None gives every client `rate`.
        min_rate: The smallest p with `label_alpha`, in (0, rate].
        levels: L, the levels as multiples of p, each >= 0 and one of them > 0.
        length: Rounds for which each level lasts, at least 1; a million for all levels together
            at most.
        shift: Rounds by which the steps come later: one number for all, one per client, or
            "random", a number within the period for each client.

    Raises:
        ScenarioError: If an argument is outside its range.

    Source: the form p_i f(t) is that of Xiang et al., NeurIPS 2024 (arXiv:2409.17446).
    Deviations: the levels are free, and clients may have their seasons at different times.
    """

    def __init__(
        self,
        *,
        rate: float | Sequence[float] = 0.1,
        label_alpha: float | None = None,
        min_rate: float = 0.02,
        levels: Sequence[float] = (1.0, 0.4),
        length: int = 10,
        shift: int | Sequence[int] | Literal["random"] = 0,
    ) -> None:
        for place, level in enumerate(levels):
            if not 0 <= level < math.inf:
                raise ScenarioError(f"[participation] levels[{place}] = {level}: must be >= 0")
        if not any(levels):
            raise ScenarioError("[participation] levels: at least one must be > 0")
        longest = _LONGEST // len(levels)
        if not 1 <= length <= longest:
            raise ScenarioError(
                f"[participation] length = {length}: must be in 1..{longest}, so that the "
                f"{len(levels)} levels take {_LONGEST} rounds at most"
            )
        super().__init__(ClientRates(rate, label_alpha, min_rate), len(levels) * length, shift)
        self._levels, self._length = np.array(levels, dtype=np.float64), length

    def _factors(self, place: npt.NDArray[np.int64]) -> Floats:
        return self._levels[place // self._length]
