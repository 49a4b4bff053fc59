"""Signs of life of workers of other machines."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.engine.life import Life, WorkerWatch
from fedsim.engine.ray.installed import ray


class NodeWatch:
    """Asks a process of its own on some node about the workers there; waits for no answer.

    Args:
        node: Ray's name of the node.
        startup_timeout_s: Seconds that the process may take to start.
    """

    def __init__(self, node: str, startup_timeout_s: float) -> None:
        self._node, self._startup_timeout_s = node, startup_timeout_s
        self._start()

    def _start(self) -> None:
        actor_class: Any = ray.remote(WorkerWatch)
        strategies = ray.util.scheduling_strategies
        there = strategies.NodeAffinitySchedulingStrategy(self._node, soft=False)
        self._actor = actor_class.options(num_cpus=0, scheduling_strategy=there).remote()
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
