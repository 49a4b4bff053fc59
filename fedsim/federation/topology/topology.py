"""Who is whose neighbour: graphs of nodes 0...N-1, and the weights with which neighbours average.

A graph is a function of (seed, epoch) alone. An epoch is the whole run, or `every` rounds of it for
graphs that are drawn anew.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import RunError, ScenarioError

if TYPE_CHECKING:
    import networkx as nx

Mixing = Literal["uniform", "metropolis"]
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


def ring() -> Topology:
    """A cycle; of two nodes it is one edge."""
    return Topology("ring", lambda n, seed, epoch: _nx().cycle_graph(n) if n > 2 else _path(n))


def line() -> Topology:
    """A path: node i beside i - 1 and i + 1."""
    return Topology("line", lambda n, seed, epoch: _path(n))


def star() -> Topology:
    """Node 0 in the middle, everybody else beside it alone."""
    return Topology("star", lambda n, seed, epoch: _nx().star_graph(n - 1))


def complete() -> Topology:
    """Everybody beside everybody."""
    return Topology("complete", lambda n, seed, epoch: _nx().complete_graph(n))


def torus() -> Topology:
    """A grid whose borders meet, as square as N allows; a side of two nodes does not close."""

    def draw(num_nodes: int, seed: int, epoch: int) -> "nx.Graph":
        rows = _side(num_nodes)
        grid = _nx().grid_2d_graph(rows, num_nodes // rows, periodic=True)
        return _nx().convert_node_labels_to_integers(grid, ordering="sorted")

    def refusal(num_nodes: int) -> str | None:
        if _side(num_nodes) > 1:
            return None
        near = [n for n in range(num_nodes - 1, num_nodes + 4) if _side(n) > 1][:2]
        return (
            f'kind = "torus" with {num_nodes} nodes: must be a product of two numbers >= 2; '
            f"nearest: {' or '.join(map(str, near))}"
        )

    return Topology("torus", draw, refusal)


def regular(*, degree: int = 4, every: int | None = None, connected: bool = True) -> Topology:
    """A random graph in which every node has the same number of neighbours.

    Args:
        degree: Neighbours of each node; >= 1, below the number of nodes, and even when that is odd.
        every: Rounds after which the graph is drawn anew; one graph for the run if left out.
        connected: Draw again until the graph is in one piece, and refuse it after 100 draws.
    """
    if degree < 1:
        raise ScenarioError(f"[topology] degree = {degree}: must be >= 1")

    def refusal(num_nodes: int) -> str | None:
        if degree < num_nodes and not degree * num_nodes % 2:
            return None
        odd = ", and even as the number of nodes is odd" if num_nodes % 2 else ""
        return f"degree = {degree} with {num_nodes} nodes: must be at most {num_nodes - 1}{odd}"

    return Topology(
        "regular",
        lambda n, seed, epoch: _nx().random_regular_graph(degree, n, seed=seed),
        refusal,
        every,
        connected,
    )


def erdos_renyi(
    *, probability: float = 0.3, every: int | None = None, connected: bool = True
) -> Topology:
    """Each pair of nodes is joined with a given probability.

    Args:
        probability: Of each edge, in (0, 1]; connected graphs are rare below ln(N) / N.
        every: Rounds after which the graph is drawn anew; one graph for the run if left out.
        connected: Draw again until the graph is in one piece, and refuse it after 100 draws.
    """
    if not 0 < probability <= 1:
        raise ScenarioError(f"[topology] probability = {probability}: must be in (0, 1]")
    return Topology(
        "erdos_renyi",
        lambda n, seed, epoch: _nx().fast_gnp_random_graph(n, probability, seed=seed),
        every=every,
        connected=connected,
    )


def small_world(
    *, degree: int = 4, rewiring: float = 0.1, every: int | None = None, connected: bool = True
) -> Topology:
    """A ring of near neighbours of which some edges lead anywhere (Watts and Strogatz).

    Args:
        degree: Neighbours of each node before rewiring; even, >= 2, below the number of nodes.
        rewiring: Probability with which an edge gets another end, in [0, 1].
        every: Rounds after which the graph is drawn anew; one graph for the run if left out.
        connected: Draw again until the graph is in one piece, and refuse it after 100 draws.
    """
    if degree < 2 or degree % 2:
        raise ScenarioError(f"[topology] degree = {degree}: must be even and >= 2")
    if not 0 <= rewiring <= 1:
        raise ScenarioError(f"[topology] rewiring = {rewiring}: must be in [0, 1]")
    return Topology(
        "small_world",
        lambda n, seed, epoch: _nx().watts_strogatz_graph(n, degree, rewiring, seed=seed),
        functools.partial(_too_few, "degree", degree, even=True),
        every,
        connected,
    )


def barabasi_albert(*, attachments: int = 2, every: int | None = None) -> Topology:
    """A scale-free graph: nodes join one by one and prefer those with many neighbours.

    Args:
        attachments: Edges that each new node brings; >= 1 and below the number of nodes.
        every: Rounds after which the graph is drawn anew; one graph for the run if left out.
    """
    if attachments < 1:
        raise ScenarioError(f"[topology] attachments = {attachments}: must be >= 1")
    return Topology(
        "barabasi_albert",
        lambda n, seed, epoch: _nx().barabasi_albert_graph(n, attachments, seed=seed),
        functools.partial(_too_few, "attachments", attachments),
        every,
    )


def file(*, path: str) -> Topology:
    """A graph read from a file, connected or not.

    Args:
        path: A text file with one edge "a b" per line; what follows a # is a comment.
    """
    where = f"path = '{os.fspath(path)}'"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ScenarioError(f"[topology] {where}: cannot be read: {reason}") from error
    edges = []
    for number, text in enumerate(lines, start=1):
        words = text.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isdecimal() for word in words):
            raise ScenarioError(
                f"[topology] {where}, line {number}: '{text.strip()}': must be two node numbers"
            )
        edges.append((f"{where}, line {number}", int(words[0]), int(words[1])))
    if not edges:
        raise ScenarioError(f"[topology] {where}: has no edge")
    return _listed("file", [edges], None)


TOPOLOGIES: dict[str, Callable[..., Topology]] = {
    "ring": ring,
    "line": line,
    "star": star,
    "torus": torus,
    "complete": complete,
    "regular": regular,
    "erdos_renyi": erdos_renyi,
    "small_world": small_world,
    "barabasi_albert": barabasi_albert,
    "file": file,
}


def from_edges(edges: Iterable[Edge], *more: Iterable[Edge], every: int = 1) -> Topology:
    """Return the graph of the given edges, connected or not; several lists take turns.

    Args:
        edges: Pairs of nodes.
        *more: The edges of further graphs.
        every: Rounds after which the next graph has its turn.

    Raises:
        ScenarioError: If an edge is a loop or names a node below 0.

    Example:
        >>> swap = from_edges([(0, 1), (2, 3)], [(1, 2), (3, 0)])
        >>> [list(swap.graph(4, server_round=t, seed=0).edges) for t in (1, 2)]
        [[(0, 1), (2, 3)], [(0, 3), (1, 2)]]
    """
    lists = [[(f"edges: ({a}, {b})", a, b) for a, b in pairs] for pairs in (edges, *more)]
    return _listed("edges", lists, every if more else None)


def _listed(kind: str, lists: list[list[tuple[str, int, int]]], every: int | None) -> Topology:
    for where, a, b in (edge for edges in lists for edge in edges):
        if a == b or min(a, b) < 0:
            why = "joins a node with itself" if a == b else "nodes are numbered from 0"
            raise ScenarioError(f"[topology] {where}: {why}")

    def draw(num_nodes: int, seed: int, epoch: int) -> "nx.Graph":
        return _nx().Graph([(a, b) for _, a, b in lists[epoch % len(lists)]])

    def refusal(num_nodes: int) -> str | None:
        for where, a, b in (edge for edges in lists for edge in edges):
            if max(a, b) >= num_nodes:
                return f"{where} names node {max(a, b)}: must be in 0..{num_nodes - 1}"
        return None

    return Topology(kind, draw, refusal, every)


def _nx() -> Any:
    import networkx as nx

    return nx


def _path(num_nodes: int) -> "nx.Graph":
    return _nx().path_graph(num_nodes)


def _side(num_nodes: int) -> int:
    """The shorter side of the most square grid of so many nodes; 1 when there is none."""
    sides = range(int(num_nodes**0.5), 1, -1)
    return next((side for side in sides if not num_nodes % side), 1)


def _too_few(key: str, value: int, num_nodes: int, *, even: bool = False) -> str | None:
    largest = (num_nodes - 1) // 2 * 2 if even else num_nodes - 1
    if value <= largest:
        return None
    return f"{key} = {value} with {num_nodes} nodes: must be at most {largest}"


# --- what a graph means for averaging -----------------------------------------------------


def mixing_matrix(
    graph: "nx.Graph", *, mixing: Mixing = "uniform", self_weight: float = 0.5
) -> npt.NDArray[np.float64]:
    """Return W, float64 `[N, N]`: row i holds the weights that node i applies, and sums to 1.

    Args:
        graph: Nodes 0...N-1.
        mixing: "uniform": W_ii = self_weight, the neighbours share the rest. "metropolis"
            (Metropolis-Hastings): W_ij = 1 / (1 + max(d_i, d_j)) with the degrees d, and W_ii what
            is left; symmetric, so the mean over the nodes stays what it was.
        self_weight: Of "uniform" alone. A node without neighbours has W_ii = 1 in any case.

    Example:
        >>> import networkx as nx
        >>> mixing_matrix(nx.path_graph(3)).tolist()
        [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]]
    """
    matrix = np.zeros((len(graph), len(graph)))
    for node in range(len(graph)):
        degree = len(graph[node])
        for other in graph[node]:
            matrix[node, other] = (
                1 / (1 + max(degree, len(graph[other])))
                if mixing == "metropolis"
                else (1 - self_weight) / degree
            )
        fixed = mixing == "uniform" and degree
        matrix[node, node] = self_weight if fixed else 1 - matrix[node].sum()
    return matrix


def spectral_gap(matrix: npt.NDArray[np.float64]) -> float:
    """Return 1 minus the second largest modulus of an eigenvalue of a row-stochastic matrix.

    A round of averaging shrinks the distance to consensus by about 1 - gap in the long run; 0 means
    that it never goes away. Exact and O(N^3): a fraction of a second for a symmetric matrix of
    1,000 nodes, some times that otherwise.
    """
    if len(matrix) < 2:
        return 1.0
    is_symmetric = np.array_equal(matrix, matrix.T)
    eigenvalues = np.linalg.eigvalsh(matrix) if is_symmetric else np.linalg.eigvals(matrix)
    return float(max(0.0, 1 - np.sort(np.abs(eigenvalues))[-2]))


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
        "components": _nx().number_connected_components(graph),
    }
