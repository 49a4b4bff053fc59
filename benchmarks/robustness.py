"""The worst-case grid: each attack on each robust rule at every f that it bears, on digits.

    python -m benchmarks.robustness [--out docs] [--rounds 20] [--seeds 1]

Eleven clients with IID shares of the digits train a small network; f of them attack, the rule is
told so. A cell is the test accuracy after the last round, the least over the seeds. Writes
`robustness.json` and the heat maps `robustness.png`.
"""

import argparse
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedsim.aggregators import Recipe
from fedsim.basics.errors import RunError
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.attack import AttackGrid
from fedsim.messages.records import model_tensors
from fedsim.runs.evaluation_data import triggered_samples
from fedsim.runs.loop import RoundLoop
from fedsim.runs.world import build
from fedsim.scenario.choice import Choice
from fedsim.scenario.scenario import Scenario

CLIENTS = 11
RULES: dict[str, dict[str, Any]] = {
    "mean": {"rule": "mean"},
    "median": {"rule": "coordinate_median"},
    "trimmed mean": {"rule": "trimmed_mean"},
    "geometric median": {"rule": "geometric_median"},
    "Krum": {"rule": "krum"},
    "Multi-Krum": {"rule": "multi_krum"},
    "Bulyan": {"rule": "bulyan"},
    "MeaMed": {"rule": "meamed"},
    "Phocas": {"rule": "phocas"},
    "centred clipping": {"rule": "centred_clipping"},
    "unit mean": {"rule": "unit_mean", "server_lr": 0.5},
    "NNM + median": {"rule": "coordinate_median", "before": ["nnm"]},
    "NNM + trimmed": {"rule": "trimmed_mean", "before": ["nnm"]},
}
ATTACKS: dict[str, dict[str, Any]] = {
    "nobody attacks": {"kind": "sign_flip"},
    "sign flip": {"kind": "sign_flip"},
    "scaled reverse, 10": {"kind": "scaled_reverse"},
    "Gaussian, 10": {"kind": "gaussian", "deviation": 10.0},
    "uniform, 10": {"kind": "uniform", "scale": 10.0},
    "infinity (largest number)": {"kind": "infinity", "finite": True},
    "label flip": {"kind": "label_flip"},
    "ALIE, z = 1.5": {"kind": "alie", "z": 1.5},
    "ALIE, z = 10": {"kind": "alie", "z": 10.0},
    "IPM, 10": {"kind": "ipm"},
    "IPM, 0.5": {"kind": "ipm", "factor": 0.5},
    "mimic": {"kind": "mimic"},
    "min-max": {"kind": "min_max"},
    "backdoor (not fooled)": {"kind": "backdoor"},
    "packet loss, 50 %": {"kind": "packet_loss", "rate": 0.5, "packet_bytes": 64},
}


def scenario(attack: Mapping[str, Any], seed: int, rounds: int) -> Scenario:
    """Return the federation under an attack."""
    return Scenario.from_resolved(
        {
            "title": "robustness",
            "seed": seed,
            "rounds": rounds,
            "data": {"name": "digits"},
            "partition": {"kind": "iid", "clients": CLIENTS},
            "task": {"model": "mlp", "hidden": [32]},
            "client": {"batch_size": 32, "local_lr": 0.4, "local_epochs": 1},
            "attack": dict(attack),
            "engine": {"kind": "inline", "executor": "batched"},
        },
        "robustness",
    )


def row(name: str, num_byzantine: int, seed: int, rounds: int) -> dict[str, float]:
    """Return every rule's test accuracy under one attack; of a backdoor, who is not fooled."""
    attackers = 0 if name == "nobody attacks" else num_byzantine
    world = build(scenario({**ATTACKS[name], "num_byzantine": attackers}, seed, rounds))
    triggered = triggered_samples(world)
    test = (world.data.test.features, world.data.test.targets)
    found = {}
    for rule, options in RULES.items():
        recipe = Recipe(**{k: v for k, v in options.items() if k != "server_lr"})
        if num_byzantine > recipe.bearable(CLIENTS) and rule != "mean":
            continue
        told = {} if rule == "mean" else {"num_byzantine": num_byzantine}
        strategy = Choice("strategies", {"name": "robust", **options, **told}).make()
        strategy.declare_buffers([])
        strategy.declare_seed(seed)
        assert world.attack is not None
        attacked = AttackGrid(InlineGrid(world.app, CLIENTS), world.attack, world.layout, seed=seed)
        grid = AdmissionGrid(attacked, world.layout)
        try:
            arrays = RoundLoop(strategy, grid, rounds).run(world.arrays)
        except RunError:  # what comes of it is no number any more
            found[rule] = 0.0
            continue
        params, buffers = model_tensors(world.layout, arrays)
        measured = world.app.executor.evaluate_arrays(params, buffers, *(triggered or test))
        accuracy = measured["accuracy"]
        found[rule] = 1 - accuracy if triggered else accuracy
    return found


def measure(rounds: int, seeds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return accuracy by attack, f and rule."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ATTACKS:
        found[name] = {}
        for num_byzantine in range(1, (CLIENTS - 1) // 2 + 1):
            rows = [row(name, num_byzantine, seed, rounds) for seed in range(1, seeds + 1)]
            worst = {rule: min(each[rule] for each in rows) for rule in rows[0]}
            found[name][str(num_byzantine)] = worst
            print(name, num_byzantine, {k: round(v, 2) for k, v in worst.items()}, flush=True)
    return found


def draw(found: Mapping[str, Mapping[str, Mapping[str, float]]], place: Path) -> None:
    """Draw a heat map of rules and f for the worst of all attacks, and for each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = list(next(iter(found.values())))
    blind = {"nobody attacks"}
    panels = {
        "worst of all attacks": {
            f: {
                rule: min(found[name][f][rule] for name in found if name not in blind)
                for rule in RULES
                if rule in found["sign flip"][f]
            }
            for f in counts
        },
        **found,
    }
    columns = 5
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.1 * columns, 3.7 * lines), sharey=True, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, cells) in zip(axes.flat, panels.items(), strict=False):
        axis.axis("on")
        grid = [[cells[f].get(rule, math.nan) for f in counts] for rule in RULES]
        shown = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, values in enumerate(grid):
            for x, value in enumerate(values):
                text = "–" if math.isnan(value) else f"{100 * value:.0f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=8)
        axis.set_title(name, fontsize=10, fontweight="bold" if name.startswith("worst") else None)
        axis.set_xticks(range(len(counts)), counts)
        axis.set_yticks(range(len(RULES)), list(RULES), fontsize=8)
        axis.set_xlabel(f"attackers f of {CLIENTS}", fontsize=8)
    figure.colorbar(shown, ax=axes, shrink=0.4, label="test accuracy (backdoor: share not fooled)")
    figure.savefig(place, dpi=75)
    pyplot.close(figure)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--draw-only", action="store_true", help="from robustness.json as it is")
    given = parser.parse_args()
    place = given.out / "robustness.json"
    if not given.draw_only:
        torch.set_num_threads(1)
        logging.getLogger("fedsim").setLevel(logging.ERROR)  # of models that are lost
        found = measure(given.rounds, given.seeds)
        place.write_text(json.dumps({"rounds": given.rounds, "cells": found}, indent=1) + "\n")
    draw(json.loads(place.read_text())["cells"], given.out / "robustness.png")


if __name__ == "__main__":
    main()
