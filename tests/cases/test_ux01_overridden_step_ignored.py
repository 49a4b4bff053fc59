"""A procedure that inherits is the one that runs, under every executor."""

import pytest
import torch

from clients.local_sgd import LocalSGD
from fedsim.client.overriding import descent_of, stacks
from tests.laws import federations as fed

KINDS = ("batched", "vmap", "loop")


class Frozen(LocalSGD):
    def step(self, carry, batch, gradient, *, server_round):
        new, loss = super().step(carry, batch, gradient, server_round=server_round)
        return {**new, "params": carry["params"]}, loss


class Counting(LocalSGD):
    def begin(self, params, buffers, extra, state):
        carry = super().begin(params, buffers, extra, state)
        return {**carry, "tau": next(iter(params.values())).new_zeros(())}

    def step(self, carry, batch, gradient, *, server_round):
        carry, loss = super().step(carry, batch, gradient, server_round=server_round)
        return {**carry, "tau": carry["tau"] + 1}, loss

    def finish(self, carry, state):
        return {"tau": carry["tau"]}, state


class Whole(LocalSGD):
    """A norm over everything, of one client: wrong where several are stacked."""

    def step(self, carry, batch, gradient, *, server_round):
        moved, loss = super().step(carry, batch, gradient, server_round=server_round)
        norm = torch.stack([p.norm() for p in moved["params"].values()]).norm()
        return {**moved, "params": {n: p / norm for n, p in moved["params"].items()}}, loss


class Halved(LocalSGD):
    """Overrides what `step` calls."""

    def _moments(self, params):
        return {n: torch.ones_like(p) for n, p in super()._moments(params).items()}


class Finishing(LocalSGD):
    def finish(self, carry, state):
        return {"total": carry["params"]["0.weight"].sum()}, state


class Mixin:
    def step(self, carry, batch, gradient, *, server_round):
        return carry, torch.zeros(())


class Mixed(Mixin, LocalSGD):
    pass


class Longer(LocalSGD):
    """Nothing of a step is another."""

    @property
    def work(self):
        return super().work._replace(epochs=2)


class Knowing(Frozen):
    """Overrides the descent as well: whoever does so says that it holds."""

    def descent(self, server_round):
        return super().descent(server_round)._replace(step_size=0.0)


def trained(procedure, kind):
    """What three clients of unequal size return, float64; the plan's own choice is in `natural`."""
    if kind == "batched" and not stacks(procedure):
        kind = "vmap"
    executor = fed.make_executor("mlp", procedure, kind=kind, dtype="float64")
    return executor.train(fed.job(executor, (1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("made", [Frozen, Counting, Whole, Halved, Mixed, Longer, Knowing])
def test_every_executor_runs_the_class_as_it_is(made, momentum, kind):
    procedure = made(local_lr=0.1, momentum=momentum, batch_size=8)
    found, expected = trained(procedure, kind), trained(procedure, "loop")
    torch.testing.assert_close(found.params, expected.params, rtol=1e-9, atol=1e-12)
    assert found.extra.keys() == expected.extra.keys()
    for name, tensor in expected.extra.items():
        torch.testing.assert_close(found.extra[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_moves_nothing_leaves_the_model(kind):
    executor = fed.make_executor("mlp")
    sent = fed.initial_payload(executor).params
    assert (trained(Frozen(), kind).params == sent.double()).all()


@pytest.mark.parametrize("made", [Frozen, Counting, Whole, Halved, Finishing, Mixed])
def test_no_fast_path_below_what_is_overridden(made):
    assert descent_of(made(), 1) is None


@pytest.mark.parametrize("made", [LocalSGD, Longer, Knowing])
def test_the_fast_path_where_it_holds(made):
    assert descent_of(made(), 1) is not None


def test_a_step_put_on_the_object_counts_too():
    procedure = LocalSGD()
    assert stacks(procedure)
    procedure.step = Frozen().step
    assert descent_of(procedure, 1) is None
    assert not stacks(procedure)
