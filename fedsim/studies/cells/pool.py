"""Runs cells in processes of their own, as many at a time as the machine has room for."""

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from fedsim.basics.json_files import taking
from fedsim.basics.kernels import Bits, environment
from fedsim.basics.machine import usable_processors
from fedsim.basics.project import plain_path
from fedsim.runs.folder import LOG_FILE
from fedsim.studies.cells.cell import Cell
from fedsim.studies.cells.machine import has_room

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fedsim.studies.cells.worker import main; main()"
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_END_S = 5.0  # seconds that a process may take to end when it is asked to


class CellWatch(Protocol):
    """Is told how far the cells are."""

    def begun(self, cell: Cell) -> None:
        """A cell is being run."""

    def at_round(self, cell: Cell, server_round: int) -> None:
        """A round of it is done."""

    def ended(self, cell: Cell, reason: str | None) -> None:
        """It has finished, or failed for a reason."""


class _PoolWorker:
    """A process, the promise about bits that it keeps, and the cell that it runs."""

    def __init__(
        self, bits: Bits, errors: IO[bytes], answers: "queue.SimpleQueue[_Answer]"
    ) -> None:
        self.bits = bits
        self.cell: Cell | None = None
        self.fresh = True  # it has not said yet how much memory it takes
        self.ending = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(plain_path())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**environment(bits), **dict.fromkeys(_THREADS, "1")},
            start_new_session=True,  # an interrupt of the terminal's is for the parent alone
        )
        self._reader = threading.Thread(target=self._listen, args=(answers,), daemon=True)
        self._reader.start()

    def give(self, cell: Cell) -> None:
        """Let it run a cell."""
        self.cell = cell
        scenario = cell.scenario
        job = {
            "folder": str(cell.folder),
            "scenario": scenario.resolved(),
            "origin": scenario.origin,
            "code": cell.code,
        }
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told by the reader
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Close its input, upon which it ends at once."""
        self.ending = True
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def wait(self, seconds: float) -> int:
        """Wait until it has ended, or kill it; returns its code."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join()
        self.end()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def _listen(self, answers: "queue.SimpleQueue[_Answer]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answers.put((self, json.loads(line)))
        answers.put((self, None))


_Answer = tuple[_PoolWorker, Mapping[str, Any] | None]


class Pool:
    """Processes that run cells, those that were begun from their last checkpoint.

    Each runs one cell after another in one thread; a process that dies takes its cell with it and
    no other. Used as a context, at whose end they end, in the middle of a cell too.

    Args:
        workers: At most so many processes; None takes as many as there are processors, one for
            cells on a graphics card. There are fewer where memory is short.
        study: The study's folder, whose log takes what the processes write to standard error.
        watch: Is told how far they are.
    """

    def __init__(self, study: Path, *, workers: int | None, watch: CellWatch) -> None:
        self._asked, self._watch = workers, watch
        with taking(study / LOG_FILE):
            self._errors = (study / LOG_FILE).open("ab")
        self._then: Callable[[Cell], object] | None = None
        self._waiting: list[Cell] = []
        self._workers: list[_PoolWorker] = []
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._failed: dict[Path, str] = {}
        self._refused: set[Path] = set()
        self._largest = 0

    def run(
        self, cells: Sequence[Cell], then: Callable[[Cell], object] | None = None
    ) -> dict[Path, str]:
        """Run cells; returns why some failed, by folder.

        Args:
            cells: What is to be run.
            then: Called with the first one that finishes; what it raises ends all.
        """
        self._waiting, self._failed, self._then = list(cells), {}, then
        limit = self._limit(cells)
        while self._waiting or any(worker.cell is not None for worker in self._workers):
            self._assign(limit)
            self._take(*self._answers.get())
        return self._failed

    @property
    def refused(self) -> frozenset[Path]:
        """The folders of cells that failed for their scenario was refused when it was built."""
        return frozenset(self._refused)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.end()
        deadline = time.monotonic() + _END_S
        for worker in self._workers:
            worker.wait(max(0.0, deadline - time.monotonic()))
        self._errors.close()

    def _limit(self, cells: Sequence[Cell]) -> int:
        if self._asked is not None:
            return self._asked
        card = any(cell.scenario.engine.device != "cpu" for cell in cells)
        return 1 if card else usable_processors()

    def _assign(self, limit: int) -> None:
        """Give work to who is idle, and start as many more as limit and memory allow.

        An idle process whose kernels are pinned for other cells makes room for one that is not.
        """
        idle = [each for each in self._workers if each.cell is None and not each.ending]
        for worker in idle:
            if self._waiting and worker.bits == self._waiting[0].scenario.engine.bits:
                self._give(worker)
            elif self._waiting:
                worker.end()
        while self._waiting and len(self._workers) < limit:
            starting = sum(worker.fresh for worker in self._workers)
            if self._workers and not has_room(self._largest, starting):
                return
            bits = self._waiting[0].scenario.engine.bits
            worker = _PoolWorker(bits, self._errors, self._answers)
            self._workers.append(worker)
            self._give(worker)

    def _give(self, worker: _PoolWorker) -> None:
        cell = self._waiting.pop(0)
        self._watch.begun(cell)
        worker.give(cell)

    def _take(self, worker: _PoolWorker, answer: Mapping[str, Any] | None) -> None:
        cell = worker.cell
        if answer is None:
            self._workers.remove(worker)
            code = worker.wait(_END_S)
            if cell is not None:
                self._ended(worker, cell, _in_words(code))
            return
        assert cell is not None
        if answer["event"] == "round":
            self._watch.at_round(cell, int(answer["round"]))
            return
        self._largest, worker.fresh = max(self._largest, int(answer["peak"])), False
        if answer.get("refused"):
            self._refused.add(cell.folder)
        self._ended(worker, cell, answer.get("reason"))
        if len(self._workers) > 1 and not has_room(0, 0):
            worker.end()  # what it holds is wanted by the others

    def _ended(self, worker: _PoolWorker, cell: Cell, reason: str | None) -> None:
        worker.cell = None
        if reason is not None:
            self._failed[cell.folder] = reason
        self._watch.ended(cell, reason)
        if reason is None and self._then is not None:
            self._then(cell)
            self._then = None


def _in_words(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; memory may have run out: try fewer --workers" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"
