"""Parts of one procedure together: their order, their states, and what is refused."""

import pytest
import torch

from clients.local_sgd import LocalSGD
from clients.parts.adversarial import Adversarial
from clients.parts.margin import Margin
from clients.parts.proximal import Proximal
from fedsim.client.overriding import descent_of, stacks
from fedsim.client.part import ClientPart, Here, Own, Trained, as_sent, sent_as
from fedsim.client.parts import Parts
from fedsim.client.procedure import Named
from tests.laws import federations as fed
from tests.tiers import by_turns

CLIENTS = (0, 3, 4, 5)  # 1, 7, 20 and 45 samples


class Doubled(ClientPart):
    """Doubles the gradient."""

    stacks = True

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        return {n: 2 * g for n, g in grads.items()}, own


class Raised(ClientPart):
    """Adds 1 to the gradient."""

    stacks = True

    @property
    def strength(self) -> float:
        return 0.0

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        return {n: g + 1 for n, g in grads.items()}, own

    def push(self, own: Own) -> Named:
        return own["ones"]

    def begin(self, received: Named, sent: Named, state: Named) -> Own:
        return {"ones": {n: torch.ones_like(t) for n, t in received.items()}}


class Counting(ClientPart):
    """Keeps the number of its steps, returns their sizes' sum and how far it went."""

    stacks = True

    @property
    def strength(self) -> float:
        return 0.0

    def initial_state(self, params: Named) -> Named:
        first = next(iter(params.values()))
        return {"steps": torch.zeros((), dtype=first.dtype)}

    def finish(self, own: Own, trained: Trained, state: Named) -> tuple[Named, Named]:
        moved = {n: trained.params[n] - t for n, t in trained.received.items()}
        extra = {"path": trained.path, **as_sent("moved", moved)}
        return extra, {"steps": state["steps"] + trained.steps}


def result_of(kind, parts, **arguments):
    procedure = LocalSGD(local_lr=0.1, batch_size=8, local_epochs=2, parts=parts, **arguments)
    executor = fed.make_executor("mlp", procedure, kind=kind, dtype="float64")
    return executor, executor.train(fed.job(executor, CLIENTS))


def test_the_order_of_the_list_is_the_order_of_the_changes():
    grads = {"w": torch.zeros(2)}
    here = Here(grads, {}, None, None, 0.1)
    for parts, expected in (([Doubled(), Raised()], 1.0), ([Raised(), Doubled()], 2.0)):
        together = Parts(parts)
        own = together.begin(grads, {}, {})
        changed, _ = together.gradient(grads, here, own)
        assert changed["w"].tolist() == [expected] * 2


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
def test_what_a_part_keeps_and_returns_is_the_same_in_every_executor(kind, momentum, kept):
    parts = [Counting(), Proximal(mu=0.1)]
    executor, result = result_of(kind, parts, momentum=momentum, keep_optimizer=kept)
    assert descent_of(executor.procedure, 1) is not None
    steps = torch.tensor([2.0, 2.0, 6.0, 12.0], dtype=torch.float64)
    torch.testing.assert_close(result.extra["path"], 0.1 * steps, rtol=0, atol=1e-14)
    assert torch.equal(result.state["Counting/steps"], steps)
    start = fed.initial_payload(executor).params
    moved = executor.layout.flatten(sent_as("moved", result.extra))
    torch.testing.assert_close(moved, result.params - start, rtol=0, atol=0)
    names = {"Counting/steps", *(executor.layout.names if kept and momentum else ())}
    assert result.state.keys() == names
    # their state goes on
    job = fed.job(executor, CLIENTS, server_round=2, state=result.state, has_state=(True,) * 4)
    assert torch.equal(executor.train(job).state["Counting/steps"], 2 * steps)


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_a_client_without_samples_took_no_step(kind):
    procedure = LocalSGD(parts=[Counting()])
    executor = fed.make_executor(
        "mlp", procedure, fed.InMemoryData((*fed.SIZES, 0)), kind=kind, dtype="float64"
    )
    result = executor.train(fed.job(executor, (5, len(fed.SIZES))))
    assert result.state["Counting/steps"].tolist()[1] == 0
    assert result.extra["path"].tolist()[1] == 0


def test_several_linear_parts_are_one_descent():
    descent = descent_of(LocalSGD(parts=[Proximal(mu=0.2), Raised()], weight_decay=0.5), 1)
    assert (descent.pull, descent.decay) == (0.2, 0.7)
    _, descended = result_of("batched", [Proximal(mu=0.2), Raised()])
    _, looped = result_of("loop", [Proximal(mu=0.2), Raised()])
    torch.testing.assert_close(descended.params, looped.params, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", [Margin(), Doubled()], ids=["a penalty", "a factor"])
def test_a_part_that_is_not_linear_is_no_descent(part):
    assert descent_of(LocalSGD(parts=[Proximal(mu=0.2), part]), 1) is None


class Further(Proximal):
    """Changes the gradient of a class below that says it is linear."""

    def gradient(self, grads: Named, here: Here, own: Own) -> tuple[Named, Own]:
        changed, own = super().gradient(grads, here, own)
        return {n: 3 * g for n, g in changed.items()}, own


def test_overridden_means_overridden():
    procedure = LocalSGD(parts=[Further(mu=0.1)])
    assert descent_of(procedure, 1) is None
    assert not stacks(procedure)
    _, one = result_of("vmap", [Further(mu=0.1)])
    _, other = result_of("vmap", [Proximal(mu=0.1)])
    assert not torch.equal(one.params, other.params)


def test_a_part_stands_once_and_one_replaces_the_loss():
    with pytest.raises(ValueError, match="parts: Proximal is there twice"):
        LocalSGD(parts=[Proximal(mu=0.1), Proximal(mu=0.2)])

    class First(ClientPart):
        def objective(self, own):
            return None

    class Second(First):
        pass

    with pytest.raises(ValueError, match="parts: First and Second each minimise something"):
        LocalSGD(parts=[First(), Second()])


def test_penalties_add_up():
    """Two margins of different classes are one of twice the coefficient."""

    class Other(Margin):
        stacks = True

    _, two = result_of("vmap", [Margin(coefficient=0.1), Other(coefficient=0.1)])
    _, one = result_of("vmap", [Margin(coefficient=0.2)])
    torch.testing.assert_close(two.params, one.params, rtol=0, atol=1e-12)


class Elsewhere(ClientPart):
    """Takes the gradient at twice the parameters, by a function that knows nothing else."""

    stacks = True

    def wrapped(self, gradient, own):
        def there(params, buffers, batch, objective=None, penalty=None, inner=None):
            twice = {n: 2 * p for n, p in params.items()}
            return gradient(twice, buffers, batch, objective, penalty, inner)

        return there


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_what_else_a_gradient_has_stays_beside_a_function_in_its_place(kind):
    """Samples are moved by the model itself, and the gradient is taken elsewhere."""
    found = [
        result_of(kind, parts)[1].params
        for parts in (
            [Elsewhere(), Adversarial(radius=0.3)],
            [Elsewhere()],
            [Adversarial(radius=0.3)],
        )
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((found[one] - found[other]).abs().max()) > 1e-4
