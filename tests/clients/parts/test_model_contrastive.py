"""The model-contrastive term: every executor, and models that have no such representations."""

import pytest
import torch

from clients.local_sgd import LocalSGD
from clients.parts.model_contrastive import ModelContrastive, contrast
from fedsim.client.bound import BoundObjective
from fedsim.client.part import ClientPart
from fedsim.messages.layout import Payload
from tests.clients.parts.test_proximal import CLIENTS
from tests.laws import federations as fed
from tests.tiers import by_turns, slow

PART = {"name": "model_contrastive", "mu": 2.0}
KINDS = ("batched", "vmap", "loop")


def two_rounds(kind, model, parts):
    """The second round's models of clients that start it from a model which is none of theirs."""
    procedure = fed.local_sgd(local_lr=0.1, batch_size=8, local_steps=7, parts=parts)
    executor = fed.make_executor(model, procedure, kind=kind, dtype="float64")
    first = executor.train(fed.job(executor, CLIENTS))
    start = fed.initial_payload(executor)
    shared = Payload(first.params.mean(0), start.buffers)
    state = {"state": first.state, "has_state": (bool(first.state),) * len(CLIENTS)}
    return executor.train(fed.job(executor, CLIENTS, server_round=2, shared=shared, **state)).params


@pytest.mark.parametrize("model", ["mlp", slow("cnn"), slow("mlp_dropout")])
@pytest.mark.parametrize("beside", [[], [{"name": "sharpness_aware", "rho": 0.2}]])
def test_executors_agree(model, beside):
    batched, vmapped, looped = (two_rounds(kind, model, [PART, *beside]) for kind in KINDS)
    torch.testing.assert_close(batched, looped, rtol=0, atol=1e-10)
    torch.testing.assert_close(vmapped, looped, rtol=0, atol=1e-10)
    free = two_rounds("loop", model, beside)
    assert float((free - looped).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_without_strength_it_changes_no_bit(kind):
    parts = [{**PART, "mu": 0.0}]
    assert torch.equal(two_rounds(kind, "mlp", parts), two_rounds(kind, "mlp", []))


def test_the_term_is_the_cross_entropy_of_two_cosines():
    draw = torch.Generator().manual_seed(3)
    z, there, before = torch.randn(3, 6, 4, generator=draw, dtype=torch.float64)
    cosines = torch.stack(
        [torch.nn.functional.cosine_similarity(z, each) for each in (there, before)], dim=1
    )
    expected = torch.nn.functional.cross_entropy(
        cosines / 0.3, torch.zeros(6, dtype=torch.int64), reduction="none"
    )
    found = contrast(z, there, before, temperature=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_a_representation_of_zeros_has_a_finite_slope():
    z = torch.zeros(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(
        contrast(z, torch.ones(2, 3), -torch.ones(2, 3), temperature=0.5).sum(), z
    )
    assert bool(slope.isfinite().all())


class Inner(ClientPart):
    """A penalty of what goes into the last layer."""

    stacks = True

    def inner_penalty(self, own):
        def term(own, inside, targets, weights):
            return (inside.square().sum(-1) * weights).sum()

        return BoundObjective(term, own)


class InnerToo(Inner):
    stacks = True


def test_inner_penalties_add_up_in_every_executor():
    found = []
    for kind in KINDS:
        procedure = LocalSGD(batch_size=8, local_lr=0.01, parts=[Inner(), InnerToo()])
        executor = fed.make_executor("mlp", procedure, kind=kind, dtype="float64")
        found.append(executor.train(fed.job(executor, CLIENTS)).params)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-11)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=1e-11)
    one = fed.make_executor(
        "mlp", LocalSGD(batch_size=8, local_lr=0.01, parts=[Inner()]), dtype="float64"
    )
    assert float((one.train(fed.job(one, CLIENTS)).params - found[0]).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mu": -1.0}, "^mu = -1.0: must be >= 0"),
        ({"temperature": 0.0}, "^temperature = 0.0: must be > 0"),
    ],
)
def test_impossible_numbers_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        ModelContrastive(**keys)
