"""What a partition looks like, in numbers and as a picture."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim import rng
from fedsim.data.source import FederatedData, Ints, size_summary

COUNTED_WHOLE = 10_000  # clients; of a larger federation the first SAMPLED are counted
SAMPLED = 1_000
_CHUNK = 100  # clients read at a time: bounds the memory that generated data take
_BARS = 60  # clients; more are drawn as columns of an image
_COLUMNS = 1_000


class LabelCounts(NamedTuple):
    """How many training samples of each class the clients hold.

    Attributes:
        counts: `[clients, classes]`, of clients 0, 1, ... in order.
        complete: Whether these are all clients.
    """

    counts: Ints
    complete: bool


def label_counts(data: FederatedData, *, whole: bool = False) -> LabelCounts:
    """Count labels per client: of all clients, or the first 1,000 of more than 10,000.

    Args:
        data: The federation.
        whole: Count all clients however many they are.
    """
    complete = whole or data.num_clients <= COUNTED_WHOLE
    clients = data.num_clients if complete else SAMPLED
    counts = np.zeros((clients, data.num_labels), dtype=np.int64)
    for start in range(0, clients, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, clients))
        for client_id, labels in zip(ids, data.labels(ids), strict=True):
            counts[client_id] = np.bincount(labels, minlength=data.num_labels)
    return LabelCounts(counts, complete)


def partition_statistics(data: FederatedData) -> dict[str, Any]:
    """Return sizes, labels and heterogeneity of a partition, as JSON.

    Of a federation of more than 10,000 clients the first 1,000 are counted; `counted` and
    `complete` say so.

    Returns:
        clients: Clients registered.
        counted: Clients that the numbers below are about.
        complete: Whether these are all clients.
        samples: Training samples of the counted clients.
        held_out: Samples of the server's test set.
        sizes: min, median, mean and max of training samples per client, and how many have none.
        labels: Per class: samples, their share, and how many clients hold any.
        classes_per_client: min, median, mean and max over the clients that hold samples.
        total_variation: mean and max, over the clients that hold samples, of the total-variation
            distance between the client's label law and that of all counted, in [0, 1]. Small
            clients differ by chance too: `by_chance` is the mean for clients of the same sizes that
            all follow the common law.
    """
    counts, complete = label_counts(data)
    sizes = counts.sum(axis=1)
    totals = counts.sum(axis=0)
    shares = totals / max(int(totals.sum()), 1)
    held = counts[sizes > 0]
    distances = _total_variation(held, shares)
    chance = rng.generator(data.manifest["partition"]["seed"], "statistics")
    by_chance = _total_variation(chance.multinomial(held.sum(axis=1), shares), shares)
    classes = (held > 0).sum(axis=1)
    return {
        "clients": data.num_clients,
        "counted": len(counts),
        "complete": complete,
        "samples": int(totals.sum()),
        "held_out": len(data.test.targets),
        "sizes": size_summary(sizes),
        "labels": [
            {
                "label": label,
                "samples": int(totals[label]),
                "share": float(shares[label]),
                "clients": int((counts[:, label] > 0).sum()),
            }
            for label in range(data.num_labels)
        ],
        "classes_per_client": {
            "min": int(classes.min()),
            "median": float(np.median(classes)),
            "mean": float(classes.mean()),
            "max": int(classes.max()),
        },
        "total_variation": {
            "mean": float(distances.mean()),
            "max": float(distances.max()),
            "by_chance": float(by_chance.mean()),
        },
    }


def _total_variation(counts: Ints, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    laws = counts / counts.sum(axis=1, keepdims=True)
    return np.asarray(np.abs(laws - shares).sum(axis=1) / 2)


def draw_partition(data: FederatedData, path: Path | str) -> None:
    """Draw which client holds how much of which class, and write it as an image.

    Up to 60 clients are stacked bars in the order of their ids. More are columns, sorted by the
    class of which they hold most: their sizes above, the shares of the classes below; beyond 1,000
    a column is the mean of neighbours.

    Args:
        data: The federated data; of more than 10,000 clients the first 1,000 are drawn.
        path: File to write, by its suffix png, svg or pdf.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts, complete = label_counts(data)
    colors = _class_colors(data.num_labels)
    # no pyplot: its figures are global state, and its backend may want a display
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if len(counts) <= _BARS:
        _draw_bars(figure, counts, colors)
    else:
        _draw_columns(figure, counts, colors)
    figure.suptitle(_title(data, counts, complete), fontsize=11)
    _add_legend(figure, colors)
    figure.savefig(path)


def _title(data: FederatedData, counts: Ints, complete: bool) -> str:
    rule = data.manifest["partition"]
    arguments = ", ".join(
        f"{key}={rule[key]}"
        for key in ("alpha", "balanced", "min_size", "seed")
        if rule.get(key) or key == "seed"
    )
    whose = "with" if complete else f"of whom the first {len(counts):,} are drawn, with"
    return (
        f"{data.manifest['data']['name']}, {rule['kind']} ({arguments}): "
        f"{data.num_clients:,} clients {whose} {int(counts.sum()):,} training samples"
    )


def _class_colors(classes: int) -> npt.NDArray[np.float64]:
    import matplotlib

    name = "tab10" if classes <= 10 else "tab20" if classes <= 20 else "turbo"
    colormap = matplotlib.colormaps[name]
    places = np.arange(classes) if classes <= 20 else np.linspace(0, 1, classes)
    return np.asarray(colormap(places))[:, :3]


def _draw_bars(figure: Any, counts: Ints, colors: npt.NDArray[np.float64]) -> None:
    axes = figure.add_subplot()
    ids = np.arange(len(counts))
    bottoms = np.cumsum(counts, axis=1) - counts
    for label, color in enumerate(colors):
        axes.bar(ids, counts[:, label], bottom=bottoms[:, label], color=color, width=0.9)
    axes.set_xlim(-0.7, len(counts) - 0.3)
    axes.set_xticks(ids[:: 1 if len(counts) <= 30 else 5])
    axes.set_xlabel("client")
    axes.set_ylabel("training samples")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_columns(figure: Any, counts: Ints, colors: npt.NDArray[np.float64]) -> None:
    sizes = counts.sum(axis=1)
    laws = counts / np.maximum(sizes, 1)[:, None]
    main = np.where(
        sizes > 0, laws.argmax(axis=1), len(colors)
    )  # clients without samples come last
    order = np.lexsort((-laws.max(axis=1), main))
    groups = np.array_split(order, min(len(order), _COLUMNS))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    edges = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
    above.stairs([sizes[group].mean() for group in groups], edges, fill=True, color="0.6")
    above.set_ylabel("samples")
    above.set_ylim(bottom=0)
    bottom = np.zeros(len(groups))
    shares = np.stack([laws[group].mean(axis=0) for group in groups])
    for label, color in enumerate(colors):
        top = bottom + shares[:, label]
        below.stairs(top, edges, baseline=bottom, fill=True, color=color, linewidth=0)
        bottom = top
    below.set_xlim(0, len(order))
    below.set_ylim(0, 1)
    below.set_ylabel("share of classes")
    empty = int((sizes == 0).sum())
    without = f"; the last {empty:,} hold no sample" if empty else ""
    below.set_xlabel(f"clients, sorted by the class they hold most of{without}")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Any, colors: npt.NDArray[np.float64]) -> None:
    from matplotlib.patches import Patch

    classes = len(colors)
    shown = range(classes) if classes <= 20 else np.linspace(0, classes - 1, 11).astype(int)
    figure.legend(
        handles=[Patch(color=colors[label], label=str(label)) for label in shown],
        title="class",
        loc="outside right upper",
        frameon=False,
        fontsize=9,
    )
