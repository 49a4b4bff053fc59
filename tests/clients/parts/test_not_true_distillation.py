"""Distillation of not-true classes: every executor, the term alone, and what it keeps."""

import pytest
import torch

from clients.local_sgd import LocalSGD
from clients.parts.not_true_distillation import NotTrueDistillation, not_true_divergence
from fedsim.client.part import ClientPart, Here, Own
from tests.clients.parts.test_proximal import CLIENTS, trained
from tests.laws import federations as fed
from tests.tiers import by_turns, slow

PART = {"name": "not_true_distillation", "beta": 2.0, "tau": 1.5}
KINDS = ("batched", "vmap", "loop")


@pytest.mark.parametrize("model", ["mlp", slow("cnn"), slow("mlp_dropout")])
@pytest.mark.parametrize("beside", [[], [{"name": "sharpness_aware", "rho": 0.2}]])
def test_executors_agree(model, beside):
    options = {"model": model, "parts": [PART, *beside]}
    batched, vmapped, looped = (trained(kind, **options) for kind in KINDS)
    torch.testing.assert_close(batched, looped, rtol=0, atol=1e-11)
    torch.testing.assert_close(vmapped, looped, rtol=0, atol=1e-11)
    free = trained("loop", model=model, parts=beside)
    assert float((free - looped).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_without_strength_it_changes_no_bit(kind):
    assert torch.equal(trained(kind, parts=[{**PART, "beta": 0.0}]), trained(kind))


def test_the_divergence_is_that_of_two_distributions_without_the_true_class():
    draw = torch.Generator().manual_seed(1)
    kept, outputs = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 0])
    found = not_true_divergence(kept, outputs.requires_grad_(), targets, tau=0.7)
    for row, target in enumerate(targets.tolist()):
        others = [c for c in range(4) if c != target]
        p = torch.distributions.Categorical(logits=kept[row, others] / 0.7)
        q = torch.distributions.Categorical(logits=outputs[row, others] / 0.7)
        expected = torch.distributions.kl_divergence(p, q)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-14)
    (slope,) = torch.autograd.grad(found.sum(), outputs)
    assert bool(slope.isfinite().all())
    assert slope[torch.arange(5), targets].tolist() == [0.0] * 5


class Outputs(ClientPart):
    """Holds the outputs at the parameters here against those of the gradient's own pass."""

    stacks = True

    def __init__(self) -> None:
        self.looked: list[torch.Tensor] = []
        self.seen: list[torch.Tensor] = []

    def look(self, here: Here, own: Own) -> Own:
        self.looked.append(here.outputs_at(here.params))
        assert not self.looked[-1].requires_grad
        return own

    def penalty(self, own: Own):
        def term(outputs, targets, weights):
            self.seen.append(outputs.detach())
            return 0 * outputs.sum()

        return term


@pytest.mark.parametrize("model", ["mlp", "cnn", "cnn_batchnorm"])
def test_a_look_changes_nothing_and_sees_what_the_gradient_sees(model):
    part = Outputs()
    found = []
    for parts in ([part], []):
        procedure = LocalSGD(batch_size=8, parts=parts)
        executor = fed.make_executor(model, procedure, kind="loop", dtype="float64")
        found.append(executor.train(fed.job(executor, CLIENTS)))
    assert len(part.seen) == len(part.looked) > 4
    for seen, looked in zip(part.seen, part.looked, strict=True):
        torch.testing.assert_close(seen, looked, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0].params, found[1].params, rtol=0, atol=1e-14)
    for name, buffer in found[0].buffers.items():
        assert torch.equal(buffer, found[1].buffers[name])


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"beta": -1.0}, "^beta = -1.0: must be >= 0"), ({"tau": 0.0}, "^tau = 0.0: must be > 0")],
)
def test_impossible_numbers_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        NotTrueDistillation(**keys)
