"""How long jobs take, in ticks of virtual time: a function of (seed, round, client) alone."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedsim.basics.rng import generator
from fedsim.federation.clock_table import JobTime
from fedsim.federation.devices import DeviceModel

Steps = Callable[[int], int]


class Fate(NamedTuple):
    """What becomes of a job.

    Attributes:
        ticks: How long it takes, at least 1.
        work: The share of its local work that the client does, in (0, 1].
        drops: Whether the client drops out: the job then ends without a reply.
    """

    ticks: int
    work: float
    drops: bool


class JobTimes:
    """The times of all jobs of a federation.

    A job takes the sum of download, local work and upload. Local work takes what the law of
    `[clock.job]` says, times what the client's device makes of it.

    Args:
        table: `[clock.job]`.
        tick_s: Seconds of a tick.
        seed: The scenario's seed.
        num_clients: N, the clients registered.
        devices: The clients' devices, or None.
        steps: A client's local steps; needed with `step_s`.
        by_round: Whether a round waits for all who were asked. Who does what share of its work, or
            none, is then told by the round's devices (`DeviceGrid`), and jobs say their times
            alone: a client that is late takes until the deadline, or nothing where others came
            before it.

    Raises:
        ValueError: If the table does not fit so many clients.
    """

    def __init__(
        self,
        table: JobTime,
        *,
        tick_s: float,
        seed: int,
        num_clients: int,
        devices: DeviceModel | None = None,
        steps: Steps | None = None,
        by_round: bool = False,
    ) -> None:
        if table.seconds is not None and len(table.seconds) != num_clients:
            raise ValueError(
                f"seconds has {len(table.seconds)} numbers, and there are {num_clients} clients: "
                "give one per client"
            )
        self._table, self._tick_s, self._seed = table, tick_s, seed
        self._num_clients, self._devices, self._steps = num_clients, devices, steps
        self._by_round = by_round

    @property
    def is_random(self) -> bool:
        """Whether two jobs of one client may take different times, or not end at all."""
        table, devices = self._table, None if self._devices is None else self._devices.devices
        if devices is not None and (devices.jitter_sigma or devices.partial or devices.drop_out):
            return True
        return table.law == "exponential" or bool(table.jitter)

    def of(self, server_round: int, clients: Sequence[int]) -> list[Fate]:
        """Return what becomes of the jobs that clients begin in a round.

        Args:
            server_round: The round whose model they begin with, from 1.
            clients: Who begins one.
        """
        table = self._table
        beside = table.download_s + table.upload_s
        pace = self._paces(server_round, clients)
        found = []
        for client, (factor, work, drops) in zip(clients, pace, strict=True):
            seconds = beside + factor * self._seconds(server_round, client)
            found.append(Fate(max(1, round(seconds / self._tick_s)), work, drops))
        return found

    def ticks(self, seconds: float) -> int:
        """Return a time in whole ticks, at least one."""
        return max(1, round(seconds / self._tick_s))

    def _paces(
        self, server_round: int, clients: Sequence[int]
    ) -> Sequence[tuple[float, float, bool]]:
        """What devices make of a job: (factor of its time, share of work done, whether none)."""
        if self._devices is None or not len(clients):
            return [(1.0, 1.0, False)] * len(clients)
        fates = self._devices.fates(server_round, np.asarray(clients, dtype=np.int64))
        if not self._by_round:
            return list(
                zip(fates.time.tolist(), fates.work.tolist(), fates.dropped.tolist(), strict=True)
            )
        deadline = self._devices.devices.deadline
        factors = fates.time if deadline is None else np.minimum(fates.time, deadline)
        if deadline is None:
            factors = np.where(fates.late, 0.0, factors)
        return [(factor, 1.0, False) for factor in factors.tolist()]

    def _seconds(self, server_round: int, client: int) -> float:
        """A client's seconds for all of its local work."""
        table = self._table
        if table.seconds is not None:
            return table.seconds[client]
        if table.step_s is not None:
            assert self._steps is not None
            whole = table.step_s * self._steps(client)
        else:
            whole = 1.0 if table.job_s is None else table.job_s
        if table.spread and self._num_clients > 1:
            return whole * (1 - table.spread * client / (self._num_clients - 1))
        if table.sigma:
            drawn = generator(self._seed, "clock client", client).standard_normal()
            whole *= math.exp(table.sigma * drawn)
        if table.jitter:
            drawn = generator(self._seed, "clock job", server_round, client).standard_normal()
            whole *= math.exp(table.jitter * drawn)
        if table.law == "exponential":
            return whole * generator(self._seed, "clock job", server_round, client).exponential()
        return whole
