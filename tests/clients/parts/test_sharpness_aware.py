"""Sharpness-aware steps: every executor, no slope, and a minimum that is flat."""

import pytest
import torch

from clients.parts.sharpness_aware import SharpnessAware
from fedsim.client.bound import GradientFunctions
from fedsim.client.procedure import Batch
from tests.clients.parts.test_proximal import trained
from tests.tiers import by_turns

PART = {"name": "sharpness_aware", "rho": 0.3}


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_executors_agree(model):
    options = {"model": model, "weight_decay": 0.1, "parts": [PART]}
    batched, vmapped, looped = (trained(kind, **options) for kind in ("batched", "vmap", "loop"))
    torch.testing.assert_close(batched, looped, rtol=0, atol=1e-11)
    torch.testing.assert_close(vmapped, looped, rtol=0, atol=1e-11)
    free = trained("loop", **{**options, "parts": []})
    assert float((free - looped).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_without_a_distance_it_changes_no_bit(kind):
    assert torch.equal(trained(kind, parts=[{**PART, "rho": 0.0}]), trained(kind))


def wrapped(function, rho):
    """The gradient that the part makes of a function of one number."""

    def gradient(params, buffers, batch, objective=None, penalty=None, inner=None):
        leaf = params["w"].detach().requires_grad_()
        value = function(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        return value.detach(), {"w": slope}, buffers

    part = SharpnessAware(rho=rho)
    batch = Batch(torch.zeros(0), torch.zeros(0), torch.zeros(0), {})
    found = part.wrapped(
        GradientFunctions(gradient, None, None, None, None), part.begin({}, {}, {})
    )
    return lambda w: found({"w": torch.tensor(w, dtype=torch.float64)}, {}, batch)


def test_it_is_the_gradient_a_distance_up_the_slope():
    loss, grads, _ = wrapped(lambda w: w**2, rho=0.5)(-1.0)
    assert float(loss) == 1.0
    assert float(grads["w"]) == pytest.approx(2 * -1.5, abs=1e-12)


def test_where_there_is_no_slope_it_stays():
    _, grads, _ = wrapped(lambda w: w**2, rho=0.5)(0.0)
    assert float(grads["w"]) == 0.0


@pytest.mark.parametrize("rho", [-1.0, float("inf"), float("nan")])
def test_an_impossible_distance_is_refused(rho):
    with pytest.raises(ValueError, match=r"^rho = .*: must be >= 0 and finite"):
        SharpnessAware(rho=rho)
