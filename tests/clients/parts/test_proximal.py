"""The proximal part: by its own steps and as a descent, in every executor."""

import pytest
import torch

from clients.parts.proximal import Proximal
from fedsim.client.overriding import descent_of
from fedsim.messages.layout import Payload
from tests.laws import federations as fed
from tests.tiers import by_turns

CLIENTS = (0, 3, 4, 5)  # 1, 7, 20 and 45 samples


def trained(kind, *, model="mlp", personal=False, **arguments):
    procedure = fed.local_sgd(local_lr=0.1, batch_size=8, local_steps=7, **arguments)
    executor = fed.make_executor(model, procedure, kind=kind, dtype="float64")
    start = fed.initial_payload(executor)
    shared, own = start, Payload()
    if personal:  # every client starts from a model of its own
        own = Payload(torch.stack([start.params * (1 + 0.1 * c) for c in CLIENTS]))
        shared = Payload(None, start.buffers)
    return executor.train(fed.job(executor, CLIENTS, shared=shared, personal=own)).params


@pytest.mark.parametrize("personal", [False, True], ids=["one start", "own starts"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_descent_takes_the_steps_that_the_part_takes(model, momentum, personal):
    parts = [{"name": "proximal", "mu": 0.7}]
    options = {"momentum": momentum, "weight_decay": 0.1, "parts": parts}
    assert descent_of(fed.local_sgd(**options), 1).pull == 0.7
    descended, looped = (
        trained(kind, model=model, personal=personal, **options) for kind in ("batched", "loop")
    )
    torch.testing.assert_close(descended, looped, rtol=0, atol=1e-12)
    free = trained("batched", model=model, personal=personal, **{**options, "parts": []})
    assert float((free - descended).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_without_strength_it_changes_no_bit(kind):
    assert torch.equal(trained(kind, parts=[{"name": "proximal", "mu": 0.0}]), trained(kind))


def test_an_infinitely_strong_pull_leaves_the_model_where_it_was():
    # mu * eta = 1 takes a client back to the start and one step of the gradient away from it
    held = trained("batched", parts=[{"name": "proximal", "mu": 10.0}])
    free = trained("batched")
    start = fed.initial_payload(fed.make_executor("mlp", fed.local_sgd(), dtype="float64")).params
    assert float((held - start).abs().max()) < 0.5 * float((free - start).abs().max())


@pytest.mark.parametrize("mu", [-1.0, float("inf"), float("nan")])
def test_an_impossible_strength_is_refused(mu):
    with pytest.raises(ValueError, match=r"^mu = .*: must be >= 0 and finite"):
        Proximal(mu=mu)
