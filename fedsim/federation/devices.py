"""What happens to selected clients inside a round: drop-out, partial work, speed, deadlines.

Time is simulated: a client of median speed takes one unit for its whole local work, however much
that is, whatever clocks say. Everything follows from (seed, round, client); which clients come
first also from who was selected.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.basics.rng import generator
from fedsim.basics.ties import ROUNDING, exceeds, ranks
from fedsim.federation.grids.wrapper import GridWrapper, Observed, sent_again, sent_round, without
from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import Cohort, settings_of
from fedsim.messages.failures import Failure
from fedsim.messages.layout import Layout
from fedsim.messages.records import CONFIG, WORK
from fedsim.messages.replies import Replies
from fedsim.scenario.tables import Devices

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


class DeviceGrid(GridWrapper):
    """Tells clients how much of their local work they do, and says who was late.

    Stands outside the Grid that counts bytes, for what it tells is sent.

    Args:
        inner: The Grid around which this one stands; it returns admitted `Replies`.
        model: The devices.
    """

    def __init__(self, inner: Grid, model: DeviceModel) -> None:
        super().__init__(inner)
        self.model = model
        self._observed = self._nothing()

    def begin_round(self, server_round: int) -> None:
        """Forget what was observed in the round before."""
        self._observed = self._nothing()
        super().begin_round(server_round)

    def observed(self) -> Observed:
        """Return how many were late and did a part, and who."""
        return self._observed.joined(super().observed())

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions with each client's share of work."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        server_round = sent_round(batch)
        if server_round is None:
            return self.inner.send_and_receive(batch, timeout=timeout)
        ids = _clients(batch)
        fates = self.model.fates(server_round, ids)
        self._observed = _observation(ids, fates)
        if (fates.work < 1).any():
            if isinstance(batch, Cohort):
                batch = batch.altered(work=fates.work)
            else:
                batch = [_told(m, float(w)) for m, w in zip(batch, fates.work, strict=True)]
        replies = self.inner.send_and_receive(batch, timeout=timeout)
        if not isinstance(replies, Replies) or not fates.late.any():
            return replies
        late = dict(zip(ids[fates.late].tolist(), fates.time[fates.late].tolist(), strict=True))
        failures = tuple(
            self._late(failure, late[failure.client_id])
            if failure.cause == "absent" and failure.client_id in late
            else failure
            for failure in replies.failures
        )
        return replace(replies, failures=failures)

    def _late(self, failure: Failure, time: float) -> Failure:
        deadline = self.model.devices.deadline
        if deadline is not None and time > deadline:
            why = f"was late: takes {time:.3g} units of time, [devices] deadline = {deadline:g}"
        else:
            why = f"was late: {self.model.keep} others came before it"
        return failure._replace(reason=why)

    def _nothing(self) -> Observed:
        return _observation(np.zeros(0, dtype=np.int64), None)


class AbsenceGrid(GridWrapper):
    """Lets clients drop out as their devices say, after the instruction has been sent.

    Stands inside the Grid that counts bytes, close to the clients.

    Args:
        inner: The Grid around which this one stands.
        model: The devices.
        layout: The model's layout, when `inner` is an engine that trains in chunks.
    """

    def __init__(self, inner: Grid, model: DeviceModel, layout: Layout | None) -> None:
        super().__init__(inner)
        self.model, self.layout = model, layout

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions to those who do not drop out."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        server_round = sent_round(batch)
        if server_round is not None:
            ids = _clients(batch)
            gone = ids[self.model.fates(server_round, ids).gone]
            batch = without(batch, gone, self.layout)
        return self.inner.send_and_receive(batch, timeout=timeout)


def _clients(batch: Sequence[Message]) -> npt.NDArray[np.int64]:
    if isinstance(batch, Cohort):
        return batch.client_ids
    nodes = [internals.client_of(m.metadata.dst_node_id) for m in batch]
    return np.array(nodes, dtype=np.int64)


def _told(message: Message, work: float) -> Message:
    """The message with the share of work in its settings; those of others stay as they are."""
    if work >= 1:
        return message
    records = message.content.config_records
    name = next(iter(records), CONFIG)
    content = RecordDict(dict(message.content))
    content[name] = ConfigRecord({**settings_of(message.content), WORK: work})
    return sent_again(message, content)


def _observation(ids: npt.NDArray[np.int64], fates: Fates | None) -> Observed:
    """What metrics and the record of participation say of a round's devices."""
    late: list[int] = []
    work: dict[str, float] = {}
    if fates is not None:
        late = sorted(ids[fates.late].tolist())
        part = ~fates.gone & (fates.work < 1)
        shares = sorted(zip(ids[part].tolist(), fates.work[part].tolist(), strict=True))
        work = {str(client): share for client, share in shares}
    metrics = {"clients/late": len(late), "clients/partial": len(work)}
    return Observed(metrics, {"late": late, "work": work})
