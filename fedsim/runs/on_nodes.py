"""A run over SuperNodes: its folder says so, and it is gone on with over SuperNodes alone.

A simulation that went on with it would end with numbers that no node has computed.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.basics.errors import ScenarioError
from fedsim.basics.home import expanded, nameless
from fedsim.basics.json_files import read_plain, taking, write_json_atomic

if TYPE_CHECKING:
    from fedsim.runs.world import World

NODES_FILE = "flower_runs.json"
_KEPT = ("scenario", "set", "out")  # of the run-config


def flower_runs(
    run_config: Mapping[str, Any], number: int, folder: Path | None = None
) -> dict[str, Any]:
    """Return what a run's folder says of Flower's runs that made it.

    Args:
        run_config: As `flwr run` was given it.
        number: Flower's number of the run.
        folder: The run's folder where the run is gone on with.
    """
    before = [] if folder is None else read_plain(folder / NODES_FILE)["runs"]
    config = {key: nameless(str(run_config.get(key, ""))) for key in _KEPT}
    return {"config": config, "runs": [*before, str(number)]}


def note_flower_run(folder: Path, run_config: Mapping[str, Any], number: int) -> None:
    """Write into a run's folder that another run of Flower's goes on with it."""
    file = folder / NODES_FILE
    with taking(file):
        write_json_atomic(file, flower_runs(run_config, number, folder))


def is_on_nodes(folder: Path) -> bool:
    """Return whether a run's folder was made by a ServerApp."""
    return (folder / NODES_FILE).is_file()


def resuming_on_nodes(folder: Path) -> str:
    """Return the command that goes on with a run over SuperNodes.

    Args:
        folder: The run's folder, or a copy of it: `flwr run` is told where it is for the ServerApp.
    """
    config = read_plain(folder / NODES_FILE)["config"]
    told = {key: value for key, value in config.items() if value}
    told["out"] = str(expanded(config["out"] or folder))
    words = [f"{key}={json.dumps(str(value), ensure_ascii=False)}" for key, value in told.items()]
    return f"flwr run . -c {shlex.quote(' '.join([*words, 'resume=true']))}"


def require_on_nodes(folder: Path) -> None:
    """Refuse to go on with a simulation on SuperNodes.

    Raises:
        ScenarioError: If a run's folder is one's.
    """
    if not is_on_nodes(folder):
        raise ScenarioError(
            f"resume=true: {folder} was simulated; `fedsim resume {shlex.quote(str(folder))}` "
            "goes on with it"
        )


def require_simulated(folder: Path) -> None:
    """Refuse to simulate the rest of a run over SuperNodes.

    Raises:
        ScenarioError: If it is one, with the command that goes on with it.
    """
    if is_on_nodes(folder):
        raise ScenarioError(
            f"{folder}: was run on SuperNodes, and a simulation cannot go on with it: "
            f"`{resuming_on_nodes(folder)}` goes on there"
        )


def experiment_in(folder: Path) -> str:
    """Return what a run over SuperNodes is called, however often it was gone on with."""
    return str(read_plain(folder / NODES_FILE)["runs"][0])


def require_nothing_kept(world: "World") -> None:
    """Refuse to go on on nodes that have forgotten what their clients kept from round to round.

    Flower gives each of its runs a state of its own on every node.

    Raises:
        ScenarioError: If clients of the scenario keep anything.
    """
    executor = world.app.executor
    params = {n: p.detach() for n, p in executor.model.named_parameters() if p.requires_grad}
    kept = sorted({*world.personal, *executor.procedure.initial_state(params)})
    if kept:
        named = ", ".join(kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
        raise ScenarioError(
            "resume=true: clients of this scenario keep tensors from round to round "
            f"({named}), and nodes keep them for one run of Flower's only, unless all have a "
            "folder for them ([site] state, or FEDSIM_SITE_STATE): start a new run, without resume "
            "and with another out"
        )
