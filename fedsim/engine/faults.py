"""A chunk failed: who it was, and the chunk again without them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedsim.basics.errors import RunError
from fedsim.client.job import ChunkResult
from fedsim.engine.journal import Journal
from fedsim.engine.work import ChunkWork, Perform, Watch, Work, WorkOutcome
from fedsim.messages.cohort import Cohort
from fedsim.messages.failures import Failure

_ATTEMPTS = 3  # a chunk that keeps losing its worker is run at most this often


@dataclass(frozen=True)
class ChunkCall:
    """One call for a cohort: what does its chunks, and what has come of them.

    Attributes:
        cohort: The clients.
        perform: Does the works.
        rows: Where chunks write their parameters, `[K, dim]`; None if they evaluate.
        deadline: `time.monotonic()` after which nothing is waited for.
        client_timeout_s: Seconds one client may take; None waits for ever.
        watch: Is told how long the chunks took.
        failures: Who failed, by client.
        results: Of chunks that are done, by the places of their members.
    """

    cohort: Cohort
    perform: Perform
    rows: Tensor | None
    deadline: float | None
    client_timeout_s: float | None
    watch: Watch | None
    failures: dict[int, Failure]
    results: dict[tuple[int, ...], ChunkResult] = field(default_factory=dict)

    def do(self, works: Sequence[ChunkWork], rows: Tensor | None) -> list[tuple[Work, WorkOutcome]]:
        """Do works that write their parameters into `rows`, and return how each ended."""
        return list(self.perform(works, self.cohort.shared, rows, self.deadline))

    def fail(self, clients: Sequence[int], cause: str, reason: str) -> None:
        """Note that clients have failed, unless something else is known of them."""
        for client in clients:
            failure = Failure(client, self.cohort.server_round, cause, reason)
            self.failures.setdefault(client, failure)


class ChunkFaults:
    """Does all chunks of a call, names culprits and runs their chunks again without them.

    It remembers who has cost a worker when it ran alone: in later rounds they are tried first.

    Args:
        journal: Is told of every chunk and of what went wrong.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._suspects: dict[int, int] = {}  # who cost a worker when it ran alone, and the round

    def work_off(self, call: ChunkCall, works: Sequence[ChunkWork]) -> None:
        """Do all chunks; what comes of them is in the call.

        Raises:
            RunError: If a chunk keeps failing although each of its members finishes alone.
        """
        attempts = dict.fromkeys((work.index for work in works), 0)
        pending = [self._without_suspects(call, work) for work in works]
        pending = [work for work in pending if not all(work.job.absent)]
        while pending:
            again: list[ChunkWork] = []
            begun = time.perf_counter()
            done = call.do(pending, call.rows)
            if call.watch is not None:
                call.watch(time.perf_counter() - begun, done)
            for work, outcome in done:
                assert isinstance(work, ChunkWork)
                attempts[work.index] += 1
                self._journal.chunk(work, outcome, attempts[work.index])
                if outcome.fault is None:
                    call.results[work.places] = outcome.value
                elif outcome.fault == "late":
                    call.fail(work.clients, "late", outcome.reason)
                else:
                    again.append(self._after_fault(call, work, outcome, attempts[work.index]))
            pending = [work for work in again if not all(work.job.absent)]

    def _after_fault(
        self, call: ChunkCall, work: ChunkWork, outcome: WorkOutcome, attempt: int
    ) -> ChunkWork:
        """Return the chunk to run again: as it was, or with its culprits' slots neutral."""
        incidents = self._journal.incidents
        where = f"round {call.cohort.server_round}, chunk {work.index}, worker {outcome.worker}"
        if outcome.fault == "died" and attempt == 1:
            incidents.append(f"{where}: {outcome.reason}; the chunk runs again on another worker")
            return work
        culprits = self._find_culprits(call, work, set(work.clients))
        if not culprits:
            if attempt >= _ATTEMPTS:
                raise RunError(
                    f"{where}: the chunk of clients {list(work.clients)} {outcome.fault} although "
                    f"each of them finishes alone: {outcome.reason}; try a smaller [engine] "
                    "chunk_size"
                )
            incidents.append(f"{where}: {outcome.reason}; no member fails alone, so it runs again")
            return work
        return _with_neutral(work, culprits)

    def _without_suspects(self, call: ChunkCall, work: ChunkWork) -> ChunkWork:
        """Try members that cost a worker in an earlier round alone first, so that it costs one."""
        before = call.cohort.server_round
        suspects = {c for c in work.clients if self._suspects.get(c, math.inf) < before}
        if not suspects:
            return work
        return _with_neutral(work, self._find_culprits(call, work, suspects))

    def _find_culprits(self, call: ChunkCall, work: ChunkWork, members: set[int]) -> set[int]:
        """Run some of a chunk's members one at a time; those that fail alone are named."""
        singles: list[ChunkWork] = []
        for place, client in enumerate(work.clients):
            if client in members and not work.job.absent[place]:
                singles.append(_alone(work, place, len(singles), call.client_timeout_s))
        culprits = set()
        for single, outcome in call.do(singles, None):
            client = single.clients[0]
            self._suspects.pop(client, None)
            if outcome.fault in ("died", "hung"):
                self._suspects[client] = call.cohort.server_round
            if outcome.fault is not None:
                culprits.add(client)
                call.fail((client,), outcome.fault, outcome.reason)
        return culprits


def _alone(work: ChunkWork, place: int, index: int, limit_s: float | None) -> ChunkWork:
    """One member of a chunk, to be run by itself."""
    job = replace(
        work.job,
        client_ids=work.job.client_ids[place : place + 1],
        absent=(False,),
        personal=work.job.personal.rows([place]),
        state={name: tensor[[place]] for name, tensor in work.job.state.items()},
        has_state=work.job.has_state[place : place + 1],
        work=work.job.work[place : place + 1],
        rounds=work.job.rounds[place : place + 1],
        slots=0,
    )
    return ChunkWork(index, job, (work.places[place],), True, limit_s)


def _with_neutral(work: ChunkWork, clients: set[int]) -> ChunkWork:
    """The chunk with neutral slots for these clients."""
    job = work.job
    absent = tuple(
        gone or client in clients for client, gone in zip(job.client_ids, job.absent, strict=True)
    )
    return replace(work, job=replace(job, absent=absent))
