"""Awkward models train under every executor as plain torch trains them, or are refused."""

import gc

import numpy as np
import pytest
import torch

import fedsim
from fedsim.errors import ScenarioError
from fedsim.scenario import Scenario
from fedsim.world import build
from tests.laws.federations import job
from tests.zoo import models, plain

SEED, LR, BATCH, ROUND = 11, 0.1, 4, 3
GOOD = [name for name in models.ZOO if name not in models.REFUSED]
SLICE = [
    "Chain", "ChainInPlace", "InTraining", "Twice", "Counter", "OfTheModule", "Assigned", "Memo",
    "Batch", "Tied", "Lazy", "PythonDrawn", "ModuleDrawn", "Recurrent", "Masked", "Contrasted",
    "ChangesItsInput", "LateBuffer",
]  # fmt: skip
KINDS = ("auto", "batched", "vmap", "loop")
pytestmark = pytest.mark.filterwarnings("ignore")  # what models warn of is theirs


def scenario(model, executor, **engine):
    document = {
        "seed": SEED,
        "rounds": 2,
        "task": {"model": f"tests.zoo.models:{model}", "dtype": "float64"},
        "data": {"name": "tests.zoo.data:samples"},
        "partition": {"kind": "natural"},
        "participation": {"kind": "full"},
        "strategy": {"name": "fedavg"},
        "client": {"name": "local_sgd", "local_lr": LR, "batch_size": BATCH},
        "engine": {"kind": "inline", "executor": executor, **engine},
    }
    return Scenario.from_resolved(document, "zoo")


def expected(executor, client):
    """The model of one client after a round, in plain torch."""
    drawn = executor.data.clients([client])
    model = executor.task.build_model(SEED)
    return plain.trained(
        model, client, drawn.features, drawn.targets, drawn.rows[0], seed=SEED,
        server_round=ROUND, lr=LR, batch=BATCH, drawn=bool(executor._dropouts),
    )  # fmt: skip


def require_plain(executor, result, client, place):
    layout, model = executor.layout, expected(executor, client)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    found = {n: t[place] for n, t in layout.unflatten(result.params).items()}
    found |= {name: stack[place] for name, stack in result.buffers.items()}
    assert found.keys() == set(layout.names)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, state[name].detach(), rtol=1e-9, atol=1e-9, msg=name)


def check(model, kind):
    world = build(scenario(model, kind))
    # two processes that train and evaluate in another order, from the same recipe
    one, other = world.app._build_executor(), world.app._build_executor()
    asked = {"server_round": ROUND}
    first = one.train(job(one, (0, 2), **asked))
    second = other.train(job(other, (1, 3), **asked))
    drawn = world.data.clients([0])
    other.evaluate_arrays(first.params[0], {n: b[0] for n, b in first.buffers.items()},
                          drawn.features, drawn.targets)  # fmt: skip
    again = other.train(job(other, (0, 2), **asked))
    third = one.train(job(one, (1, 3), **asked))
    for result, same in ((first, again), (second, third)):
        assert torch.equal(result.params, same.params)
        for name, stack in result.buffers.items():
            assert torch.equal(stack, same.buffers[name]), name
    for result, clients in ((first, (0, 2)), (second, (1, 3))):
        for place, client in enumerate(clients):
            require_plain(one, result, client, place)
    return world.plan


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
