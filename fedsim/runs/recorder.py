"""The hook that writes a run folder: metrics, participation, chunks, checkpoints."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.basics.errors import CheckpointError, FedsimError
from fedsim.basics.json_files import JsonLines
from fedsim.basics.kernels_in_use import decisive
from fedsim.basics.versions import versions
from fedsim.engine.grid import LocalGrid
from fedsim.federation.grids.clock import ClockGrid
from fedsim.messages.records import array_record, named_tensors
from fedsim.runs import checkpoint as checkpoints
from fedsim.runs.best_model import BestModel
from fedsim.runs.checkpoint import Checkpoint
from fedsim.runs.folder import RunFolder
from fedsim.runs.places import paths_kept
from fedsim.runs.round_report import RoundReport
from fedsim.runs.strategy_memory import RunMemory
from fedsim.runs.world import World

_log = logging.getLogger("fedsim")
_GROWING = ("metrics.jsonl", "participation.jsonl", "chunks.jsonl")
_LOCAL = "local.jsonl"  # grows too, with [evaluation] per_client


class Recorder:
    """Writes what a run records, and reads it back when the run goes on.

    Attributes:
        best: The best model so far.

    Args:
        world: What is run.
        folder: Where it is written.
        engine: fedsim's engine, whose chunks and clients' states are kept; None on real nodes.
        begun: `time.monotonic()` when the run, or this part of it, began.
        tell: Called with what a user should know.
        clock: The virtual clock of the run, whose jobs under way are kept; None without one.
    """

    def __init__(
        self,
        world: World,
        folder: RunFolder,
        engine: LocalGrid | None,
        begun: float,
        tell: Callable[[str], None],
        clock: ClockGrid | None = None,
    ) -> None:
        self._world, self._folder, self._engine, self._clock = world, folder, engine, clock
        growing = (*_GROWING, *([_LOCAL] if world.scenario.evaluation.per_client else []))
        self._files = {name: JsonLines(folder.file(name)) for name in growing}
        self._memory = RunMemory(world.strategy, world.make_strategy, tell)
        self._begun, self._before_s = begun, 0.0
        self._place = folder.path / checkpoints.FOLDER
        self._saved_round = -1
        self.best = BestModel(self._place, world.scenario.evaluation.keep_best)
        # what is portable may go on on another kind of processor
        self._versions = decisive(versions(), world.scenario.promise)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds the run has taken, over all its resumptions."""
        return self._before_s + time.monotonic() - self._begun

    def take_up(self) -> tuple[ArrayRecord, int, list[dict[str, Any]]]:
        """Return (model, first round to run, records so far), from the last checkpoint if any."""
        place = checkpoints.latest(self._place)
        if place is None:
            recorded = [name for name, file in self._files.items() if file.offset]
            if recorded:
                raise CheckpointError(
                    f"{self._folder.path}: {recorded[0]} holds records but no checkpoint is left "
                    "to go on from; keep the folder as it is and start a new run"
                )
            if self._engine is not None:
                self._engine.store.restore([], {})  # it may have served another run
            if self._clock is not None:
                self._clock.restore({}, {})
            self._save(0, self._world.arrays)
            self._written()
            self._memory.look(0, self._saved_round)
            return self._world.arrays, 1, []
        saved = checkpoints.load(place)
        checkpoints.require(
            saved,
            place,
            scenario_sha256=self._world.scenario.sha256,
            plan=self._world.plan.to_json(),
            versions=self._versions,
        )
        for name, file in self._files.items():
            file.truncate(saved.offsets[name])
        with paths_kept(self._world.strategy, self._world.scenario, self._folder):
            self._memory.restore(saved.strategy)
        self._world.participation.restore(saved.participation)
        if self._engine is not None:
            self._engine.store.restore(saved.clients, saved.client_state)
        if self._clock is not None:
            self._clock.restore(saved.clock, saved.clock_tensors)
        self._before_s, self._saved_round = saved.elapsed_s, saved.server_round
        history = JsonLines.read(self._folder.file("metrics.jsonl"))
        self.best.take_up(history)
        _log.info("resumed from %s", place.name)
        return array_record(saved.model), saved.server_round + 1, history

    def round_ended(self, report: RoundReport) -> None:
        """Record a round, and checkpoint when it is time."""
        record = {"round": report.server_round, **report.metrics}
        self._files["metrics.jsonl"].append(record)
        self.best.round_ended(record, report.arrays)
        if report.server_round or report.selected:
            failed = {str(f.client_id): f.cause for f in report.failures}
            took_part = {"round": report.server_round, "selected": list(report.selected)}
            self._files["participation.jsonl"].append(
                {**took_part, "failed": failed, **report.record}
            )
        if _LOCAL in self._files:
            for each in report.local:
                self._files[_LOCAL].append({"round": report.server_round, **each})
        self.drain()
        if self._writing is not None and self._writing.done():
            self._written()  # or what went wrong with it
        if not report.server_round:
            return
        saves = report.server_round % self._world.scenario.checkpoint.every == 0
        if not saves or report.server_round == 1:
            self._memory.look(report.server_round, self._saved_round)
        if saves:
            self._save(report.server_round, report.arrays)

    def drain(self) -> None:
        """Write down what the engine has noted so far."""
        if self._engine is not None:
            self._files["chunks.jsonl"].extend(self._engine.chunk_log)
            self._engine.chunk_log.clear()
            for incident in self._engine.incidents:
                _log.warning("%s", incident)
            self._engine.incidents.clear()

    def finish(self, last_round: int, arrays: ArrayRecord) -> None:
        """Checkpoint the end of the run.

        Args:
            last_round: The last round that was run; 0 for none.
            arrays: The model after it.
        """
        if last_round != self._saved_round:
            self._save(last_round, arrays)
        self._written()
        if (best := self.best.unwritten()) is not None:  # the end has no checkpoint, which was said
            self.best.write(*best)

    def close(self) -> None:
        """Write down what is left, a checkpoint in the making too, whatever ends the run."""
        try:
            self.drain()
        finally:
            try:
                self._written()
            except FedsimError as error:  # it is something else that ends the run, and is said
                _log.warning("%s", error)
            self._writer.shutdown()
            for file in self._files.values():
                file.close()

    def _written(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            RunError: If the disk does not take it, or what it counts.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _save(self, server_round: int, arrays: ArrayRecord) -> None:
        """Begin to write a checkpoint: the disk works while the next rounds are computed."""
        self._written()
        strategy = self._memory.state(self._saved_round) if server_round else {}
        if strategy is None:
            return  # said; the run goes on and can be resumed from before
        world = self._world
        clients, states = self._engine.store.export() if self._engine is not None else ([], {})
        clock, sent = ({}, {}) if self._clock is None else self._clock.state()
        packed = checkpoints.pack(
            Checkpoint(
                server_round=server_round,
                scenario_sha256=world.scenario.sha256,
                plan=world.plan.to_json(),
                versions=self._versions,
                model=named_tensors(arrays),
                strategy=strategy or None,
                clients=clients,
                client_state=states,
                participation=world.participation.state(),
                clock=clock,
                clock_tensors=sent,
                offsets={name: file.offset for name, file in self._files.items()},
                elapsed_s=self.elapsed_s,
            )
        )
        self._writing = self._writer.submit(self._write, packed, self.best.unwritten())
        self._saved_round = server_round

    def _write(
        self, packed: checkpoints.Packed, best: tuple[int, dict[str, Tensor]] | None
    ) -> Path:
        for file in self._files.values():
            file.sync()  # a checkpoint must not count bytes that a power cut can take away
        if best is not None:
            self.best.write(*best)
        place = checkpoints.write(self._place, packed, keep=self._world.scenario.checkpoint.keep)
        self.best.keep_for(checkpoints.rounds(self._place))
        return place
