"""What a partition looks like, in numbers and as a picture."""

import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.data.federated import FederatedData, Ints, size_summary
from fedsim.data.partitions.named import PARTITIONS
from fedsim.data.partitions.skew import FeatureSkew

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
    distinct = min(clients, data.num_parts)
    counts = np.zeros((distinct, data.num_labels), dtype=np.int64)
    for start in range(0, distinct, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, distinct))
        for client_id, labels in zip(ids, data.labels(ids), strict=True):
            counts[client_id] = np.bincount(labels, minlength=data.num_labels)
    if clients > distinct:  # the others hold what these hold
        counts = counts[np.arange(clients) % distinct]
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
        dropped: Samples that no client got, and the reason.
        sizes: min, median, mean and max of training samples per client, and how many have none.
        label_kind: "class", or "tenth" where the targets are numbers: a tenth of their
            distribution.
        labels: Per class or tenth: its name (a tenth's: the targets from which to which), samples,
            their share, and how many clients hold any.
        classes_per_client: min, median, mean and max over the clients that hold samples.
        total_variation: mean and max, over the clients that hold samples, of the total-variation
            distance between the client's label law and that of all counted, in [0, 1]. Small
            clients differ by chance too: `by_chance` is the mean for clients of the same sizes that
            all follow the common law.
        feature_skew: The keys by which the features of clients differ, with their values.
        owners: Where clients are natural owners: how many there are in the data, in training and
            with a client, and the names of the first clients' owners.
    """
    counts, complete = label_counts(data)
    sizes = counts.sum(axis=1)
    totals = counts.sum(axis=0)
    shares = totals / max(int(totals.sum()), 1)
    held = counts[sizes > 0] if sizes.any() else np.ones((1, data.num_labels), dtype=np.int64)
    distances = _total_variation(held, shares)
    chance = rng.generator(data.manifest["partition"]["seed"], "statistics")
    by_chance = _total_variation(chance.multinomial(held.sum(axis=1), shares), shares)
    classes = (held > 0).sum(axis=1)
    names = label_names(data, len(counts))
    return {
        "clients": data.num_clients,
        "counted": len(counts),
        "complete": complete,
        "samples": int(totals.sum()),
        "held_out": len(data.test.targets),
        "dropped": data.manifest.get("dropped", {"samples": 0, "reason": None}),
        "sizes": size_summary(sizes),
        "label_kind": label_kind(data),
        "labels": [
            {
                "label": label,
                "name": names[label],
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
        "feature_skew": _feature_skew(data),
        "owners": data.manifest.get("owners"),
    }


def label_kind(data: FederatedData) -> str:
    """Return what labels are: "class", or "tenth" of the distribution of targets of numbers."""
    return "class" if data.spec.has_classes else "tenth"


def label_names(data: FederatedData, clients: int) -> list[str]:
    """Return what the data set calls its classes; of tenths, the targets from which to which.

    Args:
        data: The federation.
        clients: How many clients are looked at to find where tenths begin and end.
    """
    if data.spec.has_classes:
        known = data.manifest["data"].get("label_names") or []
        return [str(name) for name in known] or [str(c) for c in range(data.num_labels)]
    low, high = np.full(data.num_labels, np.inf), np.full(data.num_labels, -np.inf)
    for start in range(0, clients, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, clients))
        held = data.clients(ids)
        labels = np.concatenate(data.labels(ids))
        rows = np.concatenate(held.rows)
        first = held.targets.reshape(len(held.targets), -1)[rows, 0]
        np.minimum.at(low, labels, first)
        np.maximum.at(high, labels, first)
    return [f"{a:.4g} to {b:.4g}" if a <= b else "none" for a, b in zip(low, high, strict=True)]


def _feature_skew(data: FederatedData) -> dict[str, Any]:
    rule = data.manifest["partition"]
    return {key: rule[key] for key in FeatureSkew._fields if np.any(rule.get(key))}


def _total_variation(counts: Ints, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    laws = counts / counts.sum(axis=1, keepdims=True)
    return np.asarray(np.abs(laws - shares).sum(axis=1) / 2)


def draw_partition(data: FederatedData, path: Path | str) -> None:
    """Draw which client holds how much of which class, and write it as an image.

    Up to 60 clients are stacked bars in the order of their ids. More are columns, sorted by their
    most frequent class: their sizes above, the shares of the classes below; beyond 1,000
    a column is the mean of neighbours.

    Args:
        data: The federated data; of more than 10,000 clients the first 1,000 are drawn.
        path: File to write, by its suffix png, svg or pdf.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts, complete = label_counts(data)
    colors = _label_colors(data)
    # no pyplot: its figures are global state, and its backend may want a display
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if len(counts) <= _BARS:
        top = _draw_bars(figure, counts, colors)
        _name_owners(top, data)
    else:
        top = _draw_columns(figure, counts, colors, label_kind(data))
    top.set_title(_title(data, counts, complete), fontsize=10, loc="left")
    _add_legend(figure, colors, label_kind(data), label_names(data, len(counts)))
    figure.savefig(path)


def _title(data: FederatedData, counts: Ints, complete: bool) -> str:
    rule = data.manifest["partition"]
    whose = "with" if complete else f"of whom the first {len(counts):,} are drawn, with"
    what = (
        f"{data.manifest['data']['name']}, {rule['kind']}: {data.num_clients:,} clients {whose} "
        f"{int(counts.sum()):,} training samples"
    )
    return "\n".join([what, *textwrap.wrap(_arguments(rule), 110)])


def _arguments(rule: Mapping[str, Any]) -> str:
    """The keys of a rule that say something, as a title has room for."""
    law = rule.get("law")
    silent = {"clients", "path", "" if law == "log_normal" else "sigma"}
    silent |= {"" if law == "power" else "exponent"}
    known = PARTITIONS.get(rule["kind"])
    keys = [] if known is None else list(inspect.signature(known).parameters)
    shown = [(key, rule.get(key)) for key in keys if key not in silent and np.any(rule.get(key))]
    lists = [f"{key}={'[...]' if isinstance(v, list | tuple) else v}" for key, v in shown]
    return ", ".join([*lists, f"seed={rule['seed']}"])


def _label_colors(data: FederatedData) -> npt.NDArray[np.float64]:
    import matplotlib

    labels = data.num_labels
    spread = np.linspace(0, 1, labels)
    if not data.spec.has_classes:  # tenths have an order
        return np.asarray(matplotlib.colormaps["viridis"](spread))[:, :3]
    if labels > 20:
        return np.asarray(matplotlib.colormaps["turbo"](spread))[:, :3]
    name = "tab10" if labels <= 10 else "tab20"
    return np.asarray(matplotlib.colormaps[name](np.arange(labels)))[:, :3]


def _draw_bars(figure: Any, counts: Ints, colors: npt.NDArray[np.float64]) -> Any:
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
    return axes


def _name_owners(axes: Any, data: FederatedData) -> None:
    """Write whose samples a client holds below its bar."""
    owners = data.manifest.get("owners")
    if owners is None or owners["with_a_client"] != data.num_clients:  # lists are too long
        return
    names = [_short(name) for name in owners["of_first_clients"]]
    crowded = len(names) * max(map(len, names)) > 100
    axes.set_xticks(np.arange(len(names)), names, rotation=90 if crowded else 0, fontsize=9)
    axes.set_xlabel("client: natural owner")


def _draw_columns(figure: Any, counts: Ints, colors: npt.NDArray[np.float64], kind: str) -> Any:
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
    below.set_ylabel(f"share of {'classes' if kind == 'class' else 'tenths of targets'}")
    empty = int((sizes == 0).sum())
    without = f"; the last {empty:,} hold no sample" if empty else ""
    below.set_xlabel(f"clients, sorted by the {kind} they hold most of{without}")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return above


def _add_legend(figure: Any, colors: npt.NDArray[np.float64], kind: str, names: list[str]) -> None:
    from matplotlib.patches import Patch

    classes = len(colors)
    shown = range(classes) if classes <= 20 else np.linspace(0, classes - 1, 11).astype(int)
    figure.legend(
        handles=[Patch(color=colors[label], label=_short(names[label])) for label in shown],
        title="class" if kind == "class" else "targets",
        loc="outside right upper",
        frameon=False,
        fontsize=9,
    )


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
