"""From a scenario's `[clock]` to its timetable, and to how often clients are part of a round."""

import functools
import math

import numpy as np

from fedsim.data.federated import FederatedData
from fedsim.federation.clock.candidates import candidates
from fedsim.federation.clock.job_times import JobTimes
from fedsim.federation.clock.rates import Floats, closed_form, followed
from fedsim.federation.clock.timetable import Timetable
from fedsim.federation.devices import DeviceModel
from fedsim.federation.participation.kinds import Participation
from fedsim.scenario.scenario import Scenario


class ClockWork:
    """What a scenario's clock is made of.

    Args:
        scenario: It has a `[clock]`.
        data: The clients' data.
        participation: Who can begin a job in a round.
        devices: The clients' devices, or None.
    """

    def __init__(
        self,
        scenario: Scenario,
        data: FederatedData,
        participation: Participation,
        devices: DeviceModel | None,
    ) -> None:
        assert scenario.clock is not None
        self._scenario, self._clock, self._data = scenario, scenario.clock, data
        self._participation = participation
        work = scenario.choices["client"].make().work

        @functools.lru_cache(maxsize=2**16)
        def steps(client: int) -> int:
            taken: int = work.num_steps(int(data.sizes([client])[0]))
            return max(1, taken)

        self.times = JobTimes(
            self._clock.job,
            tick_s=self._clock.tick_s,
            seed=scenario.seed,
            num_clients=data.num_clients,
            devices=devices,
            steps=steps,
            by_round=self._clock.trigger == "all",
        )

    def timetable(self) -> Timetable:
        """Return a timetable at time zero."""
        clock = self._clock
        return Timetable(
            clock.trigger,
            self.times.of,
            concurrency=self._concurrency,
            count=clock.count or 1,
            window=self._window,
            at_once=clock.restart == "at_once",
        )

    def rates(self) -> Floats | None:
        """Return the share of aggregations that each client is part of, float64 `[N]`.

        Where it has no closed form the run's own timetable is followed, for 10,000 aggregations at
        most; a client that is part of none then counts as part of half of one. None under "all",
        where participation says it.
        """
        clock, clients = self._clock, self._data.num_clients
        if clock.trigger == "all":
            return None
        always = (
            not self.times.is_random
            and clock.restart == "on_aggregation"
            and self._concurrency >= clients
            and self._participation.expected_cohort(clients) == clients
        )
        if always:
            ticks = [fate.ticks for fate in self.times.of(1, range(clients))]
            found = closed_form(clock.trigger, np.array(ticks, dtype=np.int64), self._window)
            if found is not None:
                return found
        timetable, rounds = self.timetable(), self._scenario.rounds

        def order(server_round: int) -> list[int]:
            return candidates(
                timetable, self._participation, server_round, num_clients=clients,
                seed=self._scenario.seed,
            )  # fmt: skip

        counted = followed(timetable, order, clients, rounds)
        least: Floats = np.maximum(counted, 0.5 / rounds)
        return least

    @property
    def at_once(self) -> int:
        """Clients that are expected to be trained together, for the plan.

        All jobs under way that are not trained yet are, when one of them is wanted: of C jobs about
        the square root of C to twice that, and those of two aggregations. A plan cuts what is
        expected in two; here all is to be one chunk, for what is not filled is computed too.
        """
        clock, most = self._clock, self._concurrency
        if clock.trigger == "all":
            return most
        return 2 * min(most, max(2 * (clock.count or 1), math.isqrt(4 * most)))

    @property
    def _concurrency(self) -> int:
        known = self._clock.concurrency
        return known or self._participation.expected_cohort(self._data.num_clients)

    @property
    def _window(self) -> int:
        return 1 if self._clock.window_s is None else self.times.ticks(self._clock.window_s)
