"""The engine on Ray workers. The only file that imports ray.

Workers are actors that live as long as the grid. Each does one piece of work at a time, so when a
worker dies or exceeds its time it is known whose work it was doing. What all clients share is sent
once per call; for workers of the driver's machine it lies in shared memory, into which they also
write their results, while those of other machines get and return it through Ray's object store.
Likewise work reaches a worker of the driver's machine through a pipe (`line.py`), and others
through Ray. What runs in a worker's process is in `worker.py`.
"""

import contextlib
import gc
import logging
import math
import os
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim.basics import kernels
from fedsim.basics.errors import FedsimError, RunError, ScenarioError
from fedsim.basics.kernels_in_use import decisive, differences, in_use
from fedsim.client.executor import ChunkResult
from fedsim.engine import life
from fedsim.engine.grid import LocalGrid
from fedsim.engine.life import Life, Silence, WorkerWatch
from fedsim.engine.pipe import Line, UnspeakableError
from fedsim.engine.pipe import wait as wait_for_lines
from fedsim.engine.ray.place import in_words, make_folder, place
from fedsim.engine.shared_memory import Arena, Probe, payload_size
from fedsim.engine.vigil import Vigil
from fedsim.engine.work import ChunkWork, Fault, Work, WorkOutcome
from fedsim.engine.worker_process import Broadcast, Raised, Ready, Results, WorkerProcess
from fedsim.messages.layout import Payload

try:
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:  # pragma: no cover - exercised in an environment without ray
    raise RunError(
        "ray is not installed, so [engine] kind = 'ray' cannot run; install it with "
        "`pip install 'flwr[simulation]'`, or use [engine] kind = 'inline'"
    ) from error

_log = logging.getLogger("fedsim")
_POLL_S = 0.25  # how long a wait for workers lasts before limits are looked at
_MIXED_POLL_S = 0.005  # and while some answer through pipes and others through Ray
_OBITUARY_S = 5.0  # how long Ray is given to say why a worker has ended
_SLOW_START_S = 5.0  # after which a start may be waiting for a place that is gone


@dataclass
class _RayWorker:
    """The driver's view of one worker."""

    number: int
    actor: Any
    starting: Any  # reference to `ready`, None once it has answered
    since: float
    pid: int = 0
    begun: int = 0  # when its process began
    node: int = -1  # on which node it is
    near: bool = False  # whether it maps the driver's shared memory
    line: Line | None = None  # how work reaches it, if not through Ray
    serving: Any = None  # reference to `serve`, which ends when the worker does
    silence: Silence = field(default_factory=Silence)  # since it was given its work

    def __str__(self) -> str:
        where = f" on node {self.node}" if self.node >= 0 else ""
        process = f" (process {self.pid})" if self.pid else ""
        return f"worker {self.number}{where}{process}"

    def outcome(
        self, value: Any, fault: Fault | None = None, reason: str = "", detail: str = ""
    ) -> WorkOutcome:
        """How work ended here."""
        return WorkOutcome(value, fault, reason, self.number, detail, self.node)

    def silent_for(self, limit_s: float) -> tuple[Fault, str]:
        """What is wrong with one that was silent for too long, and what to do about it."""
        advice = "and was ended; to wait longer raise [engine] silence_timeout_s"
        if self.silence.is_asleep:  # in a client's own code
            return "hung", f"its {self} slept without doing anything {advice}"
        return "died", f"its {self} gave no sign of life for {limit_s:g} s {advice}"

    def hang_up(self) -> None:
        """End the line."""
        if self.line is not None:
            self.line.close()
            self.line = None


# By its worker's line, or a reference of Ray's: whose it is, what, and since when.
_Running = dict[Any, tuple[_RayWorker, Work, float]]


class RayGrid(LocalGrid):
    """Virtual clients on Ray workers.

    Args:
        client_app: fedsim's CohortApp or any other Flower ClientApp.
        num_supernodes: N, the clients registered.
        run_config: The run's configuration, for the clients' contexts.
        client_timeout_s: Seconds a client may take once its worker has begun; None waits for ever.
        state_limit_mb: Megabytes of clients' memories held in main memory, the others on the disk.
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
        self._resources = {"num_cpus": 1.0, "num_gpus": 0.0, **(client_resources or {})}
        self._startup_timeout_s = startup_timeout_s
        _require_sendable(client_app)
        self._watches: dict[int, _NodeWatch] = {}
        self._vigil = Vigil(silence_timeout_s, lambda node, pids: self._watches[node].ask(pids))
        self._pool: list[_RayWorker] = []
        self._broadcasts, self._is_new = 0, True
        self._shared_arena: Arena | None = None
        self._result_arenas: list[Arena] = []
        self._results: tuple[Tensor, Results] | None = None
        self._app_reference: Any = None
        joined, self._in_session = _SESSION.enter(address, workers, self._resources, init_args)
        try:
            # processes of a cluster that this one started have its environment
            self._variables = kernels.apart() if joined else {}
            self._kernels, self._unlike = in_use(), set[str]()
            self._probe = _probe_arena()
            self._nodes = {_node_here(): 0}  # Ray's names are the machines' own
            self.num_workers = self._count_workers(workers)
            self._app_reference = ray.put(client_app)
            for number in range(self.num_workers):
                self._pool.append(self._start_worker(number))
        except BaseException as error:
            self.close()
            if isinstance(error, FedsimError) or not isinstance(error, Exception):
                raise
            raise RunError(
                f"Ray's workers could not be started: {in_words(error)}; try [engine] kind = "
                "'inline'"
            ) from error

    # --- life -----------------------------------------------------------------------------

    def close(self) -> None:
        """End the workers, and Ray too when grids have started it and this is the last of them."""
        for worker in self._pool:
            worker.hang_up()
            with contextlib.suppress(Exception):
                ray.kill(worker.actor, no_restart=True)
            worker.actor = worker.starting = worker.serving = None
        self._pool.clear()
        for watch in self._watches.values():
            watch.end()
        self._watches.clear()
        self._app_reference = None
        if self._in_session:
            self._in_session = False
            _SESSION.leave()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that have started, by worker number."""
        for worker in self._pool:
            if worker.starting is not None:
                self._await_start(worker)
        return [worker.pid for worker in self._pool]

    def _room(self) -> int:
        """How many workers fit into the cluster, node by node, as Flower counts them."""
        cpus, gpus = float(self._resources["num_cpus"]), float(self._resources["num_gpus"])
        total = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                fits = [int(has.get("CPU", 0) / cpus)] if cpus else []
                fits += [int(has.get("GPU", 0) / gpus)] if gpus else []
                total += min(fits, default=0)
        return total

    def _count_workers(self, cap: int | None) -> int:
        cpus, gpus = float(self._resources["num_cpus"]), float(self._resources["num_gpus"])
        total = self._room()
        if total < 1:
            raise RunError(
                f"the Ray cluster has {ray.cluster_resources().get('CPU', 0):g} CPUs and "
                f"{ray.cluster_resources().get('GPU', 0):g} GPUs, no node with room for one "
                "worker of "
                f"{cpus:g} CPUs and {gpus:g} GPUs; lower [engine] client_resources"
            )
        return total if cap is None else min(cap, total)

    def _start_worker(self, number: int) -> _RayWorker:
        actor_class: Any = ray.remote(WorkerProcess)
        actor = actor_class.options(
            num_cpus=self._resources["num_cpus"],
            num_gpus=self._resources["num_gpus"],
            max_restarts=0,
            max_task_retries=0,
            runtime_env=_runtime_env(self._variables),
        ).remote(self._app_reference, self.num_clients, self._run_config, ray.get, _node_here)
        sign = None if self._probe is None else self._probe.sign
        line = None
        if sign is not None:
            with contextlib.suppress(OSError):
                line = Line()
        starting = actor.ready.remote(sign, None if line is None else line.name)
        return _RayWorker(number, actor, starting, time.monotonic(), line=line)

    def _await_worker(self) -> None:
        self._await_alike()
        if all(worker.starting is not None for worker in self._pool):
            self._await_start(self._pool[0])

    def _await_alike(self) -> None:
        """Under portable bits, wait before the first work for all: one unlike them is found now."""
        if self._is_new and kernels.pinned() == "portable":
            for worker in self._pool:
                if worker.starting is not None:
                    self._await_start(worker)
        self._is_new = False

    def _await_start(self, worker: _RayWorker) -> None:
        left = self._startup_timeout_s - (time.monotonic() - worker.since)
        done, _ = ray.wait([worker.starting], timeout=max(left, 0))
        if not done:
            self._check_start(worker, limit=0)
        self._finish_start(worker)

    def _finish_start(self, worker: _RayWorker) -> None:
        try:
            ready: Ready = ray.get(worker.starting)
        except ray.exceptions.RayError as error:
            raise RunError(
                f"worker {worker.number} did not start: {in_words(error)}; see the log of the run, "
                "or try [engine] kind = 'inline'"
            ) from error
        worker.starting = None
        worker.pid, worker.begun, worker.near = ready.pid, ready.begun, ready.near
        worker.node = self._nodes.setdefault(ready.node, len(self._nodes))
        if not worker.near and worker.node not in self._watches:
            self._watches[worker.node] = _NodeWatch(ready.node, self._startup_timeout_s)
        self._hold_to_promise(worker, ready.kernels)
        memory = "shares" if worker.near else "does not share"
        _log.info("%s is ready; it %s the driver's memory", worker, memory)
        if not ready.hears:
            worker.hang_up()
        if worker.line is not None:
            worker.line.joined()
            worker.serving = worker.actor.serve.remote()

    def _hold_to_promise(self, worker: _RayWorker, there: Mapping[str, str]) -> None:
        """Refuse, or under fast bits tell of, a worker that computes with other kernels."""
        bits = kernels.pinned()
        unlike = differences(decisive(self._kernels, bits), decisive(there, bits))
        if unlike and bits == "portable":
            raise RunError(
                f"{worker} computes with other kernels than this process ({unlike}), and bits = "
                "'portable' are asked for; end what has set them there, or use bits = 'fast'"
            )
        if unlike and unlike not in self._unlike:
            self._unlike.add(unlike)
            self.incidents.append(
                f"{worker} computes with other kernels than this process ({unlike}): the last bits "
                "of the result depend on who trained what; [engine] bits = 'portable' are alike"
            )

    def _check_start(self, worker: _RayWorker, limit: float) -> None:
        waited = time.monotonic() - worker.since
        if waited > limit:
            raise RunError(
                f"worker {worker.number} of {self.num_workers} did not start within {waited:.0f} "
                "s: the "
                f"Ray cluster has {ray.available_resources().get('CPU', 0):g} of "
                f"{ray.cluster_resources().get('CPU', 0):g} CPUs free and a worker asks for "
                f"{self._resources['num_cpus']:g}; free some, or lower [engine] workers"
            )

    def _replace(self, worker: _RayWorker) -> None:
        """End a worker for good and start another in its place."""
        worker.hang_up()
        with contextlib.suppress(Exception):
            ray.kill(worker.actor, no_restart=True)
        if worker.near:  # a native call that hangs does not hear Ray
            life.end(worker.pid, worker.begun)
        if self._gave_up(worker):
            return
        fresh = self._start_worker(worker.number)
        worker.actor, worker.starting, worker.since = fresh.actor, fresh.starting, fresh.since
        worker.pid, worker.node, worker.near = 0, -1, False
        worker.line, worker.serving = fresh.line, None

    def _gave_up(self, worker: _RayWorker) -> bool:
        """Go on without a worker for which the cluster has lost its place, if others are left."""
        room = self._room()
        if len(self._pool) < 2 or room >= len(self._pool):
            return False
        worker.hang_up()
        with contextlib.suppress(Exception):
            ray.kill(worker.actor, no_restart=True)
        self._pool.remove(worker)
        self.num_workers = len(self._pool)
        self.incidents.append(
            f"{worker} is not replaced: the Ray cluster has room for {room} since a "
            f"node has left; {self.num_workers} go on"
        )
        return True

    # --- shared memory --------------------------------------------------------------------

    def _allocate(self, count: int, dim: int, dtype: torch.dtype) -> Tensor:
        size = max(1, count * dim * torch.empty((), dtype=dtype).element_size())
        self._results = None
        if self._probe is None:
            return super()._allocate(count, dim, dtype)
        self._result_arenas = [a for a in self._result_arenas if not a.is_free or a.size >= size]
        arena = next((a for a in self._result_arenas if a.is_free), None)
        if arena is None:
            try:
                arena = Arena(size)
            except OSError:  # no such memory: results come back through Ray
                return super()._allocate(count, dim, dtype)
            self._result_arenas.append(arena)
        rows = arena.lend(dtype, (count, dim))
        self._results = (rows, Results(arena.name, dtype, (count, dim)))
        return rows

    def _broadcast(
        self, worker: _RayWorker, shared: Payload, laid: dict[bool, Broadcast]
    ) -> Broadcast:
        """What all chunks of a call share, where this worker reaches it; laid there once."""
        if worker.near not in laid:
            self._broadcasts += 1
            number = self._broadcasts
            laid[worker.near] = (
                self._in_arena(number, shared)
                if worker.near
                else Broadcast(number, stored=[ray.put(shared)])
            )
        return laid[worker.near]

    def _in_arena(self, number: int, shared: Payload) -> Broadcast:
        size = payload_size(shared)
        try:
            if self._shared_arena is None or self._shared_arena.size < size:
                self._shared_arena = Arena(size)
        except OSError:  # no such memory: it goes with each chunk
            return Broadcast(number, value=shared)
        places = self._shared_arena.write(shared)
        return Broadcast(number, self._shared_arena.name, places)

    # --- work -----------------------------------------------------------------------------

    def _perform(
        self, works: Sequence[Work], shared: Payload, rows: Tensor | None, deadline: float | None
    ) -> Iterator[tuple[Work, WorkOutcome]]:
        running: _Running = {}
        try:
            yield from self._work_through(works, shared, rows, deadline, running)
        finally:
            # however this call ends: nothing runs beside the next one or is taken for its answer
            for worker, _, _ in running.values():
                if any(each is worker for each in self._pool):  # or the grid is closed
                    with contextlib.suppress(Exception):
                        self._replace(worker)

    def _work_through(
        self, works: Sequence[Work], shared: Payload, rows: Tensor | None, deadline: float | None,
        running: _Running,
    ) -> Iterator[tuple[Work, WorkOutcome]]:  # fmt: skip
        self._await_alike()
        queue = deque(works)
        laid: dict[bool, Broadcast] = {}
        while queue or running:
            if deadline is not None and time.monotonic() >= deadline:
                yield from self._give_up(queue, running)
                return
            busy = {id(worker) for worker, _, _ in running.values()}
            for worker in self._pool:
                if queue and worker.starting is None and id(worker) not in busy:
                    work = queue.popleft()
                    chunk = isinstance(work, ChunkWork)
                    broadcast = self._broadcast(worker, shared, laid) if chunk else None
                    self._send(worker, work, broadcast, rows, running)
            starting = (
                {w.starting: w for w in self._pool if w.starting is not None} if queue else {}
            )
            for reference in _first_done(running, starting, self._patience(running, deadline)):
                if reference in starting:
                    self._finish_start(starting[reference])
                else:
                    worker, work, _ = running.pop(reference)
                    yield work, self._collect(worker, work, reference, rows)
            for worker in starting.values():
                waits = worker.starting is not None
                slow = time.monotonic() - worker.since > _SLOW_START_S
                if waits and not (slow and self._gave_up(worker)):
                    self._check_start(worker, self._startup_timeout_s)
            for reference, (worker, work, begun) in list(running.items()):
                if work.limit_s is not None and time.monotonic() - begun > work.limit_s:
                    del running[reference]
                    why = f"no answer within {work.limit_s:g} s of its start; its worker was ended"
                    hung = worker.outcome(None, "hung", why)
                    self._replace(worker)
                    yield work, hung
            for worker in self._vigil.lost([worker for worker, _, _ in running.values()]):
                reference = next(key for key, task in running.items() if task[0] is worker)
                _, work, _ = running.pop(reference)
                fault, why = worker.silent_for(self._vigil.limit_s or 0.0)
                died = worker.outcome(None, fault, why)
                self._replace(worker)
                yield work, died

    def _send(
        self, worker: _RayWorker, work: Work, broadcast: Broadcast | None, rows: Tensor | None,
        running: _Running,
    ) -> None:  # fmt: skip
        """Hand work to a worker; it then runs under its line, or under a reference of Ray's."""
        results = None
        if worker.near and self._results is not None and self._results[0] is rows:
            results = self._results[1]
        task = (worker, work, time.monotonic())
        worker.silence = Silence()
        if worker.line is not None:
            running[worker.line] = task
            worker.line.send((work, broadcast, results))
        else:
            running[worker.actor.work.remote(work, broadcast, results)] = task

    def _collect(
        self, worker: _RayWorker, work: Work, reference: Any, rows: Tensor | None
    ) -> WorkOutcome:
        try:
            value = self._heard(worker) if reference is worker.line else ray.get(reference)
        except (ray.exceptions.RayTaskError, UnspeakableError) as error:
            # such as a reply that cannot be pickled
            return worker.outcome(None, "raised", str(error).strip().splitlines()[-1])
        except ray.exceptions.RayError as error:
            starved = isinstance(error, ray.exceptions.OutOfMemoryError)
            how = "was ended for want of memory" if starved else "ended unexpectedly"
            died = worker.outcome(None, "died", f"its {worker} {how}")
            self._replace(worker)
            return died
        if isinstance(value, Raised):
            return worker.outcome(None, "raised", value.reason, value.detail)
        if isinstance(work, ChunkWork) and not work.alone and rows is not None:
            assert isinstance(value, ChunkResult)
            if isinstance(value.params, Tensor):
                rows[list(work.places)] = value.params
        return worker.outcome(value)

    def _heard(self, worker: _RayWorker) -> Any:
        """Return what a worker has said over its line; raises what Ray says of one that ended."""
        assert worker.line is not None
        try:
            return worker.line.receive()
        except EOFError:
            with contextlib.suppress(ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError):
                ray.get(worker.serving, timeout=_OBITUARY_S)
            raise ray.exceptions.RayActorError(error_msg="the worker hung up") from None

    def _give_up(self, queue: deque[Work], running: _Running) -> Iterator[tuple[Work, WorkOutcome]]:
        """Discard what is unfinished: nothing of it is committed or runs beside the next call."""
        for reference in list(running):
            worker, work, _ = running.pop(reference)
            why = "unfinished when the time for this call was over; its worker was ended"
            late = worker.outcome(None, "late", why)
            self._replace(worker)
            yield work, late
        for work in queue:
            why = "not begun when the time for this call was over"
            yield work, WorkOutcome(None, "late", why, -1, node=-1)

    def _patience(self, running: _Running, deadline: float | None) -> float:
        now = time.monotonic()
        ends = [begun + w.limit_s for _, w, begun in running.values() if w.limit_s is not None]
        ends += [] if deadline is None else [deadline]
        return max(0.0, min([_POLL_S, *(end - now for end in ends)]))


class _NodeWatch:
    """Asks a process of its own on some node about the workers there; waits for no answer."""

    def __init__(self, node: str, startup_timeout_s: float) -> None:
        self._node, self._startup_timeout_s = node, startup_timeout_s
        self._start()

    def _start(self) -> None:
        actor_class: Any = ray.remote(WorkerWatch)
        there = NodeAffinitySchedulingStrategy(self._node, soft=False)
        self._actor = actor_class.options(
            num_cpus=0, scheduling_strategy=there, runtime_env=_runtime_env({})
        ).remote()
        self._asked = self._actor.look.remote([])
        self._until = time.monotonic() + self._startup_timeout_s  # when the first answer is due

    def ask(self, pids: Sequence[int]) -> Mapping[int, Life | None] | None:
        """Return what was answered since the last time; None if nobody has answered."""
        done, _ = ray.wait([self._asked], timeout=0)
        if not done:
            return {} if time.monotonic() < self._until else None
        try:
            found: Mapping[int, Life | None] = ray.get(self._asked)
        except ray.exceptions.RayError:  # with its node, of which Ray tells; else it starts again
            self._start()
            return {}
        self._asked, self._until = self._actor.look.remote(pids), 0.0
        return found

    def end(self) -> None:
        """End it."""
        with contextlib.suppress(Exception):
            ray.kill(self._actor, no_restart=True)
        self._actor = self._asked = None


def _first_done(
    running: _Running, starting: Mapping[Any, _RayWorker], patience_s: float
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


def _runtime_env(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """What the environment of worker processes has besides the driver's."""
    return {"env_vars": dict(variables)} if variables else None


class _RaySession:
    """Ray's session of this process, where a grid began it: the last grid ends it.

    Grids of several threads may share one.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._grids = 0  # those that keep the session; 0 of one that somebody else began
        self._folder: str | None = None
        self._over = threading.Event()

    def enter(
        self,
        address: str | None,
        workers: int | None,
        resources: Mapping[str, float],
        init_args: Mapping[str, Any] | None,
    ) -> tuple[bool, bool]:
        """Join the session of this process, or begin one; arguments as those of `_start_ray`.

        Returns:
            Whether it was there already or is a cluster's, and whether it must be left.
        """
        with self._lock:
            joined = ray.is_initialized()
            if not joined:
                with _own_handler():
                    joined, self._folder = self._begun(
                        lambda: _start_ray(address, workers, resources, init_args)
                    )
                self._grids = 1
            elif self._grids:
                self._grids += 1
            return joined, self._grids > 0

    def _begun(self, start: Callable[[], tuple[bool, str | None]]) -> tuple[bool, str | None]:
        """Start Ray in a thread that stays: its processes end with the thread that began them."""
        if threading.current_thread() is threading.main_thread():
            return start()
        result: Future[tuple[bool, str | None]] = Future()
        over = self._over = threading.Event()

        def hold() -> None:
            try:
                result.set_result(start())
            except BaseException as error:
                result.set_exception(error)
            else:
                over.wait()

        threading.Thread(target=hold, name="ray", daemon=True).start()
        return result.result()

    def leave(self) -> None:
        """End the session when nobody is left in it."""
        with self._lock:
            self._grids = max(0, self._grids - 1)
            if self._grids:
                return
            if ray.is_initialized():
                # A session begun by another thread gives its objects the same names: references
                # that outlive this one would take those away when they are collected.
                gc.collect()
                ray.shutdown()
            self._over.set()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None


_SESSION = _RaySession()


@contextlib.contextmanager
def _own_handler() -> Iterator[None]:
    """Keep this process's way to end on SIGTERM, also while Ray starts, which sets its own."""
    ours = callable(signal.getsignal(signal.SIGTERM))
    before = ray._private.utils.set_sigterm_handler
    if ours:
        ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = before


def _start_ray(
    address: str | None,
    workers: int | None,
    resources: Mapping[str, float],
    init_args: Mapping[str, Any] | None,
) -> tuple[bool, str | None]:
    """Join the cluster at `address` or one that is up, else start one on this machine.

    Returns:
        Whether a cluster was joined, and the folder that was made for one that was started.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # if this process is killed while Ray starts, what Ray has started waits so long for the rest
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    extra = dict(init_args or {})
    named = address or extra.pop("address", None) or os.environ.get("RAY_ADDRESS")
    standing = None if named or extra else _standing_cluster()
    if named and not _answers(named):
        raise RunError(
            f"no Ray cluster answers at '{named}'; start one there with `ray start --head`, or "
            "leave "
            "[engine] address out"
        )
    if named or standing:
        try:
            ray.init(**{**quiet, "address": named or standing, **extra})
            return True, None
        except Exception as error:
            if named:
                raise RunError(
                    f"no Ray cluster could be joined at '{named}': {in_words(error)}; start one "
                    "there with `ray start --head`, or leave [engine] address out"
                ) from error
    local = {**quiet, "address": "local", "include_dashboard": False}
    if workers is not None:
        # logical CPUs: asking for more workers than cores is allowed
        cores = os.cpu_count() or 1
        local["num_cpus"] = max(cores, math.ceil(workers * resources["num_cpus"]))
    folder = None if "_temp_dir" in extra else make_folder()
    if folder is not None:
        local["_temp_dir"] = folder
    try:
        ray.init(**{**local, **extra})
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        where = folder or place().folder
        raise RunError(
            f"Ray could not be started: {in_words(error)}; its logs are below {where}; try "
            "[engine] kind = 'inline'"
        ) from error
    return False, folder


def _require_sendable(app: ClientApp) -> None:
    """Refuse an app that no worker can be sent, before Ray starts."""
    try:
        ray.cloudpickle.dumps(app)
    except Exception as error:
        raise ScenarioError(
            "what clients run cannot be sent to worker processes "
            f"({type(error).__name__}: {in_words(error)}); put what is named of '__main__' into a "
            "module, or use [engine] kind = 'inline'"
        ) from error


def _standing_cluster() -> str | None:
    """The address of a cluster that `ray start` has left on this machine and that answers."""
    read = getattr(ray._private.utils, "read_ray_address", None)
    found = str((read() if read is not None else None) or "")
    return found if found and _answers(found) else None


def _answers(address: str) -> bool:
    """Whether anybody listens at an address; Ray itself waits minutes for one that is gone."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        return True  # "auto", "ray://...": for Ray to judge
    try:
        with socket.create_connection((host, int(port)), timeout=3.0):
            return True
    except OSError:
        return False


def _probe_arena() -> Probe | None:
    """By which a worker finds out whether it shares memory with the driver."""
    try:
        return Probe()
    except (OSError, AttributeError):  # not Linux, or no memory files
        return None


def _node_here() -> str:
    return str(ray.get_runtime_context().get_node_id())
