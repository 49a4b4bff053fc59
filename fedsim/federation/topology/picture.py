"""A graph as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedsim.federation.topology.topology import graph_statistics

if TYPE_CHECKING:
    import networkx as nx

_NAMED = 40  # nodes that a picture names
_CLEARANCE = 0.07  # of a node from other nodes' edges, in a picture of side 2


def draw_topology(graph: "nx.Graph", path: Path | str, title: str = "") -> None:
    """Draw a graph, nodes coloured by degree, and write it as an image.

    Args:
        graph: Nodes 0...N-1.
        path: File to write, by its suffix png, svg or pdf.
        title: Above the drawing; the graph's statistics go below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found, places = graph_statistics(graph), _places(graph)
    nodes, edges, degree = found["nodes"], found["edges"], found["degree"]
    # no pyplot: its figures are global state, and its backend may want a display
    figure = Figure(figsize=(7, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    lines = [places[list(edge)] for edge in graph.edges]
    alpha = min(0.8, max(0.06, 150 / max(edges, 1)))
    axes.add_collection(LineCollection(lines, colors="0.35", linewidths=1.0, alpha=alpha))
    degrees = np.array([len(graph[node]) for node in range(nodes)])
    varied = degree["min"] < degree["max"]
    dots = axes.scatter(
        places[:, 0],
        places[:, 1],
        s=min(400.0, 10_000 / nodes),
        c=degrees if varied else "#31688e",
        cmap="viridis" if varied else None,
        edgecolors="white",
        linewidths=0.8,
        zorder=2,
    )
    if varied:
        ticks = MaxNLocator(integer=True)
        figure.colorbar(dots, ax=axes, shrink=0.6, label="neighbours", ticks=ticks)
    bright = degree["min"] + 0.6 * (degree["max"] - degree["min"])  # yellow wants dark letters
    for node in range(nodes if nodes <= _NAMED else 0):
        color = "black" if varied and degrees[node] > bright else "white"
        axes.annotate(
            str(node), places[node], ha="center", va="center", color=color, fontsize=8, zorder=3
        )
    axes.set_title(title)
    axes.set_xlabel(
        f"{nodes:,} nodes, {edges:,} edges, {degree['mean']:.3g} neighbours on average, "
        f"{found['components']:,} component{'' if found['components'] == 1 else 's'}"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def _places(graph: "nx.Graph") -> npt.NDArray[np.float64]:
    """Where each node is drawn, `[N, 2]` in [-1, 1]: on a circle what is dense or goes round it."""
    import networkx as nx

    nodes, edges = len(graph), graph.number_of_edges()
    around = sum(abs(a - b) in (1, nodes - 1) for a, b in graph.edges)
    if 2 * around > edges or 4 * edges > nodes**2:
        layout = nx.circular_layout(graph)
    elif nodes <= 200:
        steps = dict(nx.all_pairs_shortest_path_length(graph))
        apart = 1 + max(max(of.values()) for of in steps.values())  # between pieces
        steps = {a: {b: of.get(b, apart) for b in graph} for a, of in steps.items()}
        layout = nx.kamada_kawai_layout(graph, dist=steps)
        if nodes <= _NAMED and _clearance(graph, _ordered(layout)) < _CLEARANCE:
            layout = nx.circular_layout(graph)  # on which no edge passes a node
    else:
        layout = nx.spring_layout(graph, seed=0)
    return _ordered(layout)


def _ordered(layout: Mapping[int, npt.ArrayLike]) -> npt.NDArray[np.float64]:
    return np.array([layout[node] for node in range(len(layout))], dtype=np.float64).reshape(-1, 2)


def _clearance(graph: "nx.Graph", places: npt.NDArray[np.float64]) -> float:
    """The smallest distance of a node from an edge that is not its own."""
    smallest = np.inf
    for a, b in graph.edges:
        others = np.delete(np.arange(len(places)), [a, b])
        along = places[b] - places[a]
        share = (places[others] - places[a]) @ along / max(float(along @ along), 1e-12)
        nearest = places[a] + np.clip(share, 0, 1)[:, None] * along
        away = np.linalg.norm(places[others] - nearest, axis=1)
        smallest = min(smallest, float(away.min(initial=np.inf)))
    return smallest
