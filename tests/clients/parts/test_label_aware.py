"""Parts that know how many samples of each class their client has."""

import pytest
import torch

from clients.local_sgd import LocalSGD
from clients.parts.calibrated_logits import CalibratedLogits
from clients.parts.margin import Margin
from clients.parts.restricted_softmax import RestrictedSoftmax
from fedsim.client.bound import BoundObjective
from fedsim.client.overriding import descent_of, stacks
from fedsim.client.part import ClientPart, Own, Trained
from fedsim.client.procedure import CLASS_COUNTS, Named
from fedsim.messages.layout import Payload
from tests.clients.parts.test_proximal import CLIENTS, trained
from tests.laws import federations as fed
from tests.tiers import by_turns, slow

PARTS = {
    "calibrated": {"name": "calibrated_logits", "tau": 0.8},
    "restricted": {"name": "restricted_softmax", "alpha": 0.3},
}
PLAIN = [{"name": "calibrated_logits", "tau": 0.0}, {"name": "restricted_softmax", "alpha": 1.0}]
KINDS = ("batched", "vmap", "loop")


class Telling(ClientPart):
    """Returns what it was told of the client's samples."""

    knows = (CLASS_COUNTS,)
    stacks = True

    @property
    def strength(self) -> float:
        return 0.0

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        return {"counts": sent[CLASS_COUNTS]}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        return {"counts": own["counts"]}, state


@pytest.mark.parametrize("model", ["mlp", "cnn", "cnn_batchnorm"])
@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("descends", [True, False])
def test_a_part_is_told_the_counts_of_its_own_client(kind, model, descends):
    if model == "cnn_batchnorm" and kind != "loop":
        return
    data = fed.InMemoryData((*fed.SIZES, 0))
    parts = [Telling(), *([] if descends else [Margin()])]
    procedure = LocalSGD(parts=parts)
    assert (descent_of(procedure, 1) is not None) == descends
    executor = fed.make_executor(model, procedure, data, kind=kind)
    members = (5, 8, 0, 3, 7)
    counts = executor.train(fed.job(executor, members, absent=(3,))).extra["counts"]
    for row, client in enumerate(members):
        found = data.clients([client])
        mine = torch.from_numpy(found.targets[found.rows[0]])
        expected = torch.bincount(mine, minlength=fed.CLASSES) * (client != 3)
        assert torch.equal(counts[row], expected.float())


def test_nobody_counts_where_nobody_asks():
    executor = fed.make_executor("mlp", LocalSGD())
    _, batches = executor.inputs.batches(fed.job(executor, CLIENTS), [0, 1, 2, 3])
    assert batches.known == {}


@pytest.mark.parametrize("model", ["mlp", slow("cnn")])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("beside", [[], [{"name": "margin", "coefficient": 0.3}]])
def test_executors_agree(part, model, beside):
    options = {"model": model, "parts": [part, *beside]}
    assert stacks(fed.local_sgd(parts=[part, *beside]))
    batched, vmapped, looped = (trained(kind, **options) for kind in KINDS)
    torch.testing.assert_close(batched, looped, rtol=0, atol=1e-11)
    torch.testing.assert_close(vmapped, looped, rtol=0, atol=1e-11)
    free = trained("loop", model=model, parts=beside)
    assert float((free - looped).abs().max()) > 1e-3


class Scaled(ClientPart):
    """A penalty of an own number per client: that times the mean square of the outputs."""

    stacks = True

    def __init__(self, name: str) -> None:
        self._name = name

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        return {"scale": received[self._name].sum()}

    def penalty(self, own: Own) -> BoundObjective:
        def term(scale, outputs, targets, weights):
            squares = (outputs**2).sum(-1)
            kept = torch.where(weights > 0, squares, torch.zeros_like(squares))
            return scale * kept.sum() / weights.sum().clamp(min=1)

        return BoundObjective(term, own["scale"])


class ScaledToo(Scaled):
    stacks = True


def test_penalties_of_own_numbers_add_up_in_every_executor():
    parts = [Scaled("output.bias"), Margin(coefficient=0.2), ScaledToo("output.weight")]
    found = []
    for kind in KINDS:
        procedure = LocalSGD(batch_size=8, local_steps=4, parts=parts)
        assert stacks(procedure)
        executor = fed.make_executor("mlp", procedure, kind=kind, dtype="float64")
        start = fed.initial_payload(executor)
        own = Payload(torch.stack([start.params * (1 + 0.2 * c) for c in CLIENTS]))
        shared = Payload(None, start.buffers)
        found.append(executor.train(fed.job(executor, CLIENTS, shared=shared, personal=own)).params)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-11)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=1e-11)


@pytest.mark.parametrize("part", PLAIN, ids=PARTS)
@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_without_strength_they_change_no_bit(kind, part):
    assert torch.equal(trained(kind, parts=[part]), trained(kind))


def test_a_class_that_is_not_there_is_left_alone():
    """At alpha = 0 its row of the last layer gets no gradient but through what is below it."""
    procedure = LocalSGD(batch_size=8, parts=[RestrictedSoftmax(alpha=0.0)])
    executor = fed.make_executor("logistic", procedure, dtype="float64")
    found = executor.train(fed.job(executor, (0,))).params[0]
    moved = executor.layout.unflatten(found - fed.initial_payload(executor).params)
    rows = moved["output.weight"].abs().sum(1)
    data = executor.data.clients([0])
    target = int(data.targets[data.rows[0]][0])
    assert [float(row) > 0 for row in rows] == [c == target for c in range(fed.CLASSES)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CalibratedLogits(tau=-1.0), "^tau = -1.0: must be >= 0 and finite"),
        (lambda: RestrictedSoftmax(alpha=1.5), r"^alpha = 1.5: must be in \[0, 1\]"),
        (lambda: RestrictedSoftmax(alpha=float("nan")), r"^alpha = nan: must be in \[0, 1\]"),
    ],
)
def test_impossible_numbers_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
