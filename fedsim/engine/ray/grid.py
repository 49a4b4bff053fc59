"""The engine on Ray workers.

Workers are actors that live as long as the grid. Each does one piece of work at a time, so when a
worker dies or exceeds its time it is known whose work it was doing. What all clients share is sent
once per call; for workers of the driver's machine it lies in shared memory, into which they also
write their results, while those of other machines get and return it through Ray's object store.
Likewise work reaches a worker of the driver's machine through a pipe (`engine/pipe.py`), and others
through Ray. What runs in a worker's process is in `engine/worker_process.py`.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim.basics.errors import FedsimError, RunError
from fedsim.client.job import ChunkResult
from fedsim.engine.grid import LocalGrid
from fedsim.engine.life import Silence
from fedsim.engine.pipe import Line, UnspeakableError
from fedsim.engine.pipe import wait as wait_for_lines
from fedsim.engine.ray.cluster import SESSION
from fedsim.engine.ray.installed import ray
from fedsim.engine.ray.memory import DriverMemory
from fedsim.engine.ray.place import in_words
from fedsim.engine.ray.workers import RayWorker, Workers, require_sendable
from fedsim.engine.vigil import Vigil
from fedsim.engine.work import ChunkWork, Work, WorkOutcome
from fedsim.engine.worker_process import Broadcast, Raised
from fedsim.messages.layout import Payload

_POLL_S = 0.25  # how long a wait for workers lasts before limits are looked at
_MIXED_POLL_S = 0.005  # and while some answer through pipes and others through Ray

# By its worker's line, or a reference of Ray's: whose it is, what, and since when.
_Running = dict[Any, tuple[RayWorker, Work, float]]


class RayGrid(LocalGrid):
    """Virtual clients on Ray workers.

    Args:
        client_app: fedsim's CohortApp or any other Flower ClientApp.
        num_supernodes: N, the clients registered.
        run_config: The run's configuration, for the clients' contexts.
        client_timeout_s: Seconds a client may take once its worker has begun; None waits for ever.
        state_limit_mb: Megabytes of client states held in main memory, the others on the disk.
        workers: At most so many workers; None takes what the resources allow.
        client_resources: What one worker takes of the cluster, as in Flower: `num_cpus` and
            `num_gpus` (fractions allowed); None takes one CPU.
        address: A Ray cluster to join; None joins the one that this process is connected to, that
            RAY_ADDRESS names or that `ray start` has left on this machine, or else starts one for
            the grid's lifetime.
        init_args: Further arguments of `ray.init`.
        startup_timeout_s: Seconds that a worker may take to start.
        silence_timeout_s: Seconds that a worker at work may give no sign of life, as when it is
            stopped or its machine is out of reach; None waits for ever.

    Raises:
        RunError: If the cluster has no room for a single worker or workers do not start.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        client_timeout_s: float | None = None,
        state_limit_mb: float | None = None,
        workers: int | None = None,
        client_resources: Mapping[str, float] | None = None,
        address: str | None = None,
        init_args: Mapping[str, Any] | None = None,
        startup_timeout_s: float = 120.0,
        silence_timeout_s: float | None = 60.0,
    ) -> None:
        super().__init__(
            client_app,
            num_supernodes,
            run_config=run_config,
            client_timeout_s=client_timeout_s,
            state_limit_mb=state_limit_mb,
        )
        if workers is not None and workers < 1:
            raise ValueError(f"workers = {workers}: must be at least 1")
        resources = {"num_cpus": 1.0, "num_gpus": 0.0, **(client_resources or {})}
        require_sendable(client_app)
        self._memory = DriverMemory()
        sign = None if self._memory.probe is None else self._memory.probe.sign
        self._workers = Workers(resources, startup_timeout_s, sign, self.incidents)
        self._vigil = Vigil(silence_timeout_s, self._workers.ask)
        joined, self._in_session = SESSION.enter(address, workers, resources, init_args)
        try:
            self._workers.begin(workers, joined, client_app, num_supernodes, self._run_config)
        except BaseException as error:
            self.close()
            if isinstance(error, FedsimError) or not isinstance(error, Exception):
                raise
            raise RunError(
                f"Ray's workers could not be started: {in_words(error)}; try [engine] kind = "
                "'inline'"
            ) from error

    def close(self) -> None:
        """End the workers, and Ray too when grids have started it and this is the last of them."""
        self._workers.end()
        if self._in_session:
            self._in_session = False
            SESSION.leave()

    @property
    def num_workers(self) -> int:
        """How many workers there are to be."""
        return self._workers.count

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers, by worker number, once all have started."""
        self._workers.await_all()
        return [worker.pid for worker in self._workers.pool]

    def _await_worker(self) -> None:
        self._workers.await_one()

    def _allocate(self, count: int, dim: int, dtype: torch.dtype) -> Tensor:
        lent = self._memory.lend(count, dim, dtype)
        return super()._allocate(count, dim, dtype) if lent is None else lent

    def _perform(
        self, works: Sequence[Work], shared: Payload, rows: Tensor | None, deadline: float | None
    ) -> Iterator[tuple[Work, WorkOutcome]]:
        running: _Running = {}
        try:
            yield from self._work_through(works, shared, rows, deadline, running)
        finally:
            # however this call ends: nothing runs beside the next one or is taken for its answer
            for worker, _, _ in running.values():
                if any(each is worker for each in self._workers.pool):  # or the grid is closed
                    with contextlib.suppress(Exception):
                        self._workers.replace(worker)

    def _work_through(
        self, works: Sequence[Work], shared: Payload, rows: Tensor | None, deadline: float | None,
        running: _Running,
    ) -> Iterator[tuple[Work, WorkOutcome]]:  # fmt: skip
        workers = self._workers
        workers.await_alike()
        queue = deque(works)
        laid: dict[bool, Broadcast] = {}
        while queue or running:
            if deadline is not None and time.monotonic() >= deadline:
                yield from self._give_up(queue, running)
                return
            busy = {id(worker) for worker, _, _ in running.values()}
            for worker in workers.pool:
                if queue and worker.starting is None and id(worker) not in busy:
                    work = queue.popleft()
                    broadcast = None
                    if isinstance(work, ChunkWork):
                        broadcast = self._memory.broadcast(shared, laid, near=worker.near)
                    self._send(worker, work, broadcast, rows, running)
            starting = (
                {w.starting: w for w in workers.pool if w.starting is not None} if queue else {}
            )
            for reference in _first_done(running, starting, _patience(running, deadline)):
                if reference in starting:
                    workers.started(starting[reference])
                else:
                    worker, work, _ = running.pop(reference)
                    yield work, self._collect(worker, work, reference, rows)
            for worker in starting.values():
                workers.still_starting(worker)
            for reference, (worker, work, begun) in list(running.items()):
                if work.limit_s is not None and time.monotonic() - begun > work.limit_s:
                    del running[reference]
                    why = f"no answer within {work.limit_s:g} s of its start; its worker was ended"
                    hung = worker.outcome(None, "hung", why)
                    workers.replace(worker)
                    yield work, hung
            for worker in self._vigil.lost([worker for worker, _, _ in running.values()]):
                reference = next(key for key, task in running.items() if task[0] is worker)
                _, work, _ = running.pop(reference)
                fault, why = worker.silent_for(self._vigil.limit_s or 0.0)
                died = worker.outcome(None, fault, why)
                workers.replace(worker)
                yield work, died

    def _send(
        self, worker: RayWorker, work: Work, broadcast: Broadcast | None, rows: Tensor | None,
        running: _Running,
    ) -> None:  # fmt: skip
        """Hand work to a worker; it then runs under its line, or under a reference of Ray's."""
        results = self._memory.place_of(rows) if worker.near else None
        task = (worker, work, time.monotonic())
        worker.silence = Silence()
        if worker.line is not None:
            running[worker.line] = task
            worker.line.send((work, broadcast, results))
        else:
            running[worker.actor.work.remote(work, broadcast, results)] = task

    def _collect(
        self, worker: RayWorker, work: Work, reference: Any, rows: Tensor | None
    ) -> WorkOutcome:
        try:
            value = worker.answer(reference)
        except (ray.exceptions.RayTaskError, UnspeakableError) as error:
            # such as a reply that cannot be pickled
            return worker.outcome(None, "raised", str(error).strip().splitlines()[-1])
        except ray.exceptions.RayError as error:
            starved = isinstance(error, ray.exceptions.OutOfMemoryError)
            how = "was ended for want of memory" if starved else "ended unexpectedly"
            died = worker.outcome(None, "died", f"its {worker} {how}")
            self._workers.replace(worker)
            return died
        if isinstance(value, Raised):
            return worker.outcome(None, "raised", value.reason, value.detail)
        if isinstance(work, ChunkWork) and not work.alone and rows is not None:
            assert isinstance(value, ChunkResult)
            if isinstance(value.params, Tensor):
                rows[list(work.places)] = value.params
        return worker.outcome(value)

    def _give_up(self, queue: deque[Work], running: _Running) -> Iterator[tuple[Work, WorkOutcome]]:
        """Discard what is unfinished: nothing of it is committed or runs beside the next call."""
        for reference in list(running):
            worker, work, _ = running.pop(reference)
            why = "unfinished when the time for this call was over; its worker was ended"
            late = worker.outcome(None, "late", why)
            self._workers.replace(worker)
            yield work, late
        for work in queue:
            why = "not begun when the time for this call was over"
            yield work, WorkOutcome(None, "late", why, -1, node=-1)


def _first_done(
    running: _Running, starting: Mapping[Any, RayWorker], patience_s: float
) -> list[Any]:
    """Wait until some work is done or a worker has started; return their references or lines."""
    lines = [key for key in running if isinstance(key, Line)]
    by_ray = [key for key in running if not isinstance(key, Line)] + [*starting]
    if not lines:
        done, _ = ray.wait(by_ray, num_returns=1, timeout=patience_s)
        return list(done)
    heard: list[Any] = wait_for_lines(
        lines, min(patience_s, _MIXED_POLL_S) if by_ray else patience_s
    )
    if by_ray:
        heard += ray.wait(by_ray, num_returns=1, timeout=0)[0]
    if not heard:
        # a process that a worker has left behind may hold its line open
        serving = {worker.serving: worker.line for worker, _, _ in running.values() if worker.line}
        ended, _ = ray.wait([*serving], num_returns=1, timeout=0)
        heard = [serving[reference] for reference in ended]
    return heard


def _patience(running: _Running, deadline: float | None) -> float:
    """How long to wait before limits are looked at."""
    now = time.monotonic()
    ends = [begun + w.limit_s for _, w, begun in running.values() if w.limit_s is not None]
    ends += [] if deadline is None else [deadline]
    return max(0.0, min([_POLL_S, *(end - now for end in ends)]))
