"""Virtual time around a round: who begins now, whose replies are there, and how old these are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.federation.clock.candidates import candidates
from fedsim.federation.clock.instructions import Instructions
from fedsim.federation.clock.timetable import Job, Period, Timetable
from fedsim.federation.grids.wrapper import GridWrapper, Observed, training_round
from fedsim.federation.participation.kinds import Participation
from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.replies import Replies


class ClockGrid(GridWrapper):
    """Lets a round be one aggregation on a virtual clock.

    A strategy is offered the clients that begin a job in the round, and gets the replies that are
    delivered at its end: those of jobs that may have begun rounds ago, each trained from the model
    that it was given then. Training is done when a reply is due.

    Args:
        inner: The Grid with all clients.
        timetable: The jobs under way.
        participation: Who can begin a job in a round.
        seed: The scenario's seed.
        tick_s: Seconds of a tick.
        stop_s: No aggregation is later than this; None for no end.
        moved: Whether a late reply is handed on as if the client had made its update on the model
            of now, for strategies that look at models and not at updates.
    """

    def __init__(
        self,
        inner: Grid,
        timetable: Timetable,
        participation: Participation,
        *,
        seed: int,
        tick_s: float,
        stop_s: float | None = None,
        moved: bool = False,
    ) -> None:
        super().__init__(inner)
        self.timetable, self.participation, self.seed = timetable, participation, seed
        self._tick_s, self._moved = tick_s, moved
        self._last = None if stop_s is None else round(stop_s / tick_s)
        self._sent = Instructions()
        self._order: list[int] = []
        self._planned: Period | None = None
        self._round = 1
        self._observed = Observed({}, {})
        self._at_work: tuple[int, tuple[Job, ...]] = (0, ())
        self.due: tuple[int, ...] = ()

    @property
    def layout(self) -> Layout:
        """The model's layout."""
        known = super().layout
        assert known is not None
        return known

    def begin_round(self, server_round: int) -> None:
        """Set the round, and plan it."""
        self._plan(server_round)
        self._observed = Observed({}, {})
        super().begin_round(server_round)

    def is_over(self, server_round: int) -> bool:
        """Whether a round would end after the run's last moment."""
        return self._last is not None and self._plan(server_round).ends > self._last

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the clients that begin a job in the round.

        A foreign strategy is never offered nobody while somebody works: it would not hear of the
        round's model. What it then sends to clients at work is dropped.
        """
        begin = [job.client for job in self._plan(self._round).started]
        if not begin and self._moved:
            begin = list(self.timetable.busy)
        return [internals.node_of(client) for client in sorted(begin)]

    def observed(self) -> Observed:
        """Return the time, who began, and how old the replies are."""
        return self._observed.joined(super().observed())

    def answered(self, cohort: Cohort, timeout: float | None) -> Replies:
        """Take a round's instructions and return the replies that are due; all else passes."""
        if training_round(cohort) is None:
            return self.passed_on(cohort, timeout)
        return self._delivered(cohort, timeout)

    def passed_by(self, batch: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        """Return the replies that are due where a foreign strategy had nobody to send to."""
        if not len(batch) and self._planned is not None:
            return self._delivered(None, timeout)
        return super().passed_by(batch, timeout)

    def under_way(self, without: frozenset[tuple[int, int]]) -> Cohort:
        """Return the instructions of the jobs that are due and of all that are under way.

        Args:
            without: Jobs that are left out, by client and round.
        """
        server_round, jobs = self._at_work
        wanted = [j for j in jobs if not j.drops and (j.client, j.server_round) not in without]
        return self._sent.due(server_round, wanted, is_ahead=True)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return (plain values, tensors) for a checkpoint."""
        sent, tensors = self._sent.state()
        jobs = [list(job) for job in sorted(self.timetable.jobs)]
        return {"now": self.timetable.now, "jobs": jobs, "sent": sent}, tensors

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned; nothing is a run's beginning."""
        self._planned = None
        self.timetable.restore(plain.get("now", 0), (Job(*job) for job in plain.get("jobs", ())))
        self._sent.restore(plain.get("sent", {}), tensors, self.layout)

    def _plan(self, server_round: int) -> Period:
        """Plan a round, once."""
        if self._planned is None or self._round != server_round:
            self._round = server_round
            self._order = candidates(
                self.timetable, self.participation, server_round,
                num_clients=self.num_clients, seed=self.seed,
            )  # fmt: skip
            self._planned = self.timetable.plan(server_round, self._order)
        return self._planned

    def _delivered(self, cohort: Cohort | None, timeout: float | None) -> Replies:
        server_round = self._round
        period = self._plan(server_round)
        asked = set() if cohort is None else set(cohort.client_ids.tolist())
        if any(job.client not in asked for job in period.started):  # a strategy left some out
            willing = [client for client in self._order if client in asked]
            period = self.timetable.plan(server_round, willing)
        self._planned, self._round = None, server_round + 1
        if cohort is not None and len(cohort):
            self._sent.keep(cohort, sorted(job.client for job in period.started))
        self.timetable.go_to(period)
        self.due = tuple(sorted(job.client for job in period.due))
        self._at_work = (server_round, (*period.due, *period.outstanding))
        if period.due:
            # where somebody is late, or will be, what is trained beside whom must not matter
            is_ahead = any(job.server_round != server_round for job in self._at_work[1])
            is_ahead = is_ahead or bool(period.outstanding)
            due = self._sent.due(server_round, period.due, is_ahead=is_ahead)
            replies = self.passed_on(due, timeout)
        else:
            replies = Replies.empty(self._nobody(server_round))
        self._sent.forget(period.outstanding)
        self._observed = self._seen(server_round, period)
        return self._aged(replies, server_round, period, cohort)

    def _nobody(self, server_round: int) -> Cohort:
        """A cohort of nobody."""
        layout = self.layout
        start = Payload(torch.zeros(layout.dim, dtype=layout.dtype))
        return Cohort(np.zeros(0, dtype=np.int64), server_round, layout, start)

    def _aged(
        self, replies: Replies, server_round: int, period: Period, cohort: Cohort | None
    ) -> Replies:
        """The replies with their staleness, moved to the model of now where that is wanted."""
        begun = {job.client: job.server_round for job in period.due}
        ages = [server_round - begun[client] for client in replies.client_ids.tolist()]
        if not any(ages):
            return replies
        staleness = torch.tensor(ages, dtype=torch.int64)
        now = None if cohort is None else cohort.shared.params
        if not self._moved or now is None or replies.params is None:
            return replace(replies, staleness=staleness)
        late = staleness > 0
        update = replies.params[late].double() - _rows(replies.reference, late).double()
        params = replies.params.clone()
        params[late] = (now.double() + update).to(params.dtype)
        return replace(
            replies,
            staleness=staleness,
            params=params,
            reference=now,
            _built={n: m for n, m in replies._built.items() if not late[n]},
        )

    def _seen(self, server_round: int, period: Period) -> Observed:
        ages = {job.client: server_round - job.server_round for job in period.due}
        metrics: dict[str, int | float] = {
            "time/virtual_s": period.ends * self._tick_s,
            "clock/started": len(period.started),
            "clock/outstanding": len(period.outstanding),
        }
        if ages:
            metrics["clock/staleness_mean"] = sum(ages.values()) / len(ages)
            metrics["clock/staleness_max"] = max(ages.values())
        record = {
            "tick": period.ends,
            "started": sorted(job.client for job in period.started),
            "ticks": {str(job.client): job.arrival - job.start for job in sorted(period.due)},
            "staleness": {str(client): age for client, age in sorted(ages.items()) if age},
        }
        return Observed(metrics, record)


def _rows(reference: Tensor | None, places: Tensor) -> Tensor:
    assert reference is not None
    return reference[places] if reference.dim() == 2 else reference
