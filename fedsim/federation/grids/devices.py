"""What devices do to a round: each client does its share, and some are late."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from fedsim.federation.devices import DeviceModel, Fates
from fedsim.federation.grids.wrapper import (
    GridWrapper,
    Observed,
    training_round,
)
from fedsim.messages.cohort import Cohort
from fedsim.messages.failures import Failure
from fedsim.messages.replies import Replies


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

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Return the replies to instructions with each client's share of work."""
        server_round, ids = training_round(cohort), cohort.client_ids
        if server_round is None:
            return self.passed_on(cohort, timeout)
        fates = self.model.fates(server_round, ids)
        self._observed = _observation(ids, fates)
        if (fates.work < 1).any():
            cohort = cohort.altered(work=fates.work)
        replies = self.passed_on(cohort, timeout)
        if not fates.late.any():
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
