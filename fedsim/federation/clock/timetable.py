"""Who works when: jobs on a virtual clock, and the moments at which the server aggregates.

Nothing is trained here. How long a job takes is known when it begins, so a whole round is planned
before anybody trains: who begins, who is delivered, when it ends.

Sources: Fraboni et al. 2023 (arXiv 2206.10189), section 3, for the triggers with restarts on
aggregation; Nguyen et al. 2022 (arXiv 2106.06639) for clients that are replaced at once.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from fedsim.federation.clock.job_times import Fate

Trigger = Literal["all", "arrival", "count", "window"]
Times = Callable[[int, Sequence[int]], list[Fate]]


class Job(NamedTuple):
    """One client's work on one model. Jobs are in the order in which they are delivered.

    Attributes:
        arrival: The tick at which the reply is there, or would be.
        client: Who works.
        server_round: The round whose model the client began with.
        start: The tick at which it began.
        work: The share of its local work that it does.
        drops: Whether it ends without a reply.
    """

    arrival: int
    client: int
    server_round: int
    start: int
    work: float = 1.0
    drops: bool = False


class Period(NamedTuple):
    """A round of the clock: from one aggregation to the next.

    Attributes:
        started: The jobs that begin in it, in that order.
        due: The jobs that are delivered at its end, in the order of their arrival.
        outstanding: The jobs under way after it, a heap.
        ends: The tick of the aggregation.
    """

    started: tuple[Job, ...]
    due: tuple[Job, ...]
    outstanding: list[Job]
    ends: int


class Timetable:
    """The jobs under way, and the rule by which the server aggregates.

    A client has one job at a time, and begins no other before the aggregation that its reply is
    part of.

    Args:
        trigger: When the server aggregates.
        times: What becomes of jobs, see `JobTimes.of`.
        concurrency: Jobs at a time, at least 1; for "all" it bounds nothing.
        count: Replies per aggregation under "count".
        window: Ticks between aggregations under "window".
        at_once: Whether a job that ends makes room for the next one at once, and not only at the
            aggregation.

    Attributes:
        now: The tick of the last aggregation.
        jobs: The jobs under way, a heap.
    """

    def __init__(
        self,
        trigger: Trigger,
        times: Times,
        *,
        concurrency: int,
        count: int = 1,
        window: int = 1,
        at_once: bool = False,
    ) -> None:
        self._trigger, self._times, self._concurrency = trigger, times, concurrency
        self._count, self._window, self._at_once = count, window, at_once
        self.now = 0
        self.jobs: list[Job] = []

    @property
    def busy(self) -> frozenset[int]:
        """The clients that have a job."""
        return frozenset(job.client for job in self.jobs)

    @property
    def free(self) -> int | None:
        """How many jobs can begin at once; None for any number."""
        return None if self._trigger == "all" else max(0, self._concurrency - len(self.jobs))

    def plan(self, server_round: int, candidates: Iterable[int]) -> Period:
        """Return the next period; nothing happens yet.

        Args:
            server_round: The round.
            candidates: Who could begin a job, in the order in which they would; nobody busy.
        """
        queue, jobs, started = deque(candidates), list(self.jobs), []
        free = len(queue) if self.free is None else min(self.free, len(queue))

        def begin(clients: Sequence[int], tick: int) -> None:
            for client, fate in zip(clients, self._times(server_round, clients), strict=True):
                job = Job(
                    tick + fate.ticks, client, server_round, tick, fate.work, fate.drops
                )  # fmt: skip
                started.append(job)
                heapq.heappush(jobs, job)

        begin([queue.popleft() for _ in range(free)], self.now)
        due: list[Job] = []
        replies = 0
        limit = self.now + self._window
        while jobs and not self._is_over(replies, jobs[0], limit):
            job = heapq.heappop(jobs)
            due.append(job)
            replies += not job.drops
            if self._at_once and queue:
                begin([queue.popleft()], job.arrival)
        ends = limit if self._trigger == "window" else max([self.now, *(j.arrival for j in due)])
        return Period(tuple(started), tuple(due), jobs, ends)

    def go_to(self, period: Period) -> None:
        """Let a planned period pass."""
        self.now, self.jobs = period.ends, list(period.outstanding)

    def restore(self, now: int, jobs: Iterable[Job]) -> None:
        """Be where a run was."""
        self.now, self.jobs = now, list(jobs)
        heapq.heapify(self.jobs)

    def _is_over(self, replies: int, following: Job, limit: int) -> bool:
        """Whether the server aggregates before the job that would be delivered next."""
        if self._trigger == "window":
            return following.arrival > limit
        if self._trigger == "all":
            return False
        return replies >= (self._count if self._trigger == "count" else 1)
