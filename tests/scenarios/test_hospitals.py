"""Four hospitals of unequal size with shifted features: AUROC per site and over all patients."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from fedsim.basics.json_files import JsonLines
from fedsim.data.preparation import prepare
from fedsim.runs import start as run
from fedsim.scenario.load import load


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    scenario = load("four_hospitals", ["engine.kind=inline"])
    return scenario, run.start(scenario, out=tmp_path_factory.mktemp("hospitals") / "run").folder


def test_the_sites_are_unequal_and_their_features_are_shifted(finished):
    scenario, _ = finished
    shifted = prepare(scenario.data, scenario.partition, seed=scenario.seed)
    plain = {**scenario.partition, "feature_shift": 0.0, "feature_scale": 0.0}
    original = prepare(scenario.data, plain, seed=scenario.seed)
    sizes = shifted.sizes(range(4))
    assert sizes.max() > 2 * sizes.min()
    moved = []
    for split in ("train", "test"):
        before, after = (
            original.clients(range(4), split=split),
            shifted.clients(range(4), split=split),
        )
        for site in range(4):
            x, y = before.features[before.rows[site]], after.features[after.rows[site]]
            # one line per feature, the same for both splits: y = scale x + shift
            fits = [np.polyfit(x[:, f], y[:, f], 1) for f in range(x.shape[1])]
            residual = max(
                np.abs(np.polyval(fits[f], x[:, f]) - y[:, f]).max() for f in range(x.shape[1])
            )
            assert residual < 1e-4
            moved.append(np.array(fits)[:, 1])
    np.testing.assert_allclose(moved[:4], moved[4:], atol=1e-3)
    assert np.std(moved, axis=0).min() > 0.05
    np.testing.assert_array_equal(original.test.features, shifted.test.features)


def test_auroc_per_site_and_pooled_are_scikit_learn_s(finished):
    scenario, folder = finished
    data = prepare(scenario.data, scenario.partition, seed=scenario.seed)
    model = load_file(folder / "params.safetensors")
    held = data.clients(range(4), split="test")

    def scores(rows):
        logits = held.features[rows] @ model["output.weight"].T + model["output.bias"]
        return logits[:, 1] - logits[:, 0]

    sites = JsonLines.read(folder / "local.jsonl")[-4:]
    assert [(s["round"], s["client"]) for s in sites] == [(scenario.rounds, c) for c in range(4)]
    for site, rows in zip(sites, held.rows, strict=True):
        assert site["examples"] == len(rows)
        expected = roc_auc_score(held.targets[rows], scores(rows))
        assert site["auroc"] == pytest.approx(expected, abs=1e-12)
    everybody = np.concatenate(held.rows)
    final = JsonLines.read(folder / "metrics.jsonl")[-1]
    expected = roc_auc_score(held.targets[everybody], scores(everybody))
    assert final["pooled/auroc"] == pytest.approx(expected, abs=1e-12)
    assert final["local/auroc_worst_decile"] == min(site["auroc"] for site in sites)
