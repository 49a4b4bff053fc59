"""Who is whose neighbour: graphs of nodes 0...N-1, and the weights with which neighbours average.

A graph is a function of (seed, epoch) alone. An epoch is the whole run, or `every` rounds of it for
graphs that are drawn anew.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import RunError, ScenarioError

if TYPE_CHECKING:
    import networkx as nx

if TYPE_CHECKING:
    import networkx as nx

Edge = tuple[int, int]
Neighbours = tuple[npt.NDArray[np.int64], ...]
_DRAWS = 100


@dataclass(frozen=True)
class Topology:
    """A rule that gives every round its graph: undirected, without loops, nodes 0...N-1.

    Attributes:
        kind: Its name.
        draw: `(num_nodes, seed, epoch) -> networkx.Graph`.
        refusal: `(num_nodes) -> str | None`: why there is no such graph, as "key = value: reason".
        every: Rounds after which the graph is drawn anew; None keeps one for the run.
        connected: Whether a graph that falls into pieces is drawn again, up to 100 times.
    """

    kind: str
    draw: Callable[[int, int, int], "nx.Graph"] = field(repr=False)
    refusal: Callable[[int], str | None] = field(default=lambda num_nodes: None, repr=False)
    every: int | None = None
    connected: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ScenarioError(f"[topology] every = {self.every}: must be >= 1")

    def check(self, num_nodes: int) -> None:
        """Refuse a number of nodes with which there is no such graph.

        Raises:
            ScenarioError: Naming the key, its value and what is allowed.
        """
        if reason := self.refusal(num_nodes):
            raise ScenarioError(f"[topology] {reason}")

    def graph(self, num_nodes: int, *, server_round: int, seed: int) -> "nx.Graph":
        """Return the round's graph, frozen; rounds of one epoch share the object.

        Args:
            num_nodes: N.
            server_round: 1...T.
            seed: The scenario's seed.

        Raises:
            ScenarioError: If there is no such graph, or 100 draws gave no connected one.
            RunError: The same after round 1, for a graph that is drawn anew.
        """
        epoch = 0 if self.every is None else (server_round - 1) // self.every
        try:
            return _graph(self, num_nodes, epoch, seed)
        except ScenarioError as error:
            if server_round == 1:
                raise
            raise RunError(f"round {server_round}: {error}") from None

    def neighbours(self, num_nodes: int, *, server_round: int, seed: int) -> Neighbours:
        """Return each node's neighbours in the round's graph, ascending; see `graph`."""
        return _neighbours(self.graph(num_nodes, server_round=server_round, seed=seed))


@functools.lru_cache(maxsize=8)
def _graph(topology: Topology, num_nodes: int, epoch: int, seed: int) -> "nx.Graph":
    import networkx as nx

    topology.check(num_nodes)
    generator = rng.generator(seed, "topology", epoch)
    for _ in range(_DRAWS if topology.connected else 1):
        drawn = topology.draw(num_nodes, int(generator.integers(2**32)), epoch)
        graph = nx.empty_graph(num_nodes)
        graph.add_edges_from(sorted((min(edge), max(edge)) for edge in drawn.edges))
        if not topology.connected or nx.is_connected(graph):
            return nx.freeze(graph)
    raise ScenarioError(
        f"[topology] connected = true: {_DRAWS} draws of {topology.kind} with {num_nodes} nodes "
        f"all fell into pieces, the last into {nx.number_connected_components(graph)}; ask for "
        "more edges or set connected = false"
    )


@functools.lru_cache(maxsize=8)
def _neighbours(graph: "nx.Graph") -> Neighbours:
    return tuple(np.array(sorted(graph[node]), dtype=np.int64) for node in range(len(graph)))


# --- the kinds that a scenario can name ---------------------------------------------------


# --- what a graph means for averaging -----------------------------------------------------


def edges_sha256(graph: "nx.Graph") -> str:
    """Return the hash of a graph's nodes and edges."""
    edges = sorted((min(edge), max(edge)) for edge in graph.edges)
    return hashlib.sha256(f"{len(graph)}:{edges}".encode()).hexdigest()


def graph_statistics(graph: "nx.Graph") -> dict[str, Any]:
    """Return nodes, edges, degree (min, mean, max) and components of a graph, as JSON."""
    degrees = [len(graph[node]) for node in graph]
    return {
        "nodes": len(graph),
        "edges": graph.number_of_edges(),
        "degree": {"min": min(degrees), "mean": sum(degrees) / len(graph), "max": max(degrees)},
        "components": networkx().number_connected_components(graph),
    }


def networkx() -> Any:
    """Return the library, imported when a graph is drawn."""
    import networkx as nx

    return nx
