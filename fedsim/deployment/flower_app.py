"""The scenario as a Flower app: what `flwr run` starts on a SuperLink and its SuperNodes.

The run-config holds one scenario's path; the same strategy, client procedure and round loop as in
`fedsim run` are built from it on both sides. Keys of the run-config:

    scenario    path of the scenario, from the app's folder, or the name of one of fedsim's own
    set         overrides, "table.key=value" separated by spaces
    out         the run folder on the server; empty makes one under `runs/`
    wait-s      seconds to wait for all SuperNodes
"""

import functools
import shlex
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim.engine.client_app import CohortApp
from fedsim.federation.grids.nodes import PartitionGrid
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario over the SuperNodes, into a run folder on this machine."""
    from fedsim.runs import folder as run_folder
    from fedsim.runs.execute import execute
    from fedsim.runs.manifest import write_plan
    from fedsim.runs.progress import Progress
    from fedsim.runs.world import build

    world = build(scenario_of(context))
    out = str(context.run_config.get("out", ""))
    folder = run_folder.create(Path(out) if out else None, world.scenario)
    write_plan(world, folder)
    wait_s = float(context.run_config.get("wait-s", 300.0))
    nodes = PartitionGrid(grid, world.data.num_clients, timeout_s=wait_s)
    with folder.recording():
        # no seed for foreign strategies: their privacy noise must come from the operating system
        progress = Progress(world.scenario.rounds)
        result = execute(world, folder, nodes, seed=None, progress=progress)
        print(f"run folder {result.folder}, params {result.summary['params_sha256']}")


class _ScenarioApp(ClientApp):
    """Builds the scenario's ClientApp at the first message and hands every message to it."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        scenario = str(context.run_config.get("scenario", ""))
        return _app(scenario, str(context.run_config.get("set", "")))(message, context)


client_app = _ScenarioApp()


def scenario_of(context: Context) -> Scenario:
    """Return the scenario that a run-config names."""
    config: dict[str, Any] = dict(context.run_config)
    return _load(str(config.get("scenario", "")), str(config.get("set", "")))


def _load(path: str, overrides: str) -> Scenario:
    beside = Path(__file__).parents[2] / path
    return load(beside if beside.is_file() else path, shlex.split(overrides))


@functools.cache
def _app(path: str, overrides: str) -> CohortApp:
    from fedsim.runs.world import build

    return build(_load(path, overrides), on_node=True).app
