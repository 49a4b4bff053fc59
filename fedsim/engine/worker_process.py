"""What runs in a worker's process: it does one piece of work at a time.

How work reaches it (a pipe, or a call of Ray's) and where what all clients share lies (the driver's
memory, or Ray's object store) is the driver's to say, for each worker.
"""

import contextlib
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fedsim.basics.loading import loads

with loads("a worker"):
    import torch
    from flwr.clientapp import ClientApp

from fedsim.basics.freed_memory import keep_freed_memory
from fedsim.basics.kernels_in_use import in_use
from fedsim.engine import life
from fedsim.engine.pipe import LineName, UnspeakableError, WorkerLine
from fedsim.engine.shared_memory import ArenaName, ArenaPlace, ArenaView, Sign
from fedsim.engine.work import ChunkWork, Runner, Work, describe
from fedsim.messages.layout import Payload, rows_at


@dataclass(frozen=True)
class Broadcast:
    """What all members of a call's chunks receive, and how a worker finds it.

    Attributes:
        number: Never given twice by a driver.
        arena: The driver's memory in which it lies, at `places`.
        places: Where in the arena.
        value: The thing itself.
        stored: A list of one reference of Ray's to it. It must not go through a pipe: Ray then
            does not know that the worker has it, and the worker waits for it for ever.
    """

    number: int
    arena: ArenaName | None = None
    places: list[ArenaPlace] = field(default_factory=list)
    value: Payload | None = None
    stored: Any = None


@dataclass(frozen=True)
class Raised:
    """A client's exception in words: the exception itself may not survive the way to the driver."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Results:
    """Where results go: an arena that holds `[rows, dim]`."""

    arena: ArenaName
    dtype: torch.dtype
    shape: tuple[int, int]


class Ready(NamedTuple):
    """What a worker says of itself once it can work.

    Attributes:
        pid: Its process id, as its own machine counts.
        begun: When that process began, as `Life` has it; 0 if its system does not say.
        node: Ray's name of its node.
        near: Whether it maps the driver's memory.
        hears: Whether it hears the driver's line.
        kernels: What decides its bits, as `kernels_in_use.in_use` has it.
    """

    pid: int
    begun: int
    node: str
    near: bool
    hears: bool
    kernels: dict[str, str]


class WorkerProcess:
    """Runs in a Ray worker process and does one piece of work at a time.

    Args:
        app: The ClientApp.
        num_clients: N, for the clients' node configuration.
        run_config: The run's configuration, for the clients' contexts.
        fetch: Returns what a reference of Ray's stands for.
        place: Returns Ray's name of the node on which it is called.
    """

    def __init__(
        self,
        app: ClientApp,
        num_clients: int,
        run_config: Mapping[str, Any],
        fetch: Callable[[Any], Any],
        place: Callable[[], str],
    ) -> None:
        torch.set_num_threads(1)
        self._runner = Runner(app, num_clients, run_config)
        self._fetch, self._place = fetch, place
        self._views: dict[ArenaName, ArenaView] = {}
        self._received: tuple[int, Payload] | None = None
        self._line: WorkerLine | None = None

    def ready(self, sign: Sign | None, line: LineName | None = None) -> Ready:
        """Get ready: from now on time counts for clients, so everything else is done before.

        Args:
            sign: By which it sees whether the driver's memory can be mapped here.
            line: The driver's pipes, for a worker that sees it.
        """
        keep_freed_memory()
        self._runner.prepare()
        near = sign is not None and sign.is_seen()
        if near and line is not None:
            with contextlib.suppress(OSError):
                self._line = WorkerLine(line)
        me = life.look(os.getpid())
        begun = 0 if me is None else me.begun
        hears = self._line is not None
        return Ready(os.getpid(), begun, self._place(), near, hears, in_use())

    def serve(self) -> None:
        """Do what the driver says over its line until it says nothing more."""
        assert self._line is not None
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                try:
                    self._line.send(self.work(*self._line.receive()))
                except UnspeakableError as error:  # its client's fault
                    self._line.send(Raised(str(error), traceback.format_exc()))

    def work(self, work: Work, broadcast: Broadcast | None, results: Results | None) -> Any:
        """Do one piece of work; a chunk's parameters go into the arena when there is one."""
        try:
            return self._work(work, broadcast, results)
        except (Exception, SystemExit) as error:  # a client's own code: named by the driver
            return Raised(describe(error), traceback.format_exc())

    def _work(self, work: Work, broadcast: Broadcast | None, results: Results | None) -> Any:
        if not isinstance(work, ChunkWork):
            return self._runner.message(work)
        assert broadcast is not None
        out = None
        if results is not None and not work.alone:
            rows = self._view(results.arena).tensor(results.dtype, results.shape)
            out = rows_at(rows, work.places)
        job = replace(work.job, shared=self._shared(broadcast))
        result = self._runner.chunk(job, out)
        return replace(result, params=None) if out is not None or work.alone else result

    def _shared(self, broadcast: Broadcast) -> Payload:
        if broadcast.arena is not None:
            return self._view(broadcast.arena).read(broadcast.places)
        if broadcast.value is not None:
            return broadcast.value
        if self._received is None or self._received[0] != broadcast.number:
            # the argument held a nested reference, so that one worker fetches it once per call
            self._received = (broadcast.number, self._fetch(broadcast.stored[0]))
        return self._received[1]

    def _view(self, name: ArenaName) -> ArenaView:
        if name not in self._views:
            if len(self._views) > 8:
                self._views.clear()
            self._views[name] = ArenaView(name)
        return self._views[name]
