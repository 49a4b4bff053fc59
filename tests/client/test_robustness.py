"""Metrics on moved samples: closed forms on linear models, and what never rises."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import JsonLines
from fedsim.client.executor import CohortExecutor
from fedsim.client.robustness import RobustEvaluation
from fedsim.runs.world import build
from fedsim.scenario.scenario import Scenario
from tests.laws import federations as fed
from tests.tiers import by_turns

KINDS = ("batched", "vmap", "loop")


def measured(model, attack, *, kind=None):
    """(executor, a model that one client trained, its metrics, those on moved samples)."""
    procedure = fed.local_sgd(local_lr=0.3, batch_size=20, local_steps=40)
    executor = fed.make_executor(model, procedure, kind=kind, dtype="float64")
    executor.evaluation_batch = 7  # several batches, the last of them short
    trained = executor.train(fed.job(executor, (7,)))
    made = trained.params[0], {n: b[0] for n, b in trained.buffers.items()}
    test = executor.data.test
    plain = executor.evaluate_arrays(*made, test.features, test.targets)
    moved = executor.evaluate_moved(*made, test.features, test.targets, attack)
    return executor, made, plain, moved


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_of_two_classes_robust_accuracy_is_that_of_the_robust_margin(attack, norm):
    radii = (0.1, 0.4, 0.8)
    search = RobustEvaluation(radii, attack=attack, norm=norm, steps=10)
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(200, *fed.SHAPE)), draw.integers(2, size=200)
    executor = fed.make_executor("logistic", dtype="float64")
    weight, bias = draw.normal(size=(2, 16)), draw.normal(size=2)
    # the third class is never taken
    named = {
        "output.weight": torch.from_numpy(np.vstack([weight, np.zeros(16)])),
        "output.bias": torch.from_numpy(np.append(bias, -1e6)),
    }
    found = executor.evaluate_moved(executor.layout.flatten(named), {}, x, y, search)
    w, b = weight[1] - weight[0], bias[1] - bias[0]
    margin = (2 * y - 1) * (x.reshape(200, -1) @ w + b)
    dual = np.abs(w).sum() if norm == "inf" else np.linalg.norm(w)
    for radius in radii:
        assert found[f"accuracy@{radius}"] == np.mean(margin - radius * dual > 0)
        expected = np.logaddexp(0, -(margin - radius * dual)).mean()
        assert found[f"loss@{radius}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize(
    "model",
    ["mlp", pytest.param("cnn", marks=pytest.mark.slow),
     pytest.param("cnn_batchnorm", marks=pytest.mark.slow)],
)  # fmt: skip
def test_accuracy_falls_in_radius_and_steps_and_never_rises(model, norm, random_start):
    radii = (0.05, 0.2, 0.5, 1.0)
    options = {"norm": norm, "step": 0.15, "random_start": random_start}
    by_steps = []
    for steps in (1, 2, 4, 8):
        search = RobustEvaluation(radii[::-1], steps=steps, **options)
        _, _, plain, moved = measured(model, search)
        rates = [plain["accuracy"], *(moved[f"accuracy@{r:g}"] for r in radii)]
        assert rates == sorted(rates, reverse=True)
        by_steps.append(rates)
    for fewer, more in itertools.pairwise(by_steps):
        assert all(a >= b for a, b in zip(fewer, more, strict=True))
    assert by_steps[-1][-1] < by_steps[-1][0]


def test_every_executor_measures_alike():
    search = RobustEvaluation((0.1, 0.3), steps=5, random_start=True)
    found = [measured("cnn", search, kind=kind)[3] for kind in KINDS]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-9)
    assert list(found[0]) == ["loss@0.1", "accuracy@0.1", "loss@0.3", "accuracy@0.3"]


def test_measuring_leaves_the_model_as_it_was():
    search = RobustEvaluation((0.3,), steps=2)
    executor, made, plain, moved = measured("cnn_batchnorm", search)
    test = executor.data.test
    before = {n: b.clone() for n, b in made[1].items()}
    again = executor.evaluate_moved(*made, test.features, test.targets, search)
    assert again == moved
    assert all(torch.equal(b, before[n]) for n, b in made[1].items())
    assert executor.evaluate_arrays(*made, test.features, test.targets) == plain


def test_no_sample_gives_no_number():
    executor = fed.make_executor("mlp", dtype="float64")
    params = fed.initial_payload(executor).params
    test = executor.data.test
    found = executor.evaluate_moved(
        params, {}, test.features[:0], test.targets[:0], RobustEvaluation((0.3,))
    )
    assert np.isnan(found["accuracy@0.3"])


# --- in a scenario ------------------------------------------------------------------------------


def scenario(robust, **tables):
    document = {
        "rounds": 2,
        "data": {"name": "breast_cancer"},
        "partition": {"kind": "iid", "clients": 4},
        "task": {"model": "logistic", "dtype": "float64"},
        "engine": {"kind": "inline"},
        "evaluation": {"robust": robust},
    }
    return Scenario.from_resolved({**document, **tables}, origin="tests/robust.toml")


def test_in_standardised_data_the_radius_is_of_the_raw_features(tmp_path):

    asked = scenario({"radii": [0.02, 0.5], "steps": 8})
    result = fedsim.start(asked, out=tmp_path / "run")
    *_, last = JsonLines.read(result.folder / "metrics.jsonl")
    world = build(asked)
    deviation = world.data.raw_units[1]
    assert deviation.max() > 100 * deviation.min()
    model = load_file(result.folder / "params.safetensors")
    weight, bias = (model[f"output.{n}"].numpy() for n in ("weight", "bias"))
    w, b = (weight[1] - weight[0]) / deviation, bias[1] - bias[0]
    test = world.data.test
    margin = (2 * test.targets - 1) * (test.features.astype(np.float64) @ (w * deviation) + b)
    for radius in (0.02, 0.5):
        expected = np.mean(margin - radius * np.abs(w).sum() > 0)
        assert last[f"robust/accuracy@{radius}"] == pytest.approx(expected, abs=1e-12)
    assert last["robust/accuracy@0.5"] < last["robust/accuracy@0.02"] < last["test/accuracy"]


@pytest.mark.parametrize(
    ("robust", "message"),
    [
        ({}, "radii"),
        ({"radii": []}, "radii"),
        ({"radii": [0.0]}, "radii"),
        ({"radii": [0.1, 0.1]}, "0.1 is there twice"),
        ({"radii": [0.1], "norm": "1"}, "norm"),
        ({"radii": [0.1], "steps": 0}, "steps"),
        ({"radii": [0.1], "box": [1.0, 0.0]}, "box"),
        ({"radii": [0.1], "box": [1.0]}, "box"),
        ({"radii": [0.1], "attack": "fgsm", "step": 0.1}, "step changes nothing"),
        ({"radii": [0.1], "radius": 0.1}, "radius"),
    ],
)
def test_impossible_tables_are_refused(robust, message):

    with pytest.raises(ScenarioError, match=message):
        scenario(robust)


def test_claims_on_what_is_not_measured_are_refused():

    claim = {"robust/accuracy@0.1": {"min": 0.5}}
    with pytest.raises(ScenarioError, match=r"never recorded without \[evaluation\] robust"):
        scenario(None, expect=claim)


def test_tokens_are_not_moved():

    data = {"name": "tests.data.loaders:tokens"}
    task = {"model": "char_lstm", "hidden": 4}
    plain = {"data": data, "task": task, "partition": {"kind": "iid", "clients": 2}}
    with pytest.raises(ScenarioError, match="these features are tokens"):
        build(scenario({"radii": [0.1]}, **plain))
    client = {"parts": [{"name": "adversarial"}]}
    tables = {**plain, "client": client, "evaluation": {}}
    with pytest.raises(ScenarioError, match=r"\[client\] radius = 0.1 with .* these are tokens"):
        build(scenario(None, **tables))


def test_a_scenario_without_it_keeps_its_hash():

    hashes = [
        scenario(None, evaluation=table).sha256
        for table in ({}, {"robust": None}, {"robust": {"radii": [0.1]}})
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_clients_measure_their_own_samples(kind):
    """As the server would on these samples; a client without any has no numbers."""
    attack = RobustEvaluation((0.1, 0.3), steps=4)
    data = fed.InMemoryData(test_sizes=(0, 3, 5, 9, 2, 4, 0, 8))
    executor = CohortExecutor(
        fed.make_task("cnn", dtype="float64"), fed.make_procedure(), data, seed=fed.SEED,
        kind=kind, adversary=attack,
    )  # fmt: skip
    found = executor.evaluate(fed.job(executor, (0, 3, 7), absent=(3,), action="evaluate"))
    whole = executor.evaluate(fed.job(executor, (0, 3, 7), action="evaluate"))
    payload = fed.initial_payload(executor)
    held = data.clients([3, 7], split="test")
    for place, rows in zip((1, 2), held.rows, strict=True):
        samples = held.features[rows], held.targets[rows]
        expected = executor.evaluate_moved(payload.params, payload.buffers, *samples, attack)
        for name, value in expected.items():
            assert float(whole.metrics[name][place]) == pytest.approx(value, abs=1e-12)
    assert all(float(column[0]) == 0 for column in whole.metrics.values())
    assert all(float(column[1]) == 0 for column in found.metrics.values())
    assert found.num_examples.tolist() == [0, 0, 8]
