"""One run over a Grid: fedsim's engine, or real nodes."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.serverapp import Grid

from fedsim.basics.freed_memory import keep_freed_memory
from fedsim.basics.json_files import taking, write_json_atomic
from fedsim.basics.locks import one_at_a_time
from fedsim.basics.threads import pinned_threads
from fedsim.engine.grid import LocalGrid
from fedsim.federation.bounds import Bounds
from fedsim.federation.grids.absence import AbsenceGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.attack import AttackGrid
from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.federation.grids.clock import ClockGrid
from fedsim.federation.grids.devices import DeviceGrid
from fedsim.federation.grids.retries import RetryGrid
from fedsim.runs.client_settings import ClientSettings, SettingsWatch
from fedsim.runs.clocked import outermost
from fedsim.runs.evaluation_data import (
    local_clients,
    on_moved_samples,
    on_pooled_splits,
    on_the_test_set,
)
from fedsim.runs.folder import RunFolder
from fedsim.runs.hooks import ProgressHook, TensorBoardHook, WatchHook
from fedsim.runs.loop import RoundLoop
from fedsim.runs.policy import EarlyStop, Policy
from fedsim.runs.recorder import Recorder
from fedsim.runs.round_report import Hook
from fedsim.runs.summary import summarise
from fedsim.runs.world import World

if TYPE_CHECKING:
    from fedsim.runs.profile import Profile
    from fedsim.runs.progress import Progress

_log = logging.getLogger("fedsim")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: Where everything lies.
        summary: The content of `summary.json`.
    """

    folder: Path
    summary: dict[str, Any]


def execute(
    world: World,
    folder: RunFolder,
    grid: Grid,
    *,
    seed: int | None,
    progress: "Progress | None" = None,
    extra_hooks: Sequence[Hook] = (),
    profile: "Profile | None" = None,
) -> RunResult:
    """Run a built scenario over a grid that offers all clients: an engine, or real nodes.

    Args:
        world: The scenario, built.
        folder: Where results go; if it holds a checkpoint, the run goes on from there.
        grid: fedsim's engine, or Flower's grid behind a `PartitionGrid`.
        seed: For strategies that draw from global generators; None in a deployment.
        progress: Shows how far it is.
        extra_hooks: Told of every round after the run's own.
        profile: Learns where the time goes.
    """
    world.scenario.open_folders()
    lock = folder.file("lock")
    busy = f"{folder.path}: this run is still going on in another process; wait for it or end it"
    with one_at_a_time(lock, making=taking(lock), busy=busy):
        return _execute(world, folder, grid, seed, progress, extra_hooks, profile)


def _execute(
    world: World,
    folder: RunFolder,
    grid: Grid,
    seed: int | None,
    progress: "Progress | None",
    extra_hooks: Sequence[Hook],
    profile: "Profile | None",
) -> RunResult:
    begun = time.monotonic()
    tell = _teller(progress)
    engine = grid if isinstance(grid, LocalGrid) else None
    wrapped = outermost(wrapped_grid(grid, world), world, engine)
    clock = wrapped if isinstance(wrapped, ClockGrid) else None
    recorder = Recorder(world, folder, engine, begun, tell, clock)
    try:
        arrays, first_round, history = recorder.take_up()
        hooks: list[Hook] = [recorder, WatchHook(world.scenario, tell), *extra_hooks]
        if world.scenario.output.tensorboard:
            hooks.append(TensorBoardHook(folder.path / "tensorboard", first_round))
        if progress is not None:
            progress.start(first_round)
            hooks.append(ProgressHook(progress))
        if first_round == 1:
            for note in world.notes:
                tell(note)
        if profile is not None:
            if engine is not None:
                profile.watch(engine, world.plan)
            hooks = [profile.timing(hooks)]
        loop = _loop(world, wrapped, seed, hooks, history, tell)
        keep_freed_memory()
        with pinned_threads():
            arrays = loop.run(arrays, first_round=first_round)
        recorder.finish(loop.history[-1]["round"] if loop.history else 0, arrays)
        if _asked_in_vain(loop.history):
            tell("no client replied in any round: the model is the one that the run began with")
    finally:
        if progress is not None:
            progress.stop()
        recorder.close()
    if profile is not None:
        with taking(folder.file("profile.json")):
            write_json_atomic(folder.file("profile.json"), profile.report())
    summary = summarise(world, folder, loop, arrays, recorder.elapsed_s, recorder.best)
    return RunResult(folder.path, summary)


def _loop(
    world: World,
    grid: Grid,
    seed: int | None,
    hooks: Sequence[Hook],
    history: list[dict[str, Any]],
    tell: Callable[[str], None],
) -> RoundLoop:
    """The round loop that a scenario describes, over a grid with its wrappers."""
    scenario, engine = world.scenario, world.scenario.engine
    stop, sites = scenario.evaluation.stop, scenario.deployment
    required = frozenset() if sites is None else frozenset(sites.required)
    is_tested = not world.personal and len(world.data.test.targets) > 0
    return RoundLoop(
        strategy=world.strategy,
        grid=grid,
        num_rounds=scenario.rounds,
        evaluate=on_the_test_set(world) if is_tested else None,
        pooled=on_pooled_splits(world) if scenario.evaluation.pooled else None,
        robust=on_moved_samples(world) if is_tested else None,
        kept=world.kept,
        evaluate_every=scenario.evaluation.every,
        local_clients=local_clients(world),
        policy=Policy(engine.on_failure, engine.min_replies, engine.quorum, required),
        early_stop=EarlyStop(stop.metric, stop.target, stop.patience, stop.mode) if stop else None,
        round_timeout_s=engine.round_timeout_s,
        seed=seed,
        hooks=hooks,
        history=history,
        watch=SettingsWatch(
            ClientSettings(scenario.choices["client"]), type(world.strategy).__name__, tell
        ),
    )


def _asked_in_vain(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether clients were selected and none ever replied."""
    asked = any(record.get("clients/selected") for record in history)
    return asked and not any(record.get("clients/replied") for record in history)


def _teller(progress: "Progress | None") -> Callable[[str], None]:
    """Return what writes a warning into the log, and on the terminal when there is progress."""

    def tell(text: str) -> None:
        _log.warning("%s", text)
        if progress is not None:
            progress.note(text)

    return tell


def wrapped_grid(grid: Grid, world: World) -> Grid:
    """Return the grid with all in it that stands between the selected clients and the strategy."""
    engine, clock = world.scenario.engine, world.scenario.clock
    # a clock that waits for nobody tells each job what its device does
    devices = world.devices if clock is None or clock.trigger == "all" else None
    if devices is not None:
        grid = AbsenceGrid(grid, devices)
    # the engine counts the samples itself; what a node says is held against its partition
    sizes = None if isinstance(grid, LocalGrid) else world.data.sizes
    bounds = Bounds(sizes, world.scenario.admission)
    grid = AdmissionGrid(_attacked(ByteCountingGrid(grid), world), world.layout, bounds)
    if engine.on_failure == "retry":
        grid = RetryGrid(grid, engine.retries)
    return grid if devices is None else DeviceGrid(grid, devices)


def _attacked(grid: Grid, world: World) -> Grid:
    """The grid with the scenario's attackers in it."""
    if world.attack is None:
        return grid
    return AttackGrid(grid, world.attack, world.layout, seed=world.scenario.seed)
