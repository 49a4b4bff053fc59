"""Awkward models train under every executor as plain torch trains them, or are refused."""

import gc

import numpy as np
import pytest

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.runs.world import build
from tests.laws.federations import job
from tests.zoo import models
from tests.zoo.trained import check, scenario

GOOD = [name for name in models.ZOO if name not in models.REFUSED]
SLICE = [
    "ChainInPlace", "InTraining", "Twice", "Counter", "Assigned", "Batch", "Tied", "Lazy",
    "PythonDrawn", "Masked",
]  # fmt: skip
EVALUATED = ["Layered", "Cells", "Instances", "Items", "BatchUntracked"]
KINDS = ("auto", "batched", "vmap", "loop")
pytestmark = pytest.mark.filterwarnings("ignore")  # what models warn of is theirs


@pytest.mark.parametrize("model", [pytest.param(m, marks=() if m in SLICE else pytest.mark.slow)
                                   for m in GOOD])  # fmt: skip
def test_it_trains_as_plain_torch_does(model):
    check(model, "auto")
    check(model, "loop")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batched", "vmap"])
@pytest.mark.parametrize("model", GOOD)
def test_asked_for_an_executor_it_trains_so_or_is_refused_with_a_reason(model, kind):
    refusal = None
    try:
        build(scenario(model, kind))
    except ScenarioError as error:
        refusal = str(error)
    if refusal is None:
        assert check(model, kind).executor == kind
    else:
        assert f"executor = '{kind}'" in refusal
        assert len(refusal.partition(f"'{kind}'")[2]) > 30


@pytest.mark.parametrize("model", models.REFUSED)
def test_it_is_refused_before_round_1(model):
    with pytest.raises(ScenarioError, match=models.REFUSED[model]):
        build(scenario(model, "auto"))


def test_most_of_them_train_together():
    # a probe that refused everything would pass the tests above
    found = [build(scenario(name, "auto")).plan.executor for name in ("Layered", "Ids", "Scalar")]
    assert found == ["vmap"] * 3
    assert build(scenario("Chain", "auto")).plan.executor == "batched"


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("model", [pytest.param(m, marks=() if m in EVALUATED else pytest.mark.slow)
                                   for m in GOOD])  # fmt: skip
def test_clients_evaluate_as_each_of_them_alone(model, share):
    partition = {"kind": "natural", "test_fraction": share}
    executor = build(
        scenario(model, "auto", partition=partition, client={"last_batch": "merge"})
    ).app._build_executor()
    asked = job(executor, (0, 2), action="evaluate")
    together = executor.evaluate(asked)
    drawn = executor.data.clients([0, 2], split="test")
    for place, rows in enumerate(drawn.rows):
        alone = executor.evaluate_arrays(
            asked.shared.params, asked.shared.buffers, drawn.features, drawn.targets, rows
        )
        assert together.num_examples[place] == len(rows)
        for name, values in together.metrics.items():
            expected = alone[name] if len(rows) else 0.0
            assert float(values[place]) == pytest.approx(expected, rel=1e-9), name


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("model", ["Counter", "Twice", "PythonDrawn", "OfTheClass", "Stateful"])
def test_real_workers_give_the_bits_of_one(model, tmp_path):
    bits = set()
    for workers in (1, 2):
        asked = scenario(model, "auto", kind="ray", workers=workers, chunk_size=2)
        bits.add(fedsim.start(asked, out=tmp_path / str(workers)).summary["params_sha256"])
        gc.collect()
    inline = fedsim.start(scenario(model, "auto"), out=tmp_path / "inline")
    assert bits == {inline.summary["params_sha256"]}
    assert np.isfinite(inline.summary["final"]["test/loss"])


def test_samples_that_hardly_know_of_each_other_are_seen_too():
    # found by the search: the effect is far below what float32 rounds
    parts = {"model": "tests.zoo.composed:Composed", "parts": ["Contrasted"] * 3}
    for dtype in ("float32", "float64"):
        plan = build(scenario("Composed", "auto", task={**parts, "dtype": dtype})).plan
        assert plan.executor == "loop"
