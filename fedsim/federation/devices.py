"""What happens to selected clients inside a round: drop-out, partial work, speed, deadlines.

Time is simulated: a client of median speed takes one unit for its whole local work, however much
that is, and no clock is read. Everything follows from (seed, round, client); the order of arrival
depends on the selected clients too.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics.rng import generator
from fedsim.basics.ties import ROUNDING, exceeds, ranks
from fedsim.federation.device_table import Devices

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Fates(NamedTuple):
    """What becomes of a round's clients, in the order in which they were named.

    Attributes:
        work: float64 `[K]`, the share of its local work that each client does, in (0, 1].
        time: float64 `[K]`, when it has done that, in units of the median client's whole work.
        dropped: bool `[K]`, who drops out.
        late: bool `[K]`, who is discarded because the round ends before it has done its work.
    """

    work: Floats
    time: Floats
    dropped: Flags
    late: Flags

    @property
    def gone(self) -> Flags:
        """Who does not answer, bool `[K]`."""
        return self.dropped | self.late


class DeviceModel:
    """The clients' devices.

    A client's time for its whole work is exp(speed_sigma z) exp(jitter_sigma z'), with z drawn once
    per client and z' once per client and round, both standard normal.

    Args:
        devices: The scenario's table.
        seed: The scenario's seed.
        keep: With over-selection, how many of those who finish are kept; None keeps all.
    """

    def __init__(self, devices: Devices, *, seed: int, keep: int | None = None) -> None:
        self.devices, self.seed, self.keep = devices, seed, keep
        self._last: tuple[int, bytes, Fates] | None = None

    def fates(self, server_round: int, client_ids: npt.NDArray[np.int64]) -> Fates:
        """Return what becomes of the clients of a round.

        Args:
            server_round: From 1.
            client_ids: `[K]`, all who were selected.
        """
        key = client_ids.tobytes()
        if self._last is None or self._last[:2] != (server_round, key):
            self._last = (server_round, key, self._drawn(server_round, client_ids))
        return self._last[2]

    def _drawn(self, server_round: int, client_ids: npt.NDArray[np.int64]) -> Fates:
        devices, ids = self.devices, client_ids.tolist()
        whole = np.ones(len(ids))
        if devices.speed_sigma:
            fixed = [generator(self.seed, "device speed", c).standard_normal() for c in ids]
            whole *= np.exp(devices.speed_sigma * np.array(fixed))
        draws = np.empty((len(ids), 4))
        jitter = np.empty(len(ids))
        for place, client in enumerate(ids):
            random = generator(self.seed, "device round", server_round, client)
            random.random(out=draws[place])
            jitter[place] = random.standard_normal()
        drops, partly, share, tie = draws.T
        whole *= np.exp(devices.jitter_sigma * jitter)
        least = devices.min_work
        work = np.where(partly < devices.partial, least + (1 - least) * share, 1.0)
        time, dropped = work * whole, drops < devices.drop_out
        late = np.zeros(len(ids), dtype=bool)
        if devices.deadline is not None:
            slow = exceeds(time, devices.deadline)
            if devices.late == "partial":
                work = np.where(slow, devices.deadline / whole, work)
                time = np.minimum(time, devices.deadline)
            else:
                late = slow & ~dropped
        if self.keep is not None:
            finishers = np.flatnonzero(~dropped & ~late)
            first = ranks([(time[finishers], ROUNDING * time[finishers])])
            order = finishers[np.lexsort((tie[finishers], first))]
            late[order[self.keep :]] = True
        return Fates(work, time, dropped, late)
