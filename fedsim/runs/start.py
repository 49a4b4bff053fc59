"""A run from scenario to summary: what `fedsim run` and `fedsim resume` do."""

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.basics.turns import running
from fedsim.engine.grid import LocalGrid
from fedsim.runs import folder as run_folder
from fedsim.runs.execute import RunResult, execute
from fedsim.runs.folder import RunFolder
from fedsim.runs.left_behind import keep_places, take_up, where_it_was_run
from fedsim.runs.manifest import require_same_data, write_plan
from fedsim.runs.on_nodes import require_simulated
from fedsim.runs.world import World, build
from fedsim.scenario.scenario import Scenario

if TYPE_CHECKING:
    from fedsim.runs.profile import Profile
    from fedsim.runs.progress import Progress

_log = logging.getLogger("fedsim")


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
        ScenarioError: If the scenario cannot be built, the folder is taken, or another thread runs
            code of another project.
        RunError: If the run fails; `fedsim resume` goes on from its last checkpoint.
    """
    with running(scenario.folders):
        return _begin(scenario, out, workers, progress, profile)


def _begin(
    scenario: Scenario,
    out: Path | str | None,
    workers: int | None,
    progress: "Progress | None",
    profile: "Profile | None",
) -> RunResult:
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
        ScenarioError: If the folder is not a run's or was made on SuperNodes, an override would
            change its result, something is no longer where it was, or code of the user's own has
            changed.
        CheckpointError: If the checkpoint is torn, foreign or incompatible.
        RunError: If the run fails again.
    """
    folder = run_folder.open_existing(Path(run))
    require_simulated(folder.path)
    with folder.named_when_interrupted():
        scenario = take_up(folder, overrides)
        with running(scenario.folders):
            return _go_on(scenario, folder, workers, progress)


def _go_on(
    scenario: Scenario, folder: RunFolder, workers: int | None, progress: "Progress | None"
) -> RunResult:
    with where_it_was_run(folder):
        world = build(scenario, draws_seeded=True)
    require_same_data(world, folder)
    keep_places(scenario, folder)
    if not (folder.file("plan.json").is_file() and folder.file("manifest.json").is_file()):
        write_plan(world, folder)
    return _run(world, folder, workers=workers, progress=progress)


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
