"""A run from scenario to summary: what `fedsim run` and `fedsim resume` do."""

import contextlib
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.basics.errors import CheckpointError, FedsimError
from fedsim.basics.json_files import JsonLines, read_json, taking, write_json_atomic
from fedsim.basics.kernels_in_use import decisive
from fedsim.basics.locks import one_at_a_time
from fedsim.basics.rng import generator
from fedsim.client.batching.poison import Trigger
from fedsim.engine.client_settings import ClientSettings, SettingsWatch
from fedsim.engine.grid import LocalGrid
from fedsim.engine.simulation import pinned_threads
from fedsim.federation.devices import AbsenceGrid, DeviceGrid
from fedsim.federation.grids.attack import AttackGrid
from fedsim.federation.grids.retries import RetryGrid
from fedsim.federation.grids.wrapper import AdmissionGrid, ByteCountingGrid, ParticipationGrid
from fedsim.federation.topology.picture import draw_topology
from fedsim.federation.topology.topology import Topology, edges_sha256, graph_statistics
from fedsim.messages.failures import Failure
from fedsim.messages.records import array_record, model_tensors, named_tensors
from fedsim.runs import checkpoint as checkpoints
from fedsim.runs import folder as run_folder
from fedsim.runs.checkpoint import Checkpoint
from fedsim.runs.folder import RunFolder
from fedsim.runs.left_behind import keep_places, take_up, where_it_was_run, write_code
from fedsim.runs.loop import EarlyStop, Hook, Policy, RoundLoop, RoundReport
from fedsim.runs.strategy_memory import RunMemory
from fedsim.runs.world import World, build
from fedsim.scenario.expectations import check_expectations
from fedsim.scenario.recorded_metrics import WatchHook
from fedsim.scenario.scenario import Scenario

if TYPE_CHECKING:
    import networkx as nx

    from fedsim.runs.profile import Profile
    from fedsim.runs.progress import Progress

_log = logging.getLogger("fedsim")
_GROWING = ("metrics.jsonl", "participation.jsonl", "chunks.jsonl")
_MANIFESTED = ("topology", "participation", "weights")  # besides the data
_LOCAL = "local.jsonl"  # grows too, with [evaluation] per_client


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: Where everything lies.
        summary: The content of `summary.json`.
    """

    folder: Path
    summary: dict[str, Any]


def start(
    scenario: Scenario,
    *,
    out: Path | str | None = None,
    workers: int | None = None,
    progress: "Progress | None" = None,
    profile: "Profile | None" = None,
) -> RunResult:
    """Run a scenario from the beginning.

    Args:
        scenario: What to run.
        out: The run folder; None makes one under `runs/`.
        workers: At most so many Ray workers; None takes the scenario's.
        progress: Shows how far it is.
        profile: Learns where the time goes; `profile.json` in the run folder then says it.

    Raises:
        ScenarioError: If the scenario cannot be built or the folder is taken.
        RunError: If the run fails; `fedsim resume` goes on from its last checkpoint.
    """
    with _starting(profile, "data, model and plan"):
        world = build(scenario, draws_seeded=True)
        folder = run_folder.create(None if out is None else Path(out), scenario)
        with folder.named_when_interrupted(), folder.recording():
            write_plan(world, folder)
    with folder.named_when_interrupted():
        return _run(world, folder, workers=workers, progress=progress, profile=profile)


def resume(
    run: Path | str,
    *,
    workers: int | None = None,
    overrides: Sequence[str] = (),
    progress: "Progress | None" = None,
) -> RunResult:
    """Go on with a run from its last checkpoint, as if it had never stopped.

    Args:
        run: The run folder.
        workers: At most so many Ray workers; None takes the scenario's.
        overrides: Assignments that do not change results, such as "engine.kind=inline", or that
            say where something lies that has been moved: "data.path=...", "modules=...".
        progress: Shows how far it is.

    Raises:
        ScenarioError: If the folder is not a run's, an override would change its result, something
            is no longer where it was, or code of the user's own has changed.
        CheckpointError: If the checkpoint is torn, foreign or incompatible.
        RunError: If the run fails again.
    """
    folder = run_folder.open_existing(Path(run))
    with folder.named_when_interrupted():
        scenario = take_up(folder, overrides)
        with where_it_was_run(folder):
            world = build(scenario, draws_seeded=True)
        _require_same_data(world, folder)
        keep_places(scenario, folder)
        if not (folder.file("plan.json").is_file() and folder.file("manifest.json").is_file()):
            write_plan(world, folder)
        return _run(world, folder, workers=workers, progress=progress)


def write_plan(world: World, folder: RunFolder) -> None:
    """Write the plan, the manifest of data and partition, and the code into a run folder."""
    for name, content in (
        ("plan.json", world.plan.to_json()),
        ("manifest.json", _manifest(world)),
    ):
        with taking(folder.file(name)):
            write_json_atomic(folder.file(name), content)
    write_code(world.code, folder)
    if world.topology is not None:
        graph = _first_graph(world, world.topology)
        title = f"{world.topology.kind}, {world.scenario.stem}"
        with taking(folder.file("topology.png")):
            draw_topology(graph, folder.file("topology.png"), title)


def _manifest(world: World) -> dict[str, Any]:
    """What the run is made of besides the scenario: data, partition, the first round's graph."""
    manifest = {**world.data.manifest, "sha256": world.data.manifest_sha256}
    if world.weights is not None:
        manifest["weights"] = world.weights
    if world.topology is not None:
        graph = _first_graph(world, world.topology)
        manifest["topology"] = {**graph_statistics(graph), "sha256": edges_sha256(graph)}
    if trace := world.participation.manifest():
        manifest["participation"] = trace
    return manifest


def _first_graph(world: World, topology: Topology) -> "nx.Graph":
    return topology.graph(world.data.num_clients, server_round=1, seed=world.scenario.seed)


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
    scenario = world.scenario
    begun = time.monotonic()
    wrapped = ParticipationGrid(wrapped_grid(grid, world), world.participation, seed=scenario.seed)
    growing = (*_GROWING, *([_LOCAL] if scenario.evaluation.per_client else []))
    files = {name: JsonLines(folder.file(name)) for name in growing}
    tell = _teller(progress)
    engine = grid if isinstance(grid, LocalGrid) else None
    keeper = _Keeper(world, folder, files, engine, begun, tell)
    try:
        arrays, first_round, history = keeper.take_up()
        hooks: list[Hook] = [keeper, WatchHook(scenario, tell), *extra_hooks]
        if scenario.output.tensorboard:
            from fedsim.runs.hooks import TensorBoardHook

            hooks.append(TensorBoardHook(folder.path / "tensorboard", first_round))
        if progress is not None:
            progress.start(first_round)
            hooks.append(_ProgressHook(progress))
        if first_round == 1:
            for note in world.notes:
                tell(note)
        if profile is not None:
            if isinstance(grid, LocalGrid):
                profile.watch(grid, world.plan)
            hooks = [profile.timing(hooks)]
        executor = world.app.executor
        stop = scenario.evaluation.stop

        triggered = triggered_samples(world)

        def evaluate(arrays: ArrayRecord) -> dict[str, float]:
            params, buffers = model_tensors(world.layout, arrays)
            test = world.data.test
            found = executor.evaluate_arrays(params, buffers, test.features, test.targets)
            if triggered is not None:
                taken = executor.evaluate_arrays(params, buffers, *triggered)
                # of a task that measures no accuracy it is not known
                found |= {"attack_success": taken["accuracy"]} if "accuracy" in taken else {}
            return found

        loop = RoundLoop(
            strategy=world.strategy,
            grid=wrapped,
            num_rounds=scenario.rounds,
            evaluate=evaluate,
            pooled=_pooled(world) if scenario.evaluation.pooled else None,
            kept=world.kept,
            evaluate_every=scenario.evaluation.every,
            local_clients=_local_clients(world),
            policy=Policy(
                scenario.engine.on_failure, scenario.engine.min_replies, scenario.engine.quorum
            ),
            early_stop=EarlyStop(stop.metric, stop.target, stop.patience, stop.mode)
            if stop
            else None,
            round_timeout_s=scenario.engine.round_timeout_s,
            seed=seed,
            hooks=hooks,
            history=history,
            watch=SettingsWatch(
                ClientSettings(scenario.client), type(world.strategy).__name__, tell
            ),
        )
        keeper.loop = loop
        with pinned_threads():
            arrays = loop.run(arrays, first_round=first_round)
        keeper.finish(arrays)
        if _asked_in_vain(loop.history):
            tell("no client replied in any round: the model is the one that the run began with")
    finally:
        if progress is not None:
            progress.stop()
        keeper.close()
    if profile is not None:
        with taking(folder.file("profile.json")):
            write_json_atomic(folder.file("profile.json"), profile.report())
    return RunResult(folder.path, _summarise(world, folder, loop, arrays, keeper.elapsed_s))


def _asked_in_vain(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether clients were selected and none ever replied."""
    asked = any(record.get("clients/selected") for record in history)
    return asked and not any(record.get("clients/replied") for record in history)


def triggered_samples(world: World) -> tuple[np.ndarray, np.ndarray] | None:
    """The server's test samples of other classes with a backdoor's pattern, and its target."""
    effect = None if world.attack is None else world.attack.effect
    if not isinstance(effect, Trigger):
        return None
    spec, test = world.data.spec, world.data.test
    others = np.flatnonzero(np.asarray(test.targets) != effect.target)
    features = effect.features(torch.from_numpy(np.asarray(test.features)[others]), spec)
    return features.numpy(), np.full(len(others), effect.target, dtype=test.targets.dtype)


def _teller(progress: "Progress | None") -> Callable[[str], None]:
    """Return what writes a warning into the log, and on the terminal when there is progress."""

    def tell(text: str) -> None:
        _log.warning("%s", text)
        if progress is not None:
            progress.note(text)

    return tell


def _pooled(world: World) -> Callable[[ArrayRecord], dict[str, float]]:
    """Return what measures a model on the local test splits of all clients together."""
    drawn = world.data.clients(range(world.data.num_clients), split="test")
    rows = np.concatenate([np.asarray(mine, dtype=np.int64) for mine in drawn.rows])

    def evaluate(arrays: ArrayRecord) -> dict[str, float]:
        params, buffers = model_tensors(world.layout, arrays)
        return world.app.executor.evaluate_arrays(
            params, buffers, drawn.features, drawn.targets, rows
        )

    return evaluate


def wrapped_grid(grid: Grid, world: World) -> Grid:
    """Return the grid with all in it that stands between the selected clients and the strategy."""
    engine, devices = world.scenario.engine, world.devices
    layout = world.layout if isinstance(grid, LocalGrid) else None
    if devices is not None:
        grid = AbsenceGrid(grid, devices, layout)
    grid = AdmissionGrid(_attacked(ByteCountingGrid(grid), world), world.layout)
    if engine.on_failure == "retry":
        grid = RetryGrid(grid, engine.retries, layout)
    return grid if devices is None else DeviceGrid(grid, devices)


def _attacked(grid: Grid, world: World) -> Grid:
    """The grid with the scenario's attackers in it."""
    if world.attack is None:
        return grid
    return AttackGrid(grid, world.attack, world.layout, seed=world.scenario.seed)


def _require_same_data(world: World, folder: RunFolder) -> None:
    """Refuse to go on when data, partition or graph are no longer what the run began with."""
    place = folder.file("manifest.json")
    if not place.is_file():
        return
    before, now = read_json(place), _manifest(world)
    for what, then, here in (
        ("data", before, now),
        *((n, before.get(n) or {}, now.get(n) or {}) for n in _MANIFESTED),
    ):
        if then.get("sha256") != here.get("sha256"):
            raise CheckpointError(
                f"{place}: the run began with {what} {str(then.get('sha256'))[:12]}, the same "
                f"scenario now gives {str(here.get('sha256'))[:12]}; bring the {what} back or "
                "start a new run"
            )


def _run(
    world: World,
    folder: RunFolder,
    *,
    workers: int | None,
    progress: "Progress | None",
    profile: "Profile | None" = None,
) -> RunResult:
    if "FLWR_LOG_LEVEL" not in os.environ:
        logging.getLogger("flwr").setLevel(logging.WARNING)  # progress says it all
    with folder.recording():
        _log.info("plan: %s", world.plan.to_json())
        with _starting(profile, "engine"):
            engine = make_grid(world, workers=workers)
        with engine as grid:
            return execute(
                world, folder, grid, seed=world.scenario.seed, progress=progress, profile=profile
            )


def _starting(profile: "Profile | None", part: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if profile is None else profile.starting(part)


def make_grid(world: World, *, workers: int | None = None) -> LocalGrid:
    """Return the engine that the scenario asks for."""
    engine = world.scenario.engine
    if engine.kind == "inline":
        from fedsim.engine.inline import InlineGrid

        return InlineGrid(world.app, world.data.num_clients, state_limit_mb=engine.state_limit_mb)
    from fedsim.engine.ray.grid import RayGrid

    return RayGrid(
        world.app,
        world.data.num_clients,
        workers=workers if workers is not None else engine.workers,
        client_resources=engine.client_resources.model_dump(),
        address=engine.address,
        client_timeout_s=engine.client_timeout_s,
        state_limit_mb=engine.state_limit_mb,
        startup_timeout_s=engine.startup_timeout_s,
        silence_timeout_s=engine.silence_timeout_s,
    )


class _Keeper:
    """Writes what a run records: metrics, participation, chunks, checkpoints."""

    def __init__(
        self,
        world: World,
        folder: RunFolder,
        files: dict[str, JsonLines],
        engine: LocalGrid | None,
        begun: float,
        tell: Callable[[str], None],
    ) -> None:
        self._world, self._folder, self._files, self._engine = world, folder, files, engine
        self._memory = RunMemory(world.strategy, world.make_strategy, tell)
        self._begun, self._before_s = begun, 0.0
        self._place = folder.path / checkpoints.FOLDER
        self._saved_round = -1
        # what is portable may go on on another kind of processor
        self._versions = decisive(run_folder.versions(), world.scenario.promise)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self.loop: RoundLoop | None = None

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
                    "to go "
                    "on from; keep the folder as it is and start a new run"
                )
            if self._engine is not None:
                self._engine.store.restore([], {})  # it may have served another run
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
        self._memory.restore(saved.strategy)
        self._world.participation.restore(saved.participation)
        if self._engine is not None:
            self._engine.store.restore(saved.clients, saved.client_state)
        self._before_s, self._saved_round = saved.elapsed_s, saved.server_round
        history = JsonLines.read(self._folder.file("metrics.jsonl"))
        _log.info("resumed from %s", place.name)
        return array_record(saved.model), saved.server_round + 1, history

    def round_ended(self, report: RoundReport) -> None:
        """Record a round, and checkpoint when it is time."""
        self._files["metrics.jsonl"].append({"round": report.server_round, **report.metrics})
        if report.server_round or report.selected:
            failed = {str(f.client_id): f.cause for f in report.failures}
            record = {"round": report.server_round, "selected": list(report.selected)}
            self._files["participation.jsonl"].append({**record, "failed": failed, **report.record})
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

    def finish(self, arrays: ArrayRecord) -> None:
        """Checkpoint the end of the run."""
        assert self.loop is not None
        last = self.loop.history[-1]["round"] if self.loop.history else 0
        if last != self._saved_round:
            self._save(last, arrays)
        self._written()

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
        clients, memories = self._engine.store.export() if self._engine is not None else ([], {})
        packed = checkpoints.pack(
            Checkpoint(
                server_round=server_round,
                scenario_sha256=world.scenario.sha256,
                plan=world.plan.to_json(),
                versions=self._versions,
                model=named_tensors(arrays),
                strategy=strategy or None,
                clients=clients,
                client_state=memories,
                participation=world.participation.state(),
                offsets={name: file.offset for name, file in self._files.items()},
                elapsed_s=self.elapsed_s,
            )
        )
        self._writing = self._writer.submit(self._write, packed)
        self._saved_round = server_round

    def _write(self, packed: checkpoints.Packed) -> Path:
        for file in self._files.values():
            file.sync()  # a checkpoint must not count bytes that a power cut can take away
        return checkpoints.write(self._place, packed, keep=self._world.scenario.checkpoint.keep)


class _ProgressHook:
    """Shows rounds to whoever watches."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress

    def round_ended(self, report: RoundReport) -> None:
        """Update the display and note failures by name."""
        metrics = report.metrics
        if report.server_round:
            self._progress.update(
                report.server_round,
                metrics,
                done=metrics["clients/replied"],
                failed=metrics["clients/failed"],
                absent=metrics["clients/absent"],
            )
        for failure in _first(report.failed):
            self._progress.note(str(failure))


def _first(failures: Sequence[Failure], limit: int = 3) -> Iterator[Failure]:
    yield from failures[:limit]


def _local_clients(world: World) -> np.ndarray | None:
    """The clients that evaluate locally: a sample fixed for the run."""
    count, total = world.scenario.evaluation.clients, world.data.num_clients
    if not count:
        return None
    random = generator(world.scenario.seed, "local evaluation")
    return np.sort(random.choice(total, size=min(count, total), replace=False, shuffle=False))


def _summarise(
    world: World, folder: RunFolder, loop: RoundLoop, arrays: ArrayRecord, elapsed_s: float
) -> dict[str, Any]:
    from safetensors.torch import save

    model = named_tensors(arrays)
    _write_bytes(folder.file("params.safetensors"), save(model))
    final: dict[str, Any] = {}
    for record in loop.history:
        # what is not measured in every round stands as it was last; who failed is of the last alone
        final = {k: v for k, v in final.items() if not k.startswith("clients/")}
        final.update(
            {k: v for k, v in record.items() if k != "round" and not k.startswith("time/")}
        )
    summary: dict[str, Any] = {
        "rounds": loop.history[-1]["round"] if loop.history else 0,
        "stopped": loop.stopped,
        "final": final,
        "params_sha256": params_sha256(model),
        "participation_sha256": participation_sha256(folder.file("participation.jsonl")),
        "partition_sha256": world.data.manifest_sha256,
        "scenario_sha256": world.scenario.sha256,
        "wall_time_s": elapsed_s,
        "always_failed": always_failed(folder.file("participation.jsonl")),
        "expect": check_expectations(world.scenario.expect, loop.history),
    }
    with taking(folder.file("summary.json")):
        write_json_atomic(folder.file("summary.json"), summary)
    return summary


def params_sha256(model: dict[str, Tensor]) -> str:
    """Return the hash of a model: names, dtypes, shapes and bits of its tensors."""
    return checkpoints.tensors_sha256(model)


def participation_sha256(path: Path) -> str:
    """Return the hash of who was selected in which round."""
    digest = hashlib.sha256()
    for record in JsonLines.read(path):
        digest.update(f"{record['round']}:{','.join(map(str, record['selected']))};".encode())
    return digest.hexdigest()


def always_failed(path: Path) -> dict[str, str]:
    """Return who failed in every round in which it was selected: (client, last cause) by name."""
    selected: Counter[int] = Counter()
    failed: Counter[int] = Counter()
    causes: dict[int, str] = {}
    for record in JsonLines.read(path):
        selected.update(record["selected"])
        found = {int(client): cause for client, cause in record["failed"].items()}
        causes |= {client: cause for client, cause in found.items() if cause != "absent"}
        failed.update(client for client, cause in found.items() if cause != "absent")
    never = sorted(client for client, times in failed.items() if times >= selected[client])
    return {str(client): causes[client] for client in never}


def _write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with taking(path):
        try:
            temporary.write_bytes(content)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
