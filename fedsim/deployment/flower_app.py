"""The scenario as a Flower app: what `flwr run` starts on a SuperLink and its SuperNodes.

The run-config holds one scenario's path; the same strategy, client procedure and round loop as in
`fedsim run` are built from it on both sides. Keys of the run-config:

    scenario    path of the scenario, from the app's folder, or the name of one of fedsim's own
    set         overrides, "table.key=value" separated by spaces
    out         the run folder on the server; empty makes one under `runs/`
    resume      true goes on with the run in `out` from its last checkpoint
    wait-s      seconds to wait for all SuperNodes, in place of the scenario's [deployment] wait_s
"""

import atexit
import functools
import gc
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim.basics.errors import ScenarioError, show
from fedsim.basics.loading import loads

# a node starts a process for every instruction, and most of what it costs is this
with loads("torch"):
    from fedsim.deployment import own_data
    from fedsim.deployment.client_state import answered_with_state
    from fedsim.deployment.node_software import recording, refusing
    from fedsim.deployment.own_data import let_agree
    from fedsim.deployment.site import SitePolicy, at_server, at_site
    from fedsim.deployment.time_limit import answered_in_time
    from fedsim.engine.client_app import CohortApp
    from fedsim.federation.deployment_table import WhoMustBeThere
    from fedsim.federation.grids.nodes import PartitionGrid
    from fedsim.federation.grids.prompt import prompt
    from fedsim.runs.own_sites import has_own_sites, sites_expected, world_at_server
    from fedsim.scenario.load import load
    from fedsim.scenario.scenario import Scenario
# modules are no garbage when it ends, either
atexit.register(gc.freeze)

if TYPE_CHECKING:
    from fedsim.runs.folder import RunFolder
    from fedsim.runs.world import World

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario over the SuperNodes, into a run folder on this machine."""
    with at_server(context) as policy:
        _serve(grid, context, policy)


def _serve(grid: Grid, context: Context, policy: SitePolicy) -> None:
    from fedsim.runs.declared_replies import declared_replies
    from fedsim.runs.execute import execute
    from fedsim.runs.on_nodes import experiment_in, note_flower_run, require_nothing_kept
    from fedsim.runs.progress import Progress

    scenario = scenario_of(context)
    promise = scenario.promise

    def nodes_of(clients: int) -> PartitionGrid:
        asked = scenario.deployment or WhoMustBeThere()
        return PartitionGrid(
            prompt(grid),
            clients,
            least=asked.min_sites,
            timeout_s=float(context.run_config.get("wait-s") or asked.wait_s),
            rejoin_s=asked.rejoin_s,
            why_not=refusing(promise),
            bound=policy.nodes,
        )

    own = nodes_of(sites_expected(scenario)) if has_own_sites(scenario) else None
    begin = _taken_up if _resumes(context) else _begun
    world, folder = begin(context, scenario, None if own is None else own.data_told)
    nodes = own or nodes_of(world.data.num_clients)
    if own is not None:
        let_agree(nodes, world)
    nodes.record_in(recording(folder.path, promise))
    nodes.hold_to(declared_replies(world))
    nodes.go_on_as(experiment_in(folder.path))
    if _resumes(context):
        if not nodes.all_keep_state:
            require_nothing_kept(world)
        note_flower_run(folder.path, context.run_config, context.run_id)
    with folder.recording():
        # no seed for foreign strategies: their privacy noise must come from the operating system
        progress = Progress(world.scenario.rounds)
        result = execute(world, folder, nodes, seed=None, progress=progress)
        print(f"run folder {result.folder}, params {result.summary['params_sha256']}")


def _resumes(context: Context) -> bool:
    asked = context.run_config.get("resume", False)
    if not isinstance(asked, bool):
        raise ScenarioError(f"resume={show(asked)}: must be true or false, without quotes")
    return asked


def _begun(
    context: Context, scenario: Scenario, told: Sequence[Mapping[str, Any]] | None
) -> "tuple[World, RunFolder]":
    """The scenario, built, and the folder of a new run."""
    from fedsim.runs import folder as run_folder
    from fedsim.runs.manifest import write_plan
    from fedsim.runs.on_nodes import NODES_FILE, flower_runs

    world = world_at_server(scenario, told)
    out = str(context.run_config.get("out", ""))
    said = {NODES_FILE: flower_runs(context.run_config, context.run_id)}
    folder = run_folder.create(Path(out) if out else None, world.scenario, said)
    write_plan(world, folder)
    return world, folder


def _taken_up(
    context: Context, scenario: Scenario, told: Sequence[Mapping[str, Any]] | None
) -> "tuple[World, RunFolder]":
    """The scenario, built, and the folder of the run that is gone on with.

    Raises:
        ScenarioError: If there is no such run, it is of another scenario or a simulation, or
            clients keep what nodes have forgotten by now.
        CheckpointError: If the server's data are no longer those that the run began with.
    """
    from fedsim.runs import folder as run_folder
    from fedsim.runs.left_behind import take_up
    from fedsim.runs.manifest import require_same_data, write_plan
    from fedsim.runs.on_nodes import require_on_nodes

    out = str(context.run_config.get("out", ""))
    if not out:
        raise ScenarioError("resume=true needs out: the folder, on the server, of the run")
    folder = run_folder.open_existing(Path(out))
    require_on_nodes(folder.path)
    if take_up(folder).sha256 != scenario.sha256:
        raise ScenarioError(
            f"resume=true: scenario and set are of another run than out={show(out)}; give them as "
            f"it was begun: `{run_folder.resuming(folder.path)}`"
        )
    world = world_at_server(scenario, told)
    require_same_data(world, folder)
    if not (folder.file("plan.json").is_file() and folder.file("manifest.json").is_file()):
        write_plan(world, folder)
    return world, folder


class _ScenarioApp(ClientApp):
    """Builds the scenario's ClientApp at the first message and hands every message to it.

    What a scenario may do, and what the server is told of an error, is the site's to say
    (`fedsim.deployment.site`).
    """

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        return at_site(_answer, message, context)


def _answer(
    message: Message, context: Context, policy: SitePolicy, known: Callable[[str], None]
) -> Message:
    config = context.run_config
    scenario = _scenario(str(config.get("scenario", "")), str(config.get("set", "")), policy)
    known(scenario().sha256)

    def answer(message: Message, context: Context) -> Message:
        if has_own_sites(scenario()):
            return own_data.answer(message, context, policy, scenario)
        return _app(scenario)(message, context)

    def in_time(message: Message, context: Context) -> Message:
        limit_s = scenario().engine.client_timeout_s
        return answered_in_time(answer, message, context, limit_s)

    points = scenario().checkpoint
    keep = points.every * (points.keep + 1)
    return answered_with_state(in_time, message, context, policy, keep)


client_app = _ScenarioApp()


def scenario_of(context: Context) -> Scenario:
    """Return the scenario that a run-config names."""
    config: dict[str, Any] = dict(context.run_config)
    return _load(str(config.get("scenario", "")), str(config.get("set", "")))


def _load(path: str, overrides: str) -> Scenario:
    beside = Path(__file__).parents[2] / path
    return load(beside if beside.is_file() else path, shlex.split(overrides))


@functools.cache
def _scenario(path: str, overrides: str, policy: SitePolicy) -> Callable[[], Scenario]:
    """What returns the scenario, read once under a site's policy."""
    scenario = _load(path, overrides)
    return lambda: scenario


@functools.cache
def _app(scenario: Callable[[], Scenario]) -> CohortApp:
    """The scenario's ClientApp, built once."""
    from fedsim.runs.world import build

    return build(scenario(), on_node=True).app
