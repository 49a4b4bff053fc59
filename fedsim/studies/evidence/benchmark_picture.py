"""A benchmark as a picture: a panel per setting, a row per arm, dots with their intervals."""

import math
from pathlib import Path
from typing import Any

from fedsim.studies.comparison.intervals import Mean
from fedsim.studies.comparison.pictures import COLOURS, new_figure
from fedsim.studies.evidence.benchmark import BenchmarkResult, SettingScores
from fedsim.studies.evidence.markdown import scale_of

_OFF = 0.17  # rows that the two dots of an arm stand above and below its middle


def draw_benchmark(found: BenchmarkResult, path: Path) -> None:
    """Draw the arms' means over clients and their worst tenths, with 95 % intervals over seeds.

    Args:
        found: What was found.
        path: File to write, by its suffix png, svg or pdf.
    """
    arms, count = found.declared.arms, len(found.settings)
    figure = new_figure(2.0 + 3.1 * count, 1.5 + 0.36 * len(arms))
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    scale = scale_of(found.declared.document.metric)
    for panel, one in zip(panels, found.settings, strict=True):
        _draw_setting(panel, one, scale)
        panel.set_title(one.setting.title, fontsize="medium")
        panel.set_xlabel("%" if scale == 100 else found.declared.document.metric)
        panel.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    for label, arm in zip(panels[0].get_yticklabels(), arms, strict=True):
        label.set_style("italic" if arm.reference else "normal")
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path)


def _draw_setting(panel: Any, one: SettingScores, scale: float) -> None:
    baseline = one.declared.baselines[0]
    panel.axvline(
        scale * one.mean(baseline).mean, color="0.55", linewidth=1, linestyle="--",
        label=f"{one.declared.arms[baseline].name}, mean over clients", zorder=0,
    )  # fmt: skip
    both = (
        ("mean over clients", COLOURS[0], -_OFF, one.mean, "o"),
        ("worst tenth of the clients", COLOURS[1], _OFF, one.worst, "D"),
    )
    for label, colour, off, mean_of, marker in both:
        known = {at: mean for at in range(len(one.scores)) if (mean := mean_of(at)) is not None}
        means, rows = list(known.values()), [at + off for at in known]
        _draw_dots(panel, means, rows, scale, label=label, colour=colour, marker=marker)


def _draw_dots(
    panel: Any, means: list[Mean], rows: list[float], scale: float, *, label: str,
    colour: str, marker: str,
) -> None:  # fmt: skip
    known = [(m, row) for m, row in zip(means, rows, strict=True) if math.isfinite(m.low)]
    panel.hlines(
        [row for _, row in known], [scale * m.low for m, _ in known],
        [scale * m.high for m, _ in known], color=colour, linewidth=1.8,
    )  # fmt: skip
    panel.scatter(
        [scale * m.mean for m in means], rows, s=22, color=colour, marker=marker, label=label,
        zorder=3,
    )  # fmt: skip
