"""FAL on features of which most are brittle: what it gives up, and what that is worth."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedsim
from fedsim.basics.json_files import JsonLines
from fedsim.runs.world import build
from fedsim.scenario.load import load

RADIUS = 0.4


def ended(folder, *overrides, seed=1):
    """(the last round's metrics, the weights of class 1 against class 0, what was learnt from)."""
    settings = [f"seed={seed}", "engine.kind=inline", "evaluation.every=60", *overrides]
    scenario = load("fal_brittle_features").with_overrides(settings)
    fedsim.start(scenario, out=folder)
    *_, last = JsonLines.read(folder / "metrics.jsonl")
    model = load_file(folder / "params.safetensors")
    weight, bias = model["output.weight"], model["output.bias"]
    return last, weight[1] - weight[0], bias[1] - bias[0], build(scenario).data.test


def closed_form(w, b, test):
    """Robust accuracy of a linear model: the margin y (w x + b) less rho |w|_1."""
    margin = (2 * test.targets - 1) * (test.features.astype(np.float64) @ w + b)
    return np.mean(margin > 0), np.mean(margin - RADIUS * np.abs(w).sum() > 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 4])
def test_averaging_leans_on_brittle_features_and_fal_does_not(tmp_path, seed):
    """Clean and robust accuracy: 0.999 and 0.080 of FedAvg, 0.935 and 0.935 of FAL."""
    plain, w_plain, b_plain, test = ended(
        tmp_path / "fedavg", 'strategy={name="fedavg"}', seed=seed
    )
    robust, w_robust, b_robust, _ = ended(tmp_path / "fal", seed=seed)
    found = [
        last[name]
        for last in (plain, robust)
        for name in ("test/accuracy", f"robust/accuracy@{RADIUS}")
    ]
    assert found == pytest.approx([0.999, 0.080, 0.935, 0.935], abs=0.02)
    # PGD finds the farthest point: what is measured is the closed form
    for (clean, moved), (w, b) in zip(
        (found[:2], found[2:]), ((w_plain, b_plain), (w_robust, b_robust)), strict=True
    ):
        assert (clean, moved) == pytest.approx(closed_form(w, b, test), abs=1e-12)
    brittle = [np.abs(w[1:]).mean() / abs(w[0]) for w in (w_plain, w_robust)]
    assert brittle[1] < 0.05 < 0.1 < brittle[0]
