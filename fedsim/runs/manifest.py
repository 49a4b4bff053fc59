"""What a run folder says before round 1: the plan, what the run is made of, its code, its graph."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsim.basics.errors import CheckpointError
from fedsim.basics.json_files import read_json, taking, write_json_atomic
from fedsim.federation.topology.picture import draw_topology
from fedsim.federation.topology.topology import Topology, edges_sha256, graph_statistics
from fedsim.runs.folder import RunFolder
from fedsim.runs.left_behind import write_code
from fedsim.runs.places import write_places
from fedsim.runs.world import World

if TYPE_CHECKING:
    import networkx as nx

_MANIFESTED = ("topology", "participation", "weights")  # besides the data


def write_plan(world: World, folder: RunFolder) -> None:
    """Write the plan, the manifest of data and partition, and the code into a run folder."""
    for name, content in (
        ("plan.json", world.plan.to_json()),
        ("manifest.json", manifest_of(world)),
    ):
        with taking(folder.file(name)):
            write_json_atomic(folder.file(name), content)
    write_code(world.code, world.reads, folder)
    write_places(world.scenario, folder)
    if world.topology is not None:
        graph = _first_graph(world, world.topology)
        title = f"{world.topology.kind}, {world.scenario.stem}"
        with taking(folder.file("topology.png")):
            draw_topology(graph, folder.file("topology.png"), title)


def manifest_of(world: World) -> dict[str, Any]:
    """Return what a run is made of besides its scenario: data, partition, the first graph."""
    manifest = {**world.data.manifest, "sha256": world.data.manifest_sha256}
    if world.weights is not None:
        manifest["weights"] = world.weights
    if world.personal:
        manifest["personal"] = list(world.personal)
    if world.topology is not None:
        graph = _first_graph(world, world.topology)
        manifest["topology"] = {**graph_statistics(graph), "sha256": edges_sha256(graph)}
    if trace := world.participation.manifest():
        manifest["participation"] = trace
    return manifest


def require_same_data(world: World, folder: RunFolder) -> None:
    """Refuse to go on when data, partition or graph are no longer what the run began with.

    Args:
        world: What the scenario gives now.
        folder: The run's folder; without a manifest in it there is nothing to compare.

    Raises:
        CheckpointError: Naming what has changed.
    """
    require_same(folder, manifest_of(world), ("data", *_MANIFESTED))


def require_same(folder: RunFolder, now: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Refuse what is no longer what a run began with.

    Args:
        folder: The run's folder; without a manifest in it there is nothing to compare.
        now: The manifest as the scenario gives it now.
        parts: Which of its parts are compared, "data" for the data and their division.

    Raises:
        CheckpointError: Naming what has changed.
    """
    place = folder.file("manifest.json")
    if not place.is_file():
        return
    before = read_json(place)
    for what in parts:
        then, here = (m if what == "data" else m.get(what) or {} for m in (before, now))
        if then.get("sha256") != here.get("sha256"):
            raise CheckpointError(
                f"{place}: the run began with {what} {str(then.get('sha256'))[:12]}, the same "
                f"scenario now gives {str(here.get('sha256'))[:12]}; bring the {what} back or "
                "start a new run"
            )


def _first_graph(world: World, topology: Topology) -> "nx.Graph":
    return topology.graph(world.data.num_clients, server_round=1, seed=world.scenario.seed)
