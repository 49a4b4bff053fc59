"""Workers, as the driver sees them: started, given work, heard, replaced, ended."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.clientapp import ClientApp

from fedsim.basics import kernels
from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.kernels_in_use import decisive, differences, in_use
from fedsim.engine import life
from fedsim.engine.life import Life, Silence
from fedsim.engine.pipe import Line
from fedsim.engine.ray.cluster import how_many, node_here, room
from fedsim.engine.ray.installed import ray
from fedsim.engine.ray.place import in_words
from fedsim.engine.ray.watch import NodeWatch
from fedsim.engine.shared_memory import Sign
from fedsim.engine.work import Fault, WorkOutcome
from fedsim.engine.worker_process import Ready, WorkerProcess

_log = logging.getLogger("fedsim")
_OBITUARY_S = 5.0  # how long Ray is given to say why a worker has ended
_SLOW_START_S = 5.0  # after which a start may be waiting for a place that is gone


@dataclass
class RayWorker:
    """The driver's view of one worker.

    Attributes:
        number: Its place among the workers, which one that replaces it has too.
        actor: Ray's handle.
        starting: Reference to `ready`; None once it has answered.
        since: When it was started.
        pid: Its process; 0 until it has started, as all that follows.
        begun: When that began, as `Life` has it.
        node: On which node it is.
        near: Whether it maps the driver's memory.
        line: How work reaches it, if not through Ray.
        serving: Reference to `serve`, which ends when the worker does.
        silence: How long it has given no sign of life, since it was given its work.
    """

    number: int
    actor: Any
    starting: Any
    since: float
    pid: int = 0
    begun: int = 0
    node: int = -1
    near: bool = False
    line: Line | None = None
    serving: Any = None
    silence: Silence = field(default_factory=Silence)

    def __str__(self) -> str:
        where = f" on node {self.node}" if self.node >= 0 else ""
        process = f" (process {self.pid})" if self.pid else ""
        return f"worker {self.number}{where}{process}"

    def outcome(
        self, value: Any, fault: Fault | None = None, reason: str = "", detail: str = ""
    ) -> WorkOutcome:
        """Return how work ended here."""
        return WorkOutcome(value, fault, reason, self.number, detail, self.node)

    def silent_for(self, limit_s: float) -> tuple[Fault, str]:
        """Return what is wrong with one that was silent for too long, and what to do about it."""
        advice = "and was ended; to wait longer raise [engine] silence_timeout_s"
        if self.silence.is_asleep:  # in a client's own code
            return "hung", f"its {self} slept without doing anything {advice}"
        return "died", f"its {self} gave no sign of life for {limit_s:g} s {advice}"

    def answer(self, source: Any) -> Any:
        """Return what it has said.

        Args:
            source: Where: its line, or a reference of Ray's.

        Raises:
            RayError: If it has ended, as Ray says how.
            UnspeakableError: If what it had to say does not go through its line.
        """
        if source is not self.line:
            return ray.get(source)
        assert self.line is not None
        try:
            return self.line.receive()
        except EOFError:
            with contextlib.suppress(ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError):
                ray.get(self.serving, timeout=_OBITUARY_S)
            raise ray.exceptions.RayActorError(error_msg="the worker hung up") from None

    def hang_up(self) -> None:
        """End the line."""
        if self.line is not None:
            self.line.close()
            self.line = None

    def kill(self) -> None:
        """End the line, and let Ray end the worker."""
        self.hang_up()
        with contextlib.suppress(Exception):
            ray.kill(self.actor, no_restart=True)


class Workers:
    """The workers of one grid: each does one piece of work at a time until the grid ends.

    Args:
        resources: What one takes of the cluster: `num_cpus` and `num_gpus`.
        startup_timeout_s: Seconds that one may take to start.
        sign: By which one finds out whether it sees the driver's memory; None if there is none.
        incidents: Is told of workers that are not replaced, or compute otherwise.

    Attributes:
        pool: Those that are there, started or starting.
        count: How many there are to be.
    """

    def __init__(
        self,
        resources: Mapping[str, float],
        startup_timeout_s: float,
        sign: Sign | None,
        incidents: list[str],
    ) -> None:
        self.pool: list[RayWorker] = []
        self.count = 0
        self._resources, self._startup_timeout_s = resources, startup_timeout_s
        self._sign, self._incidents = sign, incidents
        self._watches: dict[int, NodeWatch] = {}
        self._nodes: dict[str, int] = {}  # by Ray's names, which are the machines' own
        self._arguments: tuple[Any, ...] = ()  # of their processes
        self._variables: Mapping[str, str] = {}
        self._kernels: Mapping[str, str] = {}  # of this process
        self._is_new = True
        self._unlike: set[str] = set()

    def begin(
        self,
        cap: int | None,
        joined: bool,
        app: ClientApp,
        num_clients: int,
        run_config: Mapping[str, Any],
    ) -> None:
        """Start as many as the cluster has room for, and wait for none.

        Args:
            cap: At most so many; None takes what the resources allow.
            joined: Whether the cluster was there already.
            app: What they run.
            num_clients: N, for the clients' node configuration.
            run_config: The run's configuration, for the clients' contexts.

        Raises:
            RunError: If the cluster has no room for one.
        """
        # processes of a cluster that this one started have its environment
        self._variables = kernels.apart() if joined else {}
        self._kernels = in_use()
        self._nodes = {node_here(): 0}
        self.count = how_many(self._resources, cap)
        self._arguments = (ray.put(app), num_clients, run_config, ray.get, node_here)
        for number in range(self.count):
            self.pool.append(self._start(number))

    def end(self) -> None:
        """End all of them."""
        for worker in self.pool:
            worker.kill()
            worker.actor = worker.starting = worker.serving = None
        self.pool.clear()
        for watch in self._watches.values():
            watch.end()
        self._watches.clear()
        self._arguments = ()

    def ask(self, node: int, pids: Sequence[int]) -> Mapping[int, Life | None] | None:
        """Ask about processes of another node, as `Vigil` does."""
        return self._watches[node].ask(pids)

    def _start(self, number: int) -> RayWorker:
        actor_class: Any = ray.remote(WorkerProcess)
        actor = actor_class.options(
            num_cpus=self._resources["num_cpus"],
            num_gpus=self._resources["num_gpus"],
            max_restarts=0,
            max_task_retries=0,
            runtime_env=_runtime_env(self._variables),
        ).remote(*self._arguments)
        line = None
        if self._sign is not None:
            with contextlib.suppress(OSError):
                line = Line()
        starting = actor.ready.remote(self._sign, None if line is None else line.name)
        return RayWorker(number, actor, starting, time.monotonic(), line=line)

    def await_one(self) -> None:
        """Return once one of them can work."""
        self.await_alike()
        if all(worker.starting is not None for worker in self.pool):
            self.await_start(self.pool[0])

    def await_alike(self) -> None:
        """Under portable bits, wait before the first work for all: one unlike them is found now."""
        if self._is_new and kernels.pinned() == "portable":
            self.await_all()
        self._is_new = False

    def await_all(self) -> None:
        """Return once all have started."""
        for worker in self.pool:
            if worker.starting is not None:
                self.await_start(worker)

    def await_start(self, worker: RayWorker) -> None:
        """Return once a worker has started.

        Raises:
            RunError: If it does not, or not in time.
        """
        left = self._startup_timeout_s - (time.monotonic() - worker.since)
        done, _ = ray.wait([worker.starting], timeout=max(left, 0))
        if not done:
            self._check_start(worker, limit=0)
        self.started(worker)

    def started(self, worker: RayWorker) -> None:
        """Take a worker in that has answered its start.

        Raises:
            RunError: If the answer is that it cannot work, or it breaks a promise about bits.
        """
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
            self._watches[worker.node] = NodeWatch(ready.node, self._startup_timeout_s)
        self._hold_to_promise(worker, ready.kernels)
        memory = "shares" if worker.near else "does not share"
        _log.info("%s is ready; it %s the driver's memory", worker, memory)
        if not ready.hears:
            worker.hang_up()
        if worker.line is not None:
            worker.line.joined()
            worker.serving = worker.actor.serve.remote()

    def _hold_to_promise(self, worker: RayWorker, there: Mapping[str, str]) -> None:
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
            self._incidents.append(
                f"{worker} computes with other kernels than this process ({unlike}): the last bits "
                "of the result depend on who trained what; [engine] bits = 'portable' are alike"
            )

    def still_starting(self, worker: RayWorker) -> None:
        """Look at one that has not started yet: whether its place is gone, or its time over.

        Raises:
            RunError: If its time is over.
        """
        waits = worker.starting is not None
        slow = time.monotonic() - worker.since > _SLOW_START_S
        if waits and not (slow and self._gave_up(worker)):
            self._check_start(worker, self._startup_timeout_s)

    def _check_start(self, worker: RayWorker, limit: float) -> None:
        waited = time.monotonic() - worker.since
        if waited > limit:
            raise RunError(
                f"worker {worker.number} of {self.count} did not start within {waited:.0f} s: the "
                f"Ray cluster has {ray.available_resources().get('CPU', 0):g} of "
                f"{ray.cluster_resources().get('CPU', 0):g} CPUs free and a worker asks for "
                f"{self._resources['num_cpus']:g}; free some, or lower [engine] workers"
            )

    def replace(self, worker: RayWorker) -> None:
        """End a worker for good and start another in its place, if there is room for one."""
        worker.kill()
        if worker.near:  # a native call that hangs does not hear Ray
            life.end(worker.pid, worker.begun)
        if self._gave_up(worker):
            return
        fresh = self._start(worker.number)
        worker.actor, worker.starting, worker.since = fresh.actor, fresh.starting, fresh.since
        worker.pid, worker.node, worker.near = 0, -1, False
        worker.line, worker.serving = fresh.line, None

    def _gave_up(self, worker: RayWorker) -> bool:
        """Go on without a worker for which the cluster has lost its place, if others are left."""
        places = room(self._resources)
        if len(self.pool) < 2 or places >= len(self.pool):
            return False
        worker.kill()
        self.pool.remove(worker)
        self.count = len(self.pool)
        self._incidents.append(
            f"{worker} is not replaced: the Ray cluster has room for {places} since a "
            f"node has left; {self.count} go on"
        )
        return True


def require_sendable(app: ClientApp) -> None:
    """Refuse an app that no worker can be sent, before Ray starts.

    Raises:
        ScenarioError: With the reason.
    """
    try:
        ray.cloudpickle.dumps(app)
    except Exception as error:
        raise ScenarioError(
            "what clients run cannot be sent to worker processes "
            f"({type(error).__name__}: {in_words(error)}); put what is named of '__main__' into a "
            "module, or use [engine] kind = 'inline'"
        ) from error


def _runtime_env(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """What the environment of worker processes has besides the driver's."""
    return {"env_vars": dict(variables)} if variables else None
