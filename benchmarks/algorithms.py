"""What the five algorithms are worth on scikit-learn's digits, each beside what explains it.

Gossip stands beside no communication and a shared start, Flag beside the mean of unit updates,
FedAU beside known rates and equal rates, FedLD beside half a server step and FedLEx beside a
constant mask and FedAvg at its own best step. A seed draws the test set, the partition, who takes
part and the initial model anew; it is the same for all methods, so that differences are paired.
FedAU's and FedLD's step sizes are chosen on seeds apart, Flag's and FedLEx's on those reported. A
run that breaks off, because no finite update came back, counts as chance.

    OMP_NUM_THREADS=1 python benchmarks/algorithms.py fedau --out fedau.jsonl

prints Markdown tables: means with 95 % t-intervals over seeds (a single seed has none). Every run
goes to `--out` as one JSON line when it ends; called again, runs that are there are not repeated.
The lines know the scenario and not the code: after a change of code, begin a new file. Each file is
one process's.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from fedsim.basics.errors import RunError
from fedsim.basics.json_files import JsonLines
from fedsim.federation.topology import kinds, mixing
from fedsim.federation.topology.topology import Topology
from fedsim.runs import start as run
from fedsim.runs.folder import METRICS_FILE
from fedsim.scenario.scenario import Scenario

Table = dict[str, Any]
Trace = dict[str, list[tuple[int, float]]]

_CHANCE = 0.1  # what a run counts that broke off because nothing finite came back
_TUNING_SEEDS = (101, 102, 103)
_WIDENINGS = 4
_VARIANCE = "server/variance_ratio/hidden2.weight"
_GUIDANCE = "server/guidance_mean"
_WATCHED = ("test/accuracy", "nodes/accuracy", _VARIANCE, _GUIDANCE, "server/guidance_frozen")


class Runs:
    """Runs scenarios, each once: what the file holds is read from it.

    Args:
        out: The file of all runs; None keeps none.
        scratch: A folder for run folders.
    """

    def __init__(self, out: Path | None, scratch: Path) -> None:
        self._scratch = scratch
        self._traces: dict[str, Trace] = {}
        self._file: JsonLines | None = None
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = JsonLines(out)
            self._file.truncate()  # a torn last line, of a process that was killed
            self._traces = {r["scenario_sha256"]: _trace(r) for r in JsonLines.read(out)}

    def trace(self, document: Mapping[str, Any]) -> Trace:
        """Return a run's watched metrics as (round, value) at each evaluation."""
        scenario = Scenario.from_resolved(document, "benchmark")
        if scenario.sha256 not in self._traces:
            record = self._run(scenario)
            if self._file is not None:
                self._file.append({**record, "settings": document})
            self._traces[scenario.sha256] = _trace(record)
        return self._traces[scenario.sha256]

    def _run(self, scenario: Scenario) -> dict[str, Any]:
        begun, error = time.monotonic(), None
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            out = Path(folder) / "run"
            try:
                run.start(scenario, out=out)
            except RunError as problem:
                error = str(problem).replace(folder, "")
            records = [r for r in JsonLines.read(out / METRICS_FILE) if "test/accuracy" in r]
        took = time.monotonic() - begun
        print(f"{took:5.1f} s  {scenario.title}, seed {scenario.seed}", file=sys.stderr, flush=True)
        rounds = [r["round"] for r in records]
        metrics = {name: [r.get(name) for r in records] for name in _WATCHED}
        return {
            "title": scenario.title,
            "seed": scenario.seed,
            "scenario_sha256": scenario.sha256,
            "error": error,
            "rounds": rounds,
            "metrics": {n: v for n, v in metrics.items() if v and v[-1] is not None},
            "wall_time_s": took,
        }


def _trace(record: Mapping[str, Any]) -> Trace:
    rounds, metrics = record["rounds"], record["metrics"]
    trace = {n: [p for p in zip(rounds, v, strict=True) if p[1] is not None]
             for n, v in metrics.items()}  # fmt: skip
    return {**trace, "failed": [(0, 1.0)]} if record["error"] else trace


def document(
    title: str, seed: int, rounds: int, *, hidden: Sequence[int], partition: Table, strategy: Table,
    client: Table, chunk: int, every: int = 1, **tables: Table,
) -> Table:  # fmt: skip
    """Return a scenario on digits, computed in this process without checkpoints between."""
    task = {"model": "mlp", "hidden": list(hidden), **tables.pop("task", {})}
    return {
        "title": title, "seed": seed, "rounds": rounds, "task": task, "data": {"name": "digits"},
        "partition": partition, "strategy": strategy, "client": {"name": "local_sgd", **client},
        "engine": {"kind": "inline", "chunk_size": chunk}, "evaluation": {"every": every},
        "checkpoint": {"every": rounds}, **tables,
    }  # fmt: skip


def final_accuracy(trace: Trace, *, after: int = 0, last: int = 0) -> float:
    """Return the mean test accuracy after a round, or of the last so many evaluations."""
    if "failed" in trace:
        return _CHANCE
    return statistics.fmean(v for r, v in trace["test/accuracy"][-last:] if r > after)


def at(trace: Trace, metric: str, server_round: int) -> float:
    """Return a metric's value in a round."""
    return dict(trace[metric])[server_round]


# --- numbers and tables -------------------------------------------------------------------


def half_width(values: Sequence[float]) -> float:
    """Return half the 95 % t-interval of the mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Return "mean ± half width" in per cent."""
    half = half_width(values)
    spread = "" if math.isnan(half) else f" ± {100 * half:.{digits}f}"
    return f"{100 * statistics.fmean(values):.{digits}f}{spread}"


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """Return the paired difference in points, its interval, and in how many seeds it is above 0."""
    pairs = [100 * (a - b) for a, b in zip(values, others, strict=True)]
    mean, half, wins = statistics.fmean(pairs), half_width(pairs), sum(p > 0 for p in pairs)
    spread = "" if math.isnan(half) else f" [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"{mean:+.2f}{spread}; {wins}/{len(pairs)}"


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print one Markdown table."""
    print(f"\n**{title}**\n")
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cells) + " |")
    if note:
        print(f"\n{note}")
    sys.stdout.flush()


def best_step(
    score: Callable[[float], float], grid: Sequence[float]
) -> tuple[float, dict[float, float]]:
    """Return the best step size and all scores; the grid grows while the best is on its edge."""
    scores = {step: score(step) for step in grid}
    for _ in range(_WIDENINGS):
        best, steps = max(scores, key=scores.__getitem__), sorted(scores)
        if best not in (steps[0], steps[-1]):
            break
        edge, inner = (steps[0], steps[1]) if best == steps[0] else (steps[-1], steps[-2])
        wider = float(f"{edge * edge / inner:.2g}")
        scores[wider] = score(wider)
    return max(scores, key=scores.__getitem__), dict(sorted(scores.items()))


# --- the five -----------------------------------------------------------------------------


def fedau(runs: Runs, seeds: Sequence[int], rounds: int) -> None:
    """FedAU against averages that do not know, and one that knows, how often clients take part."""
    methods: dict[str, Table] = {
        "average participating (FedAvg)": {"name": "fedavg", "weighted": False},
        "average all": {"name": "average_all", "server_lr": 10.0},
        "FedAU, K = 50": {"name": "fedau", "cutoff": 50},
        "known rates": {"name": "known_participation"},
    }
    plain, ours = "average participating (FedAvg)", "FedAU, K = 50"

    def accuracies(
        method: str, lr: float, over: Sequence[int], *, correlated: bool = True
    ) -> list[float]:
        rule: Table = {"kind": "bernoulli", "rate": 0.1}
        if correlated:
            rule |= {"label_alpha": 0.1, "min_rate": 0.02}
        rates = "label-correlated" if correlated else "equal"
        return [
            final_accuracy(
                runs.trace(
                    document(
                        f"{method}, {rates} rates, local_lr {lr:g}", seed, rounds, hidden=[64, 32],
                        partition=_dirichlet(50, 0.1, 2), participation=rule, chunk=8, every=10,
                        strategy=methods[method],
                        client={"local_lr": lr, "local_steps": 5, "batch_size": 16},
                    )
                ),
                after=rounds - 100,
            )
            for seed in over
        ]  # fmt: skip

    def compare(title: str, steps: Mapping[str, float], *, correlated: bool = True) -> None:
        found = {m: accuracies(m, lr, seeds, correlated=correlated) for m, lr in steps.items()}
        show(
            f"FedAU, {title}; {rounds} rounds, {_named(seeds)}",
            ["method", "local_lr", "accuracy %", "minus average participating, points; seeds won"],
            [
                [m, f"{steps[m]:g}", percent(found[m]), "" if m == plain else
                 difference(found[m], found[plain])]
                for m in found
            ],
        )  # fmt: skip

    compare("label-correlated rates, equal step size", dict.fromkeys(methods, 0.1))
    compare("null control: equal rates", dict.fromkeys((plain, ours), 0.1), correlated=False)
    grid = [0.05, 0.1, 0.2, 0.4]
    tuned = {
        m: best_step(lambda lr, m=m: statistics.fmean(accuracies(m, lr, _TUNING_SEEDS)), grid)
        for m in methods
    }
    _show_grids(
        f"FedAU, tuning: accuracy % by local_lr; {rounds} rounds, {_named(_TUNING_SEEDS)}",
        {m: scores for m, (_, scores) in tuned.items()},
    )
    compare(
        "label-correlated rates, each at its own best step size",
        {m: lr for m, (lr, _) in tuned.items()},
    )


def gossip(runs: Runs, seeds: Sequence[int], rounds: int) -> None:
    """Corrected gossip beside plain gossip, no communication and a shared start."""
    rows: dict[str, Table] = {
        "no communication": {"name": "gossip", "self_weight": 1.0, "start": "own"},
        "plain, own starts": {"name": "gossip", "start": "own"},
        "corrected, own starts": {"name": "variance_corrected_gossip", "start": "own"},
        "plain, shared start": {"name": "gossip", "start": "shared"},
    }
    ours = "corrected, own starts"
    moments = [rounds // 5, 3 * (rounds // 5), 5 * (rounds // 5)]

    def traces(row: str, partition: Table, graph: Table, over: Sequence[int]) -> list[Trace]:
        return [
            runs.trace(
                document(
                    f"gossip {row}, {graph['kind']}, {_partition_name(partition)}", seed, rounds,
                    hidden=[64, 64, 64], task={"init": "xavier"}, partition=partition,
                    topology=graph, strategy=rows[row], chunk=16, every=rounds // 5,
                    client={"local_lr": 0.05, "local_steps": 1, "batch_size": 32},
                )
            )
            for seed in over
        ]  # fmt: skip

    def cells(found: Sequence[Trace]) -> list[str]:
        accuracy = [percent([at(t, "nodes/accuracy", r) for t in found]) for r in moments]
        ratios = [at(t, _VARIANCE, moments[-1]) for t in found]
        return [*accuracy, f"{statistics.fmean(ratios):.3f}"]

    head = [*(f"nodes' accuracy %, round {r}" for r in moments), "variance, hidden2, to initial"]
    iid: Table = {"kind": "iid", "clients": 16}
    graph: Table = {"kind": "regular", "degree": 4}
    for partition in (iid, _dirichlet(16, 0.1, 2), _dirichlet(16, 0.5, 2)):
        found = {row: traces(row, partition, graph, seeds) for row in rows}
        last = {r: [at(t, "nodes/accuracy", moments[-1]) for t in f] for r, f in found.items()}
        show(
            f"Gossip, {_partition_name(partition)}, 16 nodes, regular graph of degree 4; "
            f"{_named(seeds)}",
            ["", *head, "corrected minus this at the end, points; seeds won"],
            [
                [row, *cells(found[row]), "" if row == ours else difference(last[ours], last[row])]
                for row in rows
            ],
        )  # fmt: skip
    table = []
    for graph, over in (
        ({"kind": "regular", "degree": 4}, seeds), ({"kind": "ring"}, seeds[:1]),
        ({"kind": "line"}, seeds[:1]),
    ):  # fmt: skip
        stationary, mixed = _remaining_variance(graph, over, rounds)
        for row in ("plain, own starts", ours):
            expected = [f"{stationary:.4f}", f"{mixed:.4f}"] if row != ours else ["1", "1"]
            table.append(
                [graph["kind"], row, *cells(traces(row, iid, graph, over)), *expected]
            )  # fmt: skip
    show(
        f"Gossip, IID, other graphs (regular: {_named(seeds)}; ring and line: {_named(seeds[:1])})",
        ["graph", "", *head, "sum of squared stationary weights", "mean of sum_j (W^T)_ij^2"],
        table,
        "The last two columns say what mixing alone, without training, leaves of the variance of "
        "independent starts: in the limit, and after all rounds.",
    )


def _remaining_variance(graph: Table, seeds: Sequence[int], rounds: int) -> tuple[float, float]:
    """What averaging independent models leaves of their variance: in the limit, and by the end."""
    keys = dict(graph)
    rule: Topology = getattr(kinds, keys.pop("kind"))(**keys)
    limits, reached = [], []
    for seed in seeds:
        drawn = rule.graph(16, server_round=1, seed=seed)
        weights = mixing.mixing_matrix(drawn, mixing="uniform", self_weight=0.5)
        degrees = np.array([drawn.degree[node] for node in range(16)])
        limits.append(float(((degrees / degrees.sum()) ** 2).sum()))
        power = np.linalg.matrix_power(weights, rounds)
        reached.append(float((power**2).sum(axis=1).mean()))
    return statistics.fmean(limits), statistics.fmean(reached)


def flag(runs: Runs, seeds: Sequence[int], rounds: int) -> None:
    """The Flag Aggregator beside other robust rules and the mean of unit updates."""
    rules: dict[str, tuple[Table, tuple[float, float]]] = {
        "mean": ({"name": "fedavg", "weighted": False}, (0.3, 1.0)),
        "coordinate median": ({"name": "coordinate_median"}, (0.3, 1.0)),
        "Multi-Krum": ({"name": "multi_krum"}, (0.3, 1.0)),
        "mean of unit updates": ({"name": "unit_mean"}, (1.0, 3.0)),
        "Flag, 1 pass": ({"name": "flag", "iterations": 1}, (1.0, 3.0)),
        "Flag, 5 passes": ({"name": "flag"}, (1.0, 3.0)),
        "Flag, 5 passes, m = 1": ({"name": "flag", "subspace_dim": 1}, (1.0, 3.0)),
    }
    settings = {
        "f = 3, batch 32": (3, 32), "f = 3, batch 8": (3, 8),
        "f = 6, batch 32": (6, 32), "f = 0, batch 32": (0, 32),
    }  # fmt: skip

    def accuracies(rule: str, step: float, setting: str) -> list[float]:
        attackers, batch = settings[setting]
        strategy = {**rules[rule][0], "server_lr": step}
        if rule == "Multi-Krum":
            strategy["num_byzantine"] = attackers or 3
        attack: Table = {"attack": {"kind": "uniform", "num_byzantine": attackers}}
        return [
            final_accuracy(
                runs.trace(
                    document(
                        f"flag: {rule}, server_lr {step:g}, {setting}", seed, rounds, hidden=[32],
                        partition={"kind": "iid", "clients": 15}, strategy=strategy, chunk=15,
                        client={"local_lr": 1.0, "local_steps": 1, "batch_size": batch}, every=5,
                        **(attack if attackers else {}),
                    )
                ),
                last=3,
            )
            for seed in seeds
        ]  # fmt: skip

    rows, best = [], {}
    for rule, (_, steps) in rules.items():
        cells = []
        for setting in settings:
            found = {step: accuracies(rule, step, setting) for step in steps}
            step = max(found, key=lambda s: statistics.fmean(found[s]))
            best[rule, setting] = found[step]
            cells.append(f"{percent(found[step])} ({step:g})")
        rows.append([rule, *cells])
    show(
        f"Flag, 15 clients, uniform attackers; accuracy % (step), {rounds} rounds, {_named(seeds)}",
        ["rule", *settings], rows,
        "The better of two step sizes (others 0.3 and 1, unit mean and Flag 1 and 3), chosen on "
        "these very seeds. With f = 0, Multi-Krum is told of 3.",
    )  # fmt: skip
    ours = "Flag, 5 passes"
    show(
        "Flag, 5 passes, minus another rule, points; seeds won",
        ["minus", *settings],
        [
            [rule, *(difference(best[ours, s], best[rule, s]) for s in settings)]
            for rule in rules
            if rule != ours
        ],
    )


def fedld(runs: Runs, seeds: Sequence[int], rounds: int) -> None:
    """FedLD where labels are noisy, beside half a server step; and where labels are skewed."""
    mean: Table = {"name": "fedavg", "weighted": False}
    methods: dict[str, tuple[Table, float]] = {
        "FedAvg": (mean, 0.0),
        "FedAvg, server step 0.5": ({**mean, "server_lr": 0.5}, 0.0),
        "FedLD without margin": ({"name": "fedld"}, 0.0),
        "FedLD, margin 0.1": ({"name": "fedld"}, 0.1),
        "FedAvg, margin 0.1": (mean, 0.1),
    }

    def accuracies(
        method: str, partition: Table, count: int, lr: float, epochs: int, over: Sequence[int]
    ) -> list[float]:
        strategy, margin = methods[method]
        client = {
            "local_lr": lr, "local_epochs": epochs, "batch_size": 50, "momentum": 0.5,
            "weight_decay": 5e-4, "margin": margin,
        }  # fmt: skip
        title = f"fedld: {method}, {_partition_name(partition)}, lr {lr:g}, {epochs} epochs"
        return [
            final_accuracy(
                runs.trace(
                    document(
                        title, seed, count, hidden=[64, 32], partition=partition, client=client,
                        strategy=strategy, chunk=5,
                    )
                ),
                last=10,
            )
            for seed in over
        ]  # fmt: skip

    noisy: Table = {"kind": "iid", "clients": 5, "label_noise": [0.2, 0.3, 0.4, 0.5, 0.6]}

    def compare(title: str, steps: Mapping[str, float], epochs: int) -> None:
        found = {m: accuracies(m, noisy, rounds, lr, epochs, seeds) for m, lr in steps.items()}
        others = list(found)[:2]
        show(
            f"FedLD, label noise .2 to .6 in 5 IID clients, {title}; {rounds} rounds, "
            f"{_named(seeds)}",
            ["method", "local_lr", "accuracy %", "minus FedAvg, points; seeds won",
             "minus server step 0.5"],
            [
                [m, f"{steps[m]:g}", percent(found[m]),
                 *("" if m == other else difference(found[m], found[other]) for other in others)]
                for m in found
            ],
        )  # fmt: skip

    noise = [m for m in methods if m != "FedAvg, margin 0.1"]
    compare("1 local epoch, equal step size", dict.fromkeys(noise, 0.5), 1)
    compare("3 local epochs, equal step size", dict.fromkeys(noise, 0.5), 3)
    tuned = {
        m: best_step(
            lambda lr, m=m: statistics.fmean(accuracies(m, noisy, rounds, lr, 3, _TUNING_SEEDS)),
            [0.05, 0.1, 0.2, 0.5],
        )
        for m in noise[:3]
    }
    _show_grids(
        f"FedLD, label noise, 3 local epochs, tuning: accuracy % by local_lr; {rounds} rounds, "
        f"{_named(_TUNING_SEEDS)}",
        {m: scores for m, (_, scores) in tuned.items()},
    )
    compare(
        "3 local epochs, each at its own best step size", {m: lr for m, (lr, _) in tuned.items()}, 3
    )
    count = max(10, rounds * 2 // 5)
    skew = [m for m in methods if m != "FedAvg, server step 0.5"]
    rows = []
    for alpha in (1.0, 0.5, 0.2):
        found = {m: accuracies(m, _dirichlet(5, alpha, 2), count, 0.2, 1, seeds) for m in skew}
        rows += [
            [f"{alpha:g}", m, percent(found[m]),
             "" if m == "FedAvg" else difference(found[m], found["FedAvg"])]
            for m in skew
        ]  # fmt: skip
    show(
        f"FedLD, label skew in 5 clients, local_lr 0.2, 1 local epoch; {count} rounds, "
        f"{_named(seeds)}",
        ["Dirichlet alpha", "method", "accuracy %", "minus FedAvg, points; seeds won"], rows,
    )  # fmt: skip


def fedlex(runs: Runs, seeds: Sequence[int], rounds: int) -> None:
    """FedLEx beside FedAvg at its own best step and a constant mask of the same mean."""
    methods: dict[str, Table] = {
        "FedAvg": {"name": "fedavg"},
        "FedLEx, figure's order": {"name": "fedlex", "order": "normalise-then-average"},
        "FedLEx, code's order": {"name": "fedlex", "order": "average-then-normalise"},
    }
    plain, ours, codes = methods
    masks = {"constant mask, figure's mean": ours, "constant mask, code's mean": codes}

    def trace(method: str, lr: float, seed: int, **client: Any) -> Trace:
        title = f"{method}, lr {lr:g} {' '.join(str(value) for value in client.values())}"
        return runs.trace(
            document(
                title, seed, rounds, hidden=[64, 64], partition=_dirichlet(10, 0.2, 20), chunk=10,
                strategy=methods[method],
                client={"local_lr": lr, "local_epochs": 5, "batch_size": 32, "setup_epochs": 5,
                        "setup_lr": 0.1, **client},
            )
        )  # fmt: skip

    def accuracies(method: str, lr: float, **client: Any) -> list[float]:
        return [final_accuracy(trace(method, lr, seed, **client), last=10) for seed in seeds]

    def masked(method: str, lr: float) -> list[float]:
        """FedAvg with the step size that a constant mask of the guidance's mean leaves."""
        rates = [lr * trace(method, lr, seed)[_GUIDANCE][-1][1] for seed in seeds]
        return [
            final_accuracy(trace(plain, rate, seed), last=10)
            for rate, seed in zip(rates, seeds, strict=True)
        ]

    grids: dict[str, dict[float, list[float]]] = {}
    for method in methods:
        grid = [0.03, 0.1, 0.3, 1.0] if method == plain else [0.3, 1.0, 3.0, 10.0]
        _, scores = best_step(lambda lr, m=method: statistics.fmean(accuracies(m, lr)), grid)
        grids[method] = {lr: accuracies(method, lr) for lr in scores}
    for mask, method in masks.items():
        grids[mask] = {lr: masked(method, lr) for lr in grids[method]}
    _show_grids(
        f"FedLEx, SGD: accuracy % by local_lr; {rounds} rounds, {_named(seeds)}",
        {m: {lr: statistics.fmean(v) for lr, v in found.items()} for m, found in grids.items()},
    )
    chosen = {m: max(f, key=lambda lr, f=f: statistics.fmean(f[lr])) for m, f in grids.items()}
    best = {m: grids[m][lr] for m, lr in chosen.items()}

    def mean_guidance(method: str) -> str:
        if method not in (ours, codes):
            return ""
        values = [trace(method, chosen[method], seed) for seed in seeds]
        mean, frozen = (
            statistics.fmean(t[name][-1][1] for t in values)
            for name in (_GUIDANCE, "server/guidance_frozen")
        )
        return f"{mean:.4f}, {100 * frozen:.1f} %"

    show(
        "FedLEx, each at its best step size of the grid, chosen on these very seeds",
        ["method", "local_lr", "accuracy %", "minus FedAvg, points; seeds won",
         "guidance: mean, share of zeros"],
        [[m, f"{chosen[m]:g}", percent(best[m]), "" if m == plain else
          difference(best[m], best[plain]), mean_guidance(m)] for m in best],
    )  # fmt: skip
    rows = []
    for mask, method in masks.items():
        rows += [
            [method, f"{lr:g}", percent(grids[method][lr]), percent(grids[mask][lr]),
             difference(grids[method][lr], grids[mask][lr])]
            for lr in grids[method]
        ]  # fmt: skip
    show(
        "FedLEx beside a constant mask of the same mean (FedAvg at local_lr times that mean)",
        ["method", "local_lr", "accuracy %", "mask's accuracy %", "difference, points; seeds won"],
        rows,
    )
    rows = []
    for lr in (1e-3, 3e-3):
        base = accuracies(plain, lr, optimizer="adam", setup_lr=lr)
        rows.append(["FedAvg", f"{lr:g}", percent(base, 2), ""])
        for where in ("gradient", "step"):
            found = accuracies(ours, lr, optimizer="adam", setup_lr=lr, guidance=where)
            name = f"{ours}, guided {where}"
            rows.append([name, f"{lr:g}", percent(found, 2), difference(found, base)])
    show(
        f"FedLEx, Adam (exploring at setup_lr = local_lr); {rounds} rounds, {_named(seeds)}",
        ["method", "local_lr", "accuracy %", "minus FedAvg, points; seeds won"], rows,
    )  # fmt: skip


def _dirichlet(clients: int, alpha: float, min_size: int) -> Table:
    return {"kind": "dirichlet", "clients": clients, "alpha": alpha, "min_size": min_size}


def _partition_name(partition: Table) -> str:
    return f"Dirichlet {partition['alpha']:g}" if "alpha" in partition else "IID"


def _named(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _show_grids(title: str, grids: Mapping[str, Mapping[float, float]]) -> None:
    """Print methods by step sizes; a method's best is bold."""
    steps = sorted({step for scores in grids.values() for step in scores})
    rows = []
    for method, scores in grids.items():
        best = max(scores, key=scores.__getitem__)
        cells = [f"{100 * scores[s]:.1f}" if s in scores else "" for s in steps]
        rows.append([method, *(f"**{c}**" if s == best else c
                               for s, c in zip(steps, cells, strict=True))])  # fmt: skip
    show(title, ["method", *(f"{step:g}" for step in steps)], rows)


# what it measures, how many seeds, how many rounds
_MEASURED: dict[str, tuple[Callable[[Runs, Sequence[int], int], None], int, int]] = {
    "fedau": (fedau, 10, 500),
    "gossip": (gossip, 3, 300),
    "flag": (flag, 3, 120),
    "fedld": (fedld, 5, 150),
    "fedlex": (fedlex, 3, 20),
}


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder, which also holds the cache of partitions unless one is named."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("FEDSIM_CACHE", str(Path(folder) / "cache"))
        yield Path(folder)


def main() -> None:
    """Measure what the command line asks for and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*_MEASURED, "all"])
    parser.add_argument("--seeds", type=int, help="how many, from 1 on; without it as many as each "
                        "comparison needs")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="instead of the comparison's own")
    parser.add_argument("--out", type=Path, help="JSON lines, one per run; is continued")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = list(_MEASURED) if arguments.what == "all" else [arguments.what]
    with _scratch() as scratch:
        runs = Runs(arguments.out, scratch)
        for name in names:
            measure, seeds, rounds = _MEASURED[name]
            chosen = range(1, (arguments.seeds or seeds) + 1)
            measure(runs, chosen, arguments.rounds or rounds)


if __name__ == "__main__":
    main()
