"""The graphs that a scenario can name, each a function whose arguments are its keys."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.basics.errors import ScenarioError
from fedsim.federation.topology.topology import Edge, Topology, networkx

if TYPE_CHECKING:
    import networkx as nx


def ring() -> Topology:
    """A cycle; of two nodes it is one edge."""
    return Topology("ring", lambda n, seed, epoch: networkx().cycle_graph(n) if n > 2 else _path(n))


def line() -> Topology:
    """A path: node i beside i - 1 and i + 1."""
    return Topology("line", lambda n, seed, epoch: _path(n))


def star() -> Topology:
    """Node 0 in the middle, everybody else beside it alone."""
    return Topology("star", lambda n, seed, epoch: networkx().star_graph(n - 1))


def complete() -> Topology:
    """Everybody beside everybody."""
    return Topology("complete", lambda n, seed, epoch: networkx().complete_graph(n))


def torus() -> Topology:
    """A grid whose borders meet, as square as N allows; a side of two nodes does not close."""

    def draw(num_nodes: int, seed: int, epoch: int) -> "nx.Graph":
        rows = _side(num_nodes)
        grid = networkx().grid_2d_graph(rows, num_nodes // rows, periodic=True)
        return networkx().convert_node_labels_to_integers(grid, ordering="sorted")

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
        lambda n, seed, epoch: networkx().random_regular_graph(degree, n, seed=seed),
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
        lambda n, seed, epoch: networkx().fast_gnp_random_graph(n, probability, seed=seed),
        every=every,
        connected=connected,
    )


def small_world(
    *, degree: int = 4, rewiring: float = 0.1, every: int | None = None, connected: bool = True
) -> Topology:
    """A ring of near neighbours in which some edges lead anywhere (Watts and Strogatz).

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
        lambda n, seed, epoch: networkx().watts_strogatz_graph(n, degree, rewiring, seed=seed),
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
        lambda n, seed, epoch: networkx().barabasi_albert_graph(n, attachments, seed=seed),
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
        return networkx().Graph([(a, b) for _, a, b in lists[epoch % len(lists)]])

    def refusal(num_nodes: int) -> str | None:
        for where, a, b in (edge for edges in lists for edge in edges):
            if max(a, b) >= num_nodes:
                return f"{where} names node {max(a, b)}: must be in 0..{num_nodes - 1}"
        return None

    return Topology(kind, draw, refusal, every)


def _path(num_nodes: int) -> "nx.Graph":
    return networkx().path_graph(num_nodes)


def _side(num_nodes: int) -> int:
    """The shorter side of the most square grid of so many nodes; 1 when there is none."""
    sides = range(int(num_nodes**0.5), 1, -1)
    return next((side for side in sides if not num_nodes % side), 1)


def _too_few(key: str, value: int, num_nodes: int, *, even: bool = False) -> str | None:
    largest = (num_nodes - 1) // 2 * 2 if even else num_nodes - 1
    if value <= largest:
        return None
    return f"{key} = {value} with {num_nodes} nodes: must be at most {largest}"
