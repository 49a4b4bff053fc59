"""The report: `docs/benchmarks.md` and its plot, made from the raw log alone."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.statistics import Interval, median_interval, met, paired_ratio
from benchmarks.workloads import (
    ALGORITHMS,
    BASELINE,
    BYTES_PER_CLIENT,
    DRAWN_TOLERANCE,
    FAMILIES,
    ONE_CORE,
    PEERS,
    RAY,
    SYSTEMS,
    TARGETS,
    WORKLOADS,
    Target,
)

KERNEL_TITLES = {
    "gram": "one Gram product, float64 over blocks",
    "flag": "Flag (`strategies.flag`)",
    "fedld": "FedLD (`strategies.fedld`)",
    "sort": "one sort of every column",
    "median": "coordinate median",
}
_SHOWN = ("torch", "numpy", "ray", "flwr", "pfl", "fedjax", "jax", "jaxlib", "dm-haiku")
Key = tuple[str, str]


class Log:
    """A raw log, by kind.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        self._kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in entries:
            self._kinds[entry["kind"]].append(entry)
        self.machine = self.of("machine")[0]
        self.starts: dict[Key, dict[str, Any]] = {_key(e): e for e in self.of("start")}
        self.turns: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
        for entry in self.of("turn"):
            self.turns[_key(entry)][entry["repeat"]] = entry

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of a kind."""
        return self._kinds[kind]

    def seconds(self, workload: str, system: str) -> dict[int, float]:
        """Return seconds per round by repeat."""
        turns = self.turns.get((workload, system), {})
        return {repeat: turn["seconds"] / turn["rounds"] for repeat, turn in turns.items()}

    def best(self, workload: str, systems: Iterable[str]) -> str | None:
        """Return the system with the lowest median, among those whose loss is right."""
        medians = {
            system: float(np.median([*self.seconds(workload, system).values()]))
            for system in systems
            if self.seconds(workload, system) and not self.strays(workload, system)
        }
        return min(medians, key=medians.__getitem__) if medians else None

    def strays(self, workload: str, system: str) -> str | None:
        """Say how a system's loss differs from the reference's, if it does.

        Both the timed process (every system draws cohorts of its own) and the check (the same
        clients in every round) count; the check of a model holds wherever the model is used.
        """
        for kind in ("loss", "check") if system in SYSTEMS else ():
            losses = {_key(e): e for e in self.of(kind)}
            row = system if kind == "loss" else FAMILIES[system.partition("-")[0]][0]
            mine = losses.get((self._checked(kind, workload), row))
            if mine is None:
                continue
            other = losses.get((mine["workload"], mine["reference"]))
            if other is None:
                continue
            allowed = mine["tolerance"] * other["loss"]
            if kind == "loss":
                allowed = max(allowed, DRAWN_TOLERANCE)
            if abs(mine["loss"] - other["loss"]) > allowed:
                return f"{mine['loss']:.4f}, not {other['loss']:.4f}"
        for entry in self.of("agreement"):
            rows = (entry["system"], entry["reference"])
            # of two models that are apart nobody knows which is right; a nan is apart too
            if (
                entry["workload"] == workload
                and system in rows
                and not entry["difference"] <= entry["bound"]
            ):
                return f"{rows[0]} is {entry['difference']:.1e} from {rows[1]}"
        return None

    def _checked(self, kind: str, workload: str) -> str:
        if kind == "loss" or workload not in WORKLOADS:
            return workload
        own = WORKLOADS[workload]
        for entry in self.of(kind):
            other = WORKLOADS[entry["workload"]]
            if (other.model, other.pool) == (own.model, own.pool):
                return str(entry["workload"])
        return workload

    def ratio(self, target: Target) -> tuple[str, str, Interval] | None:
        """Return the rows of a target and the ratio of their times, if both were timed."""
        slow, fast = self.best(*target.slow), self.best(*target.fast)
        if slow is None or fast is None:
            return None
        a, b = self.seconds(target.slow[0], slow), self.seconds(target.fast[0], fast)
        both = sorted(a.keys() & b.keys())
        scale = self._scale(target.slow[0], slow) / self._scale(target.fast[0], fast)
        if not both:
            return None
        found = paired_ratio([a[r] for r in both], [b[r] for r in both])
        return slow, fast, Interval(*(value * scale for value in found))

    def _scale(self, workload: str, system: str) -> float:
        """How much more a kernel has to do than it was timed on."""
        start = self.starts.get((workload, system), {})
        part = system in ("sort", "median") and "coordinates" in start
        return start["dim"] / start["coordinates"] if part else 1.0


def write(log_file: Path, docs: Path) -> None:
    """Write the report beside its plot.

    Args:
        log_file: The raw log.
        docs: Folder of `benchmarks.md`.
    """
    log = Log(log_file)
    parts = [_head(log), _targets(log), *(_workload(log, w) for w in PEERS)]
    parts += [
        _algorithms(log),
        _kernels(log),
        _million(log),
        _scaling(log),
        _troubles(log),
        _versions(log),
    ]
    docs.mkdir(exist_ok=True)
    (docs / "benchmarks.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    _plot(log, docs / "benchmarks.png")


def _head(log: Log) -> str:
    m = log.machine
    done = log.of("done")
    took = f" The run took {done[0]['seconds'] / 60:.0f} minutes." if done else ""
    return f"""# Benchmarks

Generated by `make bench` from `benchmarks/results/raw.jsonl`; no figure is edited by hand.

{m["cpu"]}, {m["cores"]} cores, {m["memory_bytes"] / 2**30:.0f} GiB; {m["system"]}, Python \
{m["python"]}; commit {m["commit"]}, {m["when"]} UTC, load {m["load"]:.1f} at the start.{took}

All systems are started, run ten rounds, and then take turns: one turn each per repeat, \
{m["repeats"]} repeats, in an order that moves on by one. Seconds per round are a turn's time \
divided by its rounds; a ratio is taken within a repeat, and its interval is the 95 % bootstrap \
interval of the median over repeats. fedsim is timed as `fedsim run` runs it, with metrics, \
records and a checkpoint every ten rounds. Client c of every system holds share c mod 100 of the \
same pool of random images (28x28, ten classes, 200 per share); batches of 20, one epoch, step \
0.1, FedAvg weighted by examples, evaluation off. A system counts only if the loss of its model \
over the pool after ten rounds is within 10 % of the bare torch loop's, both when the same twenty \
clients take part in every round and with cohorts of its own; there {DRAWN_TOLERANCE:g} nats are \
allowed too, for where next to nothing is left to learn the cohorts drawn decide how little.

![Seconds per round](benchmarks.png)"""


def _targets(log: Log) -> str:
    rows = []
    for target in TARGETS:
        found = log.ratio(target)
        if found is None:
            continue
        slow, fast, ratio = found
        at = " / ".join(dict.fromkeys((target.slow[0], target.fast[0])))
        verdict = "yes" if met(ratio, target.bound, target.sense) else "**no**"
        rows.append(
            [
                at, _title(slow), _title(fast), f"{ratio.median:.2f}",
                f"{ratio.low:.2f} to {ratio.high:.2f}", f"{target.sense} {target.bound:g}", verdict,
            ]
        )  # fmt: skip
    if not rows:
        return ""
    head = ["", "time of", "divided by that of", "ratio", "95 %", "target", "met"]
    return (
        "## Targets\n\nA target is met when the whole interval is on its right side. fedsim's row "
        "is the better of its Ray rows, pfl-research's the better of one and two threads, Flower's "
        "of one and two workers; other algorithms than FedAvg have one process and one worker.\n\n"
        + _table(head, rows)
    )


def _workload(log: Log, workload: str) -> str:
    rows = []
    mine = log.best(workload, RAY)
    for system in SYSTEMS:
        seconds = log.seconds(workload, system)
        if not seconds:
            continue
        spread = median_interval([*seconds.values()])
        ratio = "1"
        if mine and system != mine:
            own = log.seconds(workload, mine)
            both = sorted(seconds.keys() & own.keys())
            found = paired_ratio([seconds[r] for r in both], [own[r] for r in both])
            ratio = f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"
        start = log.starts[workload, system]
        last = log.turns[workload, system][max(seconds)]
        strays = log.strays(workload, system)
        losses = [e["loss"] for e in log.of("loss") if _key(e) == (workload, system)]
        rows.append(
            [
                _title(system), f"{1000 * spread.median:.1f}",
                f"{1000 * min(seconds.values()):.1f} to {1000 * max(seconds.values()):.1f}",
                ratio, f"{start['start_s']:.1f}", f"{start['first_s']:.2f}",
                f"{last['memory']['all_pss'] / 2**20:.0f}",
                f"**differs: {strays}**" if strays else "".join(f"{v:.4f}" for v in losses[:1]),
            ]
        )  # fmt: skip
    if not rows:
        return ""
    head = [
        "", "ms per round", "range", "times fedsim's best Ray row", "start, s", "first round, s",
        "memory, MiB", "loss after 10 rounds",
    ]  # fmt: skip
    return f"## {workload}: {WORKLOADS[workload].title}\n\n" + _table(head, rows)


def _algorithms(log: Log) -> str:
    rows, (ours, flower) = [], ONE_CORE
    base = log.seconds(BASELINE, ours)
    for name, work in ALGORITHMS.items():
        mine, theirs = log.seconds(name, ours), log.seconds(name, flower)
        if not mine:
            continue
        apart = [e["difference"] for e in log.of("agreement") if e["workload"] == name]
        rows.append(
            [
                work.title, str(work.gradients), f"{1000 * float(np.median([*mine.values()])):.1f}",
                _over(mine, base), _over(mine, base, work.gradients),
                f"{1000 * float(np.median([*theirs.values()])):.1f}" if theirs else "",
                _over(theirs, mine), f"{apart[0]:.0e}" if apart else "",
            ]
        )  # fmt: skip
    if not rows:
        return ""
    head = [
        "", "gradients per step", "fedsim, inline, ms per round", "times FedAvg", "per gradient",
        "Flower simulation, 1 worker, ms per round", "times fedsim", "models apart",
    ]  # fmt: skip
    note = (
        "W2's model, data and cohort. At Flower each algorithm is a plain torch loop at the "
        "clients, with state in their context, and a strategy of Flower's or one built on its "
        "FedAvg; fedsim has one process, Flower one worker beside its own. Before they are timed "
        "both train twenty clients for ten rounds in float64, all of them in every round and on "
        "whole shares: the last column is the largest difference of the two models, over the "
        "largest number of one. fedsim writes a checkpoint every ten rounds, Flower none; those of "
        "SCAFFOLD, FedDyn and Ditto hold the states of all clients."
    )
    return f"## Other algorithms on W2\n\n{note}\n\n" + _table(head, rows)


def _over(slow: dict[int, float], fast: dict[int, float], times: int = 1) -> str:
    """The ratio of two rows' times, divided by a number, with its interval."""
    both = sorted(slow.keys() & fast.keys())
    if not both:
        return ""
    found = paired_ratio([slow[r] for r in both], [times * fast[r] for r in both])
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _kernels(log: Log) -> str:
    rows = []
    for kernel, title in KERNEL_TITLES.items():
        seconds = [*log.seconds("W6", kernel).values()]
        if seconds:
            scale = log._scale("W6", kernel)
            rows.append(
                [
                    title, f"{scale * float(np.median(seconds)):.2f}",
                    f"{scale * min(seconds):.2f} to {scale * max(seconds):.2f}",
                ]
            )  # fmt: skip
    if not rows:
        return ""
    start = log.starts["W6", "gram"]
    return (
        f"## W6: server kernels, K = {start['clients']}, dim {start['dim']:,}, float32, one thread"
        f"\n\nCoordinate-wise kernels were timed on {start['coordinates']:,} coordinates and are "
        "shown for all.\n\n" + _table(["", "s", "range"], rows)
    )


def _million(log: Log) -> str:
    lines = []
    name = "fedsim-inline"
    few, many = log.turns.get(("W4", name)), log.turns.get(("W5", name))
    if few and many:
        grown = _last(many)["memory"]["own_peak"] - _last(few)["memory"]["own_peak"]
        each = grown / (WORKLOADS["W5"].clients - WORKLOADS["W4"].clients)
        verdict = "met" if each <= BYTES_PER_CLIENT else "**missed**"
        lines.append(
            f"From W4 to W5 the peak resident memory of one process (inline) grows by {each:.0f} "
            f"bytes per registered client (at most {BYTES_PER_CLIENT}: {verdict})."
        )
        first = {w: log.starts[w, name]["first_s"] for w in ("W4", "W5")}
        lines.append(
            f"From the scenario to the end of round 1 it takes {first['W5']:.1f} s with a million "
            f"clients, {first['W4']:.1f} s with ten thousand."
        )
    return "## A million clients\n\n" + " ".join(lines) if lines else ""


def _scaling(log: Log) -> str:
    rows = []
    for entry in log.of("scale"):
        model = entry["model"]
        if entry["task"]:
            model += " " + "-".join(map(str, entry["task"]["hidden"]))
        seconds = float(np.median(entry["seconds"])) / entry["rounds"]
        rows.append(
            [
                entry["axis"], model, f"{entry['clients']:,}", str(entry["cohort"]), "inline",
                f"{1 / seconds:.1f}", f"{entry['memory']['own_peak'] / 2**20:.0f}",
            ]
        )  # fmt: skip
    for workload, work in PEERS.items():
        for system in ("fedsim-inline", *RAY):
            found = [*log.seconds(workload, system).values()]
            if found:
                memory = _last(log.turns[workload, system])["memory"]["all_pss"]
                rows.append(
                    [
                        "workers", f"{work.model} ({workload})", f"{work.clients:,}",
                        str(work.cohort), _title(system).removeprefix("fedsim, "),
                        f"{1 / float(np.median(found)):.1f}", f"{memory / 2**20:.0f}",
                    ]
                )  # fmt: skip
    if not rows:
        return ""
    head = ["varies", "model", "N", "K", "engine", "rounds per second", "memory, MiB"]
    note = (
        "Inline rows: the process's peak. Rows by workers: all processes of the run together, "
        "pages that they share counted once."
    )
    return f"## Scaling of fedsim\n\n{note}\n\n" + _table(head, rows)


def _troubles(log: Log) -> str:
    lines = [
        f"- {e['environment']} could not be installed: {e['reason']}" for e in log.of("refused")
    ]
    lines += [f"- {e['workload']} {e['system']}: {e['reason']}" for e in log.of("fallen")]
    return "## What did not run\n\n" + "\n".join(lines) if lines else ""


def _versions(log: Log) -> str:
    rows = []
    for entry in log.of("environment"):
        held = entry["packages"]
        rows.append([entry["name"], ", ".join(f"{n} {held[n]}" for n in _SHOWN if n in held)])
    return "## Versions\n\n" + _table(["environment", "packages"], rows)


def _plot(log: Log, path: Path) -> None:
    from matplotlib.figure import Figure

    workloads = [w for w in PEERS if any(log.seconds(w, s) for s in SYSTEMS)]
    figure = Figure(figsize=(2.2 * max(2, len(workloads)) + 2.5, 4), layout="constrained")
    axes = figure.subplots(1, max(1, len(workloads)), squeeze=False)[0]
    for number, (axis, workload) in enumerate(zip(axes, workloads, strict=False)):
        for place, system in enumerate(SYSTEMS):
            seconds = [*log.seconds(workload, system).values()]
            if seconds:
                colour = "tab:blue" if system.startswith("fedsim") else "tab:gray"
                middle = float(np.median(seconds))
                axis.barh(place, middle, color=colour)
                axis.plot(seconds, [place] * len(seconds), ".", color="black", markersize=3)
        axis.set_title(workload)
        axis.set_xlabel("s per round")
        axis.set_yticks(range(len(SYSTEMS)), [_title(s) for s in SYSTEMS] if not number else [])
        axis.set_ylim(len(SYSTEMS) - 0.5, -0.5)
        axis.set_xlim(left=0)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _last(turns: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return turns[max(turns)]


def _title(system: str) -> str:
    return SYSTEMS[system].title if system in SYSTEMS else KERNEL_TITLES[system]


def _key(entry: dict[str, Any]) -> Key:
    return entry["workload"], entry["system"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
