"""What happens to selected clients inside a round: drop-out, partial work, speed, deadlines.

Time is simulated: a client of median speed takes one unit for its whole local work, however much
that is, and no clock is read. Everything follows from (seed, round, client); the order of arrival
depends on the selected clients too.
"""

import math
from typing import Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedsim.basics.rng import generator
from fedsim.basics.ties import ROUNDING, exceeds, ranks

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_FASTEST = 8.0  # standard deviations beyond which no client is ever seen


class Devices(BaseModel):
    """`[devices]`: what happens to selected clients in a round.

    A client that drops out or is late does not answer: it counts as absent, not as failed. A client
    that does a part of its work is still weighed by all the samples that it holds.

    Attributes:
        drop_out: Probability that a selected client drops out in mid-round.
        partial: Probability that a client does only a part of its local work.
        min_work: The smallest such share; shares are uniform in [min_work, 1].
        speed_sigma: Spread of the clients' fixed speeds, log-normal around the median's 1.
        jitter_sigma: Spread of a client's speed from round to round, log-normal.
        deadline: When the round ends, in units of the median client's time for its whole work.
        late: Whether a client that is not done by then is discarded or does the share that fits.
        over_select: So many times the cohort's size are selected, and the first to finish kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    drop_out: float = Field(default=0.0, ge=0, lt=1)
    partial: float = Field(default=0.0, ge=0, le=1)
    min_work: float = Field(default=0.1, gt=0, le=1)
    speed_sigma: float = Field(default=0.0, ge=0, le=10)
    jitter_sigma: float = Field(default=0.0, ge=0, le=10)
    deadline: float | None = Field(default=None, gt=0)
    late: Literal["drop", "partial"] = "drop"
    over_select: float = Field(default=1.0, ge=1, le=100)

    @model_validator(mode="after")
    def _speeds_matter(self) -> Self:
        if self.deadline is None and self.over_select == 1:
            for name in ("speed_sigma", "jitter_sigma"):
                if sigma := getattr(self, name):
                    raise ValueError(
                        f"{name} = {sigma:g} changes nothing without a 'deadline' or an "
                        "'over_select' above 1: give one of them"
                    )
        return self

    @model_validator(mode="after")
    def _shares_matter(self) -> Self:
        if self.min_work != 0.1 and not self.partial:
            raise ValueError(
                f"min_work = {self.min_work:g} changes nothing with partial = 0: say how often "
                "clients do a part of their work, or leave it out"
            )
        if self.late == "partial" and self.deadline is None:
            raise ValueError("late = 'partial' changes nothing without a 'deadline': give one")
        return self

    @model_validator(mode="after")
    def _somebody_is_done(self) -> Self:
        if self.deadline is None or self.late == "partial":
            return self
        spread = math.hypot(self.speed_sigma, self.jitter_sigma)
        soonest = (self.min_work if self.partial else 1.0) * math.exp(-_FASTEST * spread)
        if self.deadline < soonest:
            raise ValueError(
                f"deadline = {self.deadline:g}: no client is ever done by then; the soonest takes "
                f"{soonest:.3g} (the median client takes 1 for its whole work); give at least that"
            )
        return self


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
