"""What tuning found: as lines, rows and a picture."""

import csv
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.studies.comparison.pictures import COLOURS, new_figure
from fedsim.studies.comparison.tables import grid as table
from fedsim.studies.comparison.tables import number
from fedsim.studies.tuning.points import as_numbers
from fedsim.studies.tuning.tune import Candidate, Tuned


def tuned_lines(tuned: Tuned, *, width: int) -> list[str]:
    """Return the table of all points and methods, and what is best."""
    seeds = len(tuned.seeds)
    lines = [
        *textwrap.wrap(
            f"{tuned.metric} over {seeds} {'seed' if seeds == 1 else 'seeds'} apart, from "
            f"{tuned.seeds[0]} on; * is best; (1) was stopped after 1 seed",
            width,
        ),
        "",
    ]
    rows = []
    for point in tuned.grid.points:
        at = {c.method: c for c in tuned.candidates if c.point == point}
        rows.append([*point, *(_cell(tuned, at[m]) for m in range(len(tuned.methods)))])
    head = [*tuned.grid.keys, *(name or tuned.metric for name in tuned.methods)]
    lines += [*table(head, rows, width=width, left=len(tuned.grid.keys)), ""]
    for method, name in enumerate(tuned.methods):
        settings = " ".join(f"--set {each}" for each in tuned.settings(method))
        lines.append(f"{name or 'best'}: {settings or 'every point broke off'}")
    for note in tuned.notes:
        lines += ["", *textwrap.wrap(note, width, break_on_hyphens=False)]
    return lines


def _cell(tuned: Tuned, candidate: Candidate) -> str:
    if candidate.failure is not None or not math.isfinite(candidate.mean.mean):
        return "broke off  "
    best = "*" if candidate is tuned.best[candidate.method] else " "
    tried = len(candidate.values)
    stopped = f"({tried})" if tried < len(tuned.seeds) else ""
    return f"{stopped} {number(candidate.mean.mean)} {best}".strip(" ") + " " * (best == " ") * 2


def tuned_document(tuned: Tuned) -> dict[str, Any]:
    """Return what tuning found as one JSON-able document."""
    return {
        "metric": tuned.metric,
        "seeds": list(tuned.seeds),
        "grid": {axis.key: list(axis.values) for axis in tuned.grid.axes},
        "drawn": [list(point) for point in tuned.grid.drawn],
        "best": [
            {
                "method": name,
                "set": tuned.settings(method),
                "mean": best.mean._asdict() if best else None,
                "on_edge": list(tuned.edges[method]),
            }
            for method, (name, best) in enumerate(zip(tuned.methods, tuned.best, strict=True))
        ],
        "candidates": [
            {
                "method": tuned.methods[c.method],
                "point": dict(zip(tuned.grid.keys, c.point, strict=True)),
                "values": {str(seed): value for seed, value in c.values.items()},
                "failure": c.failure,
                "stopped": not c.alive and c.failure is None,
            }
            for c in tuned.candidates
        ],
        "notes": list(tuned.notes),
    }


def write_tuned_csv(tuned: Tuned, path: Path) -> None:
    """Write a row per method, point and seed."""
    rows: list[Sequence[Any]] = [["method", *tuned.grid.keys, "seed", tuned.metric, "failure"]]
    for c in tuned.candidates:
        name = tuned.methods[c.method]
        rows += [[name, *c.point, seed, value, ""] for seed, value in c.values.items()]
        if c.failure is not None:
            rows.append([name, *c.point, "", "", c.failure])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def draw_tuned(tuned: Tuned, path: Path) -> None:
    """Draw the metric over each key, a line or dots per method, the best one ringed.

    Args:
        tuned: What was found.
        path: File to write, by its suffix png, svg or pdf.
    """
    keys = tuned.grid.keys
    figure = new_figure((4.2 if len(tuned.methods) > 1 else 1.6) + 4.0 * len(keys), 3.8)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for place, (key, panel) in enumerate(zip(keys, panels, strict=True)):
        values = list(dict.fromkeys(point[place] for point in tuned.grid.points))
        numbers = as_numbers(values)
        where = dict(zip(values, numbers or range(len(values)), strict=True))
        for method, name in enumerate(tuned.methods):
            colour = COLOURS[method % len(COLOURS)]
            sound = [c for c in tuned.candidates if c.method == method and _sound(c)]
            sound.sort(key=lambda c: where[c.point[place]])
            at = [where[c.point[place]] for c in sound]
            means = [c.mean.mean for c in sound]
            line = "-" if len(keys) == 1 else ""
            panel.plot(
                at, means, marker="o", markersize=4, linestyle=line, color=colour, label=name
            )
            if best := tuned.best[method]:
                panel.plot(
                    where[best.point[place]], best.mean.mean, "o", markersize=11,
                    markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.6,
                )  # fmt: skip
        if numbers is not None:
            panel.set_xscale("log")
        panel.set_xticks(list(where.values()), list(where))
        panel.minorticks_off()
        if len(values) > 8:
            panel.tick_params(axis="x", rotation=60)
        panel.set_xlabel(key)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(f"{tuned.metric}, mean over seeds apart")
    if len(tuned.methods) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path)


def _sound(candidate: Candidate) -> bool:
    return candidate.failure is None and math.isfinite(candidate.mean.mean)
