"""A comparison as lines for a terminal and rows for a spreadsheet."""

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedsim.basics.text import in_bytes
from fedsim.runs.progress import duration
from fedsim.studies.cells.arms import ARM_AXIS
from fedsim.studies.cells.outcome import NEVER, Cost
from fedsim.studies.comparison.compare import Comparison
from fedsim.studies.comparison.intervals import Mean, median

_DASH = "-"


def comparison_lines(comparison: Comparison, *, width: int) -> list[str]:
    """Return the tables of a comparison.

    Args:
        comparison: What was compared.
        width: Of the terminal.
    """
    question, keys = comparison.question, comparison.keys or ["scenario"]
    share = f"mean of the last {100 * question.last:g} % of the rounds"
    lines = [f"{comparison.metric}, {share}; intervals are 95 % over seeds", ""]
    rows = []
    for place in range(len(comparison.variants)):
        worst = comparison.worst(place)
        total = _medians([o.total for o in comparison.outcomes[place].values()])
        rows.append(
            [
                *_labels(comparison, place),
                str(len(comparison.outcomes[place])),
                *_mean_cells(comparison.mean(place)),
                *([number(worst.mean)] if worst else [_DASH] * _any_worst(comparison)),
                *_cost_cells(total),
            ]
        )
    worst_head = ["worst 10 %"] if _any_worst(comparison) else []
    head = [*keys, "seeds", "mean", "interval", *worst_head, "rounds", "bytes", "time"]
    lines += grid(head, rows, width=width, left=len(keys))
    if comparison.differences:
        lines += ["", *_difference_lines(comparison, width)]
    if comparison.gaps:
        lines += ["", *_gap_lines(comparison, width)]
    if question.target is not None:
        lines += ["", *_target_lines(comparison, width)]
    said = [f"failed: {name}: {reason}" for name, reason in comparison.failures.items()]
    for text in (*said, *comparison.notes):
        lines += ["", *textwrap.wrap(text, width, break_on_hyphens=False)]
    return lines


def _any_worst(comparison: Comparison) -> bool:
    return any(comparison.worst(place) for place in range(len(comparison.variants)))


def _difference_lines(comparison: Comparison, width: int) -> list[str]:
    keys, axis = comparison.keys, comparison.axis or ""
    base = comparison.variants[comparison.differences[0].against].labels[axis]
    rows = []
    for each in comparison.differences:
        found = each.paired
        rows.append(
            [
                *_labels(comparison, each.variant),
                *_mean_cells(Mean(*found[:4]), sign=True),
                f"{found.above}/{found.n}",
                f"{found.p:.2g}" if math.isfinite(found.p) else _DASH,
            ]
        )
    head = [*keys, f"minus {base}", "interval", "above", "p"]
    words = "paired by seed; above: in how many seeds; p: of the sign-flip test"
    return [words, *grid(head, rows, width=width, left=len(keys))]


def _gap_lines(comparison: Comparison, width: int) -> list[str]:
    keys = [key for key in comparison.keys if key != ARM_AXIS] or [ARM_AXIS]
    rows = []
    for gap in comparison.gaps:
        labels = comparison.variants[gap.variant].labels
        closed = gap.closed
        cells = _mean_cells(Mean(closed.n, closed.ratio, closed.low, closed.high))
        rows.append([*(labels.get(key, _DASH) for key in keys), str(closed.n), *cells])
    words = (
        "gap closed: (federated - local) / (centralised - local), paired by seed; no interval "
        "where the two arms may be equal"
    )
    head = [*keys, "seeds", "gap closed", "interval"]
    return [*textwrap.wrap(words, width), *grid(head, rows, width=width, left=len(keys))]


def _target_lines(comparison: Comparison, width: int) -> list[str]:
    target = comparison.question.target
    assert target is not None
    rows = []
    for place in range(len(comparison.variants)):
        costs = [o.to_target for o in comparison.outcomes[place].values() if o.to_target]
        reached = sum(cost != NEVER for cost in costs)
        rows.append(
            [*_labels(comparison, place), f"{reached}/{len(costs)}", *_cost_cells(_medians(costs))]
        )
    head = [*(comparison.keys or ["scenario"]), "reached", "rounds", "bytes", "time"]
    words = f"to {target.metric} = {target.value:g}: medians over all seeds, never is infinite"
    return [words, *grid(head, rows, width=width, left=len(comparison.keys or ["scenario"]))]


def _labels(comparison: Comparison, place: int) -> list[str]:
    variant = comparison.variants[place]
    return [variant.labels.get(key, _DASH) for key in comparison.keys] or [variant.name]


def _medians(costs: Sequence[Cost]) -> Cost:
    columns = zip(*costs, strict=True) if costs else [(), (), ()]
    return Cost(*(median(column) for column in columns))


def _cost_cells(cost: Cost) -> list[str]:
    if math.isnan(cost.rounds):
        return [_DASH] * 3
    if math.isinf(cost.rounds):
        return ["never", _DASH, _DASH]
    seconds = f"{cost.seconds:.1f} s" if cost.seconds < 60 else duration(cost.seconds)
    return [f"{cost.rounds:g}", in_bytes(cost.bytes), seconds]


def _mean_cells(mean: Mean, *, sign: bool = False) -> list[str]:
    if math.isnan(mean.mean):
        return [_DASH, _DASH]
    if math.isnan(mean.low):
        return [number(mean.mean, sign=sign), _DASH]
    ends = f"[{number(mean.low, sign=sign)}, {number(mean.high, sign=sign)}]"
    return [number(mean.mean, sign=sign), ends]


def number(value: float, *, sign: bool = False) -> str:
    """Write a number with four decimals where it is of a share's size, else four digits."""
    if not math.isfinite(value):
        return _DASH
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if 1e-4 <= abs(value) < 10 or not value else f"{value:{plus}.4g}"


def grid(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, width: int, left: int = 1
) -> list[str]:
    """Return the lines of a table; what is too long for the terminal is folded within its cell.

    Args:
        head: What the columns are.
        rows: Cells.
        width: Of the terminal.
        left: So many first columns stand on the left and may be folded, the others on the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    columns = list(zip(*([head, *rows]), strict=True))
    narrow = sum(max(map(len, column)) + 2 for column in columns) - 2 > width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for place, title in enumerate(head):
        justify: Any = "left" if place < left else "right"
        # a key is broken at its dot where the terminal is narrow, and nowhere else
        shown = title.replace(".", ".\n", 1) if narrow and place < left else title
        least = max(map(len, shown.splitlines()), default=1)
        table.add_column(
            shown, justify=justify, no_wrap=place >= left, overflow="fold", min_width=least
        )
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=max(width, 40), color_system=None, emoji=False, markup=False).print(
        table
    )
    return [line.rstrip() for line in text.getvalue().splitlines()]


def write_csv(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `compare.csv`, a row per variant, and `runs.csv`, a row per run; return their paths."""
    keys = comparison.keys or ["scenario"]
    ends = ("mean", "low", "high")
    by_variant = {d.variant: d for d in comparison.differences}
    closed = {gap.variant: gap.closed for gap in comparison.gaps}
    head = [
        *keys, "seeds", *ends, *(f"worst_decile_{e}" for e in ends), "minus",
        *(f"difference_{e}" for e in ends), "pairs", "above", "p", "rounds", "bytes", "seconds",
        "reached", "rounds_to_target", "bytes_to_target", "seconds_to_target",
        *((f"gap_closed_{e}" for e in ends) if closed else ()),
    ]  # fmt: skip
    rows, runs = [], []
    for place in range(len(comparison.variants)):
        outcomes = comparison.outcomes[place]
        mean, worst = comparison.mean(place), comparison.worst(place)
        held = by_variant.get(place)
        costs = [o.to_target for o in outcomes.values() if o.to_target]
        against = comparison.variants[held.against].name if held else ""
        rows.append(
            [
                *_labels(comparison, place), mean.n, *mean[1:],
                *(worst[1:] if worst else [""] * 3), against,
                *(held.paired[1:4] if held else [""] * 3),
                *((held.paired.n, held.paired.above, held.paired.p) if held else [""] * 3),
                *_medians([o.total for o in outcomes.values()]),
                *((sum(c != NEVER for c in costs), *_medians(costs)) if costs else [""] * 4),
                *(closed[place][1:] if place in closed else [""] * 3 * bool(closed)),
            ]
        )  # fmt: skip
        runs += [
            [
                *_labels(comparison, place), seed, outcome.value,
                "" if outcome.worst is None else outcome.worst, *outcome.total,
                *(outcome.to_target or [""] * 3), comparison.folders[place][seed],
            ]
            for seed, outcome in sorted(outcomes.items())
        ]  # fmt: skip
    run_head = [
        *keys, "seed", comparison.metric, "worst_decile", "rounds", "bytes", "seconds",
        "rounds_to_target", "bytes_to_target", "seconds_to_target", "folder",
    ]  # fmt: skip
    written = []
    for name, first, body in (("compare.csv", head, rows), ("runs.csv", run_head, runs)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([first, *body])
        (folder / name).write_text(text.getvalue(), encoding="utf-8")
        written.append(folder / name)
    return written
