"""A comparison as pictures: learning curves with their bands, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.studies.cells.outcome import RunOutcome
from fedsim.studies.comparison.compare import Comparison
from fedsim.studies.comparison.intervals import mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = 12  # beyond these a picture is cut, and says so
_ACROSS = 3
# Okabe and Ito's colours, which people who see colours differently tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c6d00")


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Draw the metric over the rounds: means over seeds, and their 95 % intervals as bands.

    There is a panel for each combination of values of the axes other than the baseline's.

    Args:
        comparison: What was compared.
        path: File to write, by its suffix png, svg or pdf.
    """
    panels = _panels(comparison)
    shown = list(panels.items())[:_PANELS]
    across = min(_ACROSS, len(shown))
    down = math.ceil(len(shown) / across)
    figure = new_figure(3.2 + 3.4 * across, 0.8 + 2.7 * down)
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    colours = _colours(comparison)
    handles: dict[str, Any] = {}
    for place, (title, variants) in enumerate(shown):
        panel = axes[place // across][place % across]
        for variant in variants:
            name = _series(comparison, variant)
            rounds, mean, low, high = _band(comparison.outcomes[variant])
            if not rounds:
                continue
            (handles[name],) = panel.plot(rounds, mean, color=colours[name], linewidth=1.6)
            panel.fill_between(rounds, low, high, color=colours[name], alpha=0.18, linewidth=0)
        target = comparison.question.target
        if target is not None and target.metric == comparison.metric:
            panel.axhline(target.value, color="0.45", linewidth=0.8, linestyle="--")
        panel.set_title(title, fontsize="medium")
        panel.grid(alpha=0.25)
    for place in range(len(shown), across * down):
        axes[place // across][place % across].set_visible(False)
        axes[place // across - 1][place % across].tick_params(labelbottom=True)
    figure.supxlabel("round", fontsize="medium")
    figure.supylabel(comparison.metric, fontsize="medium")
    cut = f" (the first {_PANELS} of {len(panels)})" if len(panels) > _PANELS else ""
    figure.suptitle(f"means over seeds with 95 % intervals{cut}", fontsize="medium")
    if len(handles) > 1 or comparison.axis:
        figure.legend(
            list(handles.values()), list(handles), title=comparison.axis, loc="outside right center"
        )
    figure.savefig(path)


def draw_differences(comparison: Comparison, path: Path) -> None:
    """Draw the paired differences: a dot per seed, their mean and its 95 % interval.

    Args:
        comparison: What was compared; it has differences.
        path: File to write, by its suffix png, svg or pdf.
    """
    axis = comparison.axis or ""
    held = comparison.differences
    base = comparison.variants[held[0].against].labels[axis]
    figure = new_figure(7.5, 1.4 + 0.5 * len(held))
    panel = figure.subplots()
    colours = _colours(comparison)
    panel.axvline(0, color="0.4", linewidth=1)
    for row, each in enumerate(held):
        colour = colours[_series(comparison, each.variant)]
        ours, theirs = comparison.values(each.variant), comparison.values(each.against)
        seeds = [seed for seed in ours if seed in theirs]
        dots = [ours[seed] - theirs[seed] for seed in seeds]
        panel.scatter(dots, [row - 0.16] * len(dots), s=14, color=colour, alpha=0.45, linewidths=0)
        found = each.paired
        if math.isfinite(found.low):
            panel.hlines(row, found.low, found.high, color=colour, linewidth=2)
        panel.scatter([found.mean], [row], s=42, color=colour, zorder=3)
    names = [comparison.variants[each.variant].labels for each in held]
    panel.set_yticks(range(len(held)), [_words(labels, axis) for labels in names])
    panel.set_ylim(len(held) - 0.5, -0.5)
    panel.set_xlabel(
        f"{comparison.metric}, minus {axis} = {base}\nmean and 95 % interval; a small dot per seed"
    )
    panel.grid(axis="x", alpha=0.25)
    figure.savefig(path)


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of that many inches, of no backend's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: its figures are global state, and its backend may want a display
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(comparison: Comparison) -> dict[str, list[int]]:
    """The places of variants by what they have in common besides the baseline's axis."""
    panels: dict[str, list[int]] = {}
    for place, variant in enumerate(comparison.variants):
        rest = {key: v for key, v in variant.labels.items() if key != comparison.axis}
        title = ", ".join(f"{key} = {value}" for key, value in rest.items())
        panels.setdefault(title, []).append(place)
    return panels


def _series(comparison: Comparison, place: int) -> str:
    return comparison.variants[place].labels.get(comparison.axis or "", "")


def _colours(comparison: Comparison) -> dict[str, str]:
    names = dict.fromkeys(_series(comparison, p) for p in range(len(comparison.variants)))
    return {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}


def _words(labels: Mapping[str, str], axis: str) -> str:
    rest = [f"{key} = {value}" for key, value in labels.items() if key != axis]
    return "\n".join([labels[axis], *([", ".join(rest)] if rest else [])])


def _band(
    outcomes: Mapping[int, RunOutcome],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return rounds, means and interval's ends, where every seed has a value."""
    curves = [outcome.curve for outcome in outcomes.values()]
    if not curves:
        return [], [], [], []
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    found = [mean_interval([curve[at] for curve in curves]) for at in rounds]
    return rounds, *_columns(found)


def _columns(found: Sequence[Any]) -> tuple[list[float], list[float], list[float]]:
    return [f.mean for f in found], [f.low for f in found], [f.high for f in found]
