"""Worker processes that serve one grid after another, for the tests that change nothing about them.

A worker takes seconds of a processor to start, nearly all of them to import torch and Ray. Here a
grid that ends gives its workers back, and the next one takes them over with its own app, line and
memory. All else is the engine's own: a worker that is lost or ended in mid-work is really ended,
and replaced by a process of its own.
"""

import contextlib
import functools
import time
from typing import NamedTuple

import pytest
import ray

from fedsim.engine.pipe import Line
from fedsim.engine.ray.grid import RayGrid
from fedsim.engine.ray.workers import RayWorker, Workers
from tests.engine.ray.lent_process import LentProcess

_REST_S = 30.0  # how long one may take to come to rest


class Resting(NamedTuple):
    """A worker that no grid has: Ray's handle, and the variables that it was started with."""

    actor: object
    variables: dict


class LentWorkers(Workers):
    """Workers of a grid that come from a lender where it has some, and go back to it."""

    def __init__(self, lender, *arguments):
        super().__init__(*arguments)
        self._lender = lender
        self._watches = lender.watches  # by node, and the tests' cluster has one

    def _start(self, number):
        actor = self._lender.take(self._variables)
        if actor is None:
            return self._start_process(number)
        line = None if self._sign is None else Line()
        starting = actor.ready_anew.remote(
            self._sign, None if line is None else line.name, *self._arguments
        )
        return RayWorker(number, actor, starting, time.monotonic(), line=line)

    def _start_process(self, number):
        """Start one that takes nothing of the cluster: between two grids it is in nobody's way."""
        asked, self._resources = self._resources, {"num_cpus": 0, "num_gpus": 0}
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fedsim.engine.ray.workers.WorkerProcess", LentProcess)
                return super()._start(number)
        finally:
            self._resources = asked

    def end(self):
        for worker in self.pool:
            worker.hang_up()
        self.pool = [w for w in self.pool if not self._lender.give_back(w, self._variables)]
        self._watches = {}
        super().end()


class Lender:
    """Has the workers that no grid has at the moment.

    Attributes:
        watches: The processes that look at workers which do not share the driver's memory, by node.
    """

    def __init__(self):
        self.watches = {}
        self._resting = []

    def take(self, variables):
        """Return a worker that was started with these variables; None if there is none."""
        alike = [one for one in self._resting if one.variables == dict(variables)]
        if not alike:
            return None
        self._resting.remove(alike[-1])  # the one that came back last
        return alike[-1].actor

    def give_back(self, worker, variables):
        """Take a worker back whose line has ended; returns whether it is well."""
        try:
            if worker.starting is not None:
                ray.get(worker.starting, timeout=_REST_S)
            ray.get(worker.actor.rest.remote(), timeout=_REST_S)
        except ray.exceptions.RayError:  # it did not start, has died, or is still at work
            return False
        self._resting.append(Resting(worker.actor, dict(variables)))
        return True

    @contextlib.contextmanager
    def lending(self, workers=LentWorkers):
        """Let the grids that begin in here have lent workers, of this kind."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedsim.engine.ray.grid.Workers", functools.partial(workers, self))
            yield

    def grid(self, *arguments, kind=LentWorkers, **named):
        """Make a `RayGrid` with these arguments on lent workers, of this kind."""
        with self.lending(kind):
            return RayGrid(*arguments, **named)

    def close(self):
        """End the workers."""
        for one in self._resting:
            ray.kill(one.actor, no_restart=True)
        for watch in self.watches.values():
            watch.end()
        self._resting.clear()
