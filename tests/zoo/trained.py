"""What a scenario of the zoo trains, held to plain torch."""

import torch

from fedsim.runs.world import build
from fedsim.scenario.scenario import Scenario
from tests.laws.federations import job
from tests.zoo import plain

SEED, LR, BATCH, ROUND = 11, 0.1, 4, 3


def scenario(model, executor, *, task=None, client=None, partition=None, **engine):
    document = {
        "seed": SEED,
        "rounds": 2,
        "task": {"model": f"tests.zoo.models:{model}", "dtype": "float64", **(task or {})},
        "data": {"name": "tests.zoo.data:samples"},
        "partition": partition or {"kind": "natural"},
        "participation": {"kind": "full"},
        "strategy": {"name": "fedavg"},
        "client": {"name": "local_sgd", "local_lr": LR, "batch_size": BATCH, **(client or {})},
        "engine": {"kind": "inline", "executor": executor, **engine},
    }
    return Scenario.from_resolved(document, "zoo")


_ROUNDING = 1e-14  # relative, of a start: some ten roundings
_STARTS = 3


class NoAnswerError(AssertionError):
    """Plain torch itself has no one answer: rounding decides, as on which side of 0 a value is."""


def expected(executor, client, *, local_epochs=1, momentum=0.0, start=None):
    """The model of one client after a round, in plain torch; `start` moves where it begins."""
    drawn = executor.data.clients([client])
    model = executor.task.build_model(SEED)
    if start is not None:
        draws = torch.Generator().manual_seed(start)
        with torch.no_grad():
            for parameter in model.parameters():
                moves = torch.rand(parameter.shape, generator=draws, dtype=parameter.dtype)
                parameter.mul_(1 + _ROUNDING * (2 * moves - 1))
    return plain.trained(
        model, client, drawn.features, drawn.targets, drawn.rows[0], seed=SEED,
        server_round=ROUND, batch=BATCH, drawn=bool(executor.inputs.dropouts), epochs=local_epochs,
        lr=LR, momentum=momentum,
    )  # fmt: skip


def require_plain(executor, result, client, place, **options):
    layout, model = executor.layout, expected(executor, client, **options)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    found = {n: t[place] for n, t in layout.unflatten(result.params).items()}
    found |= {name: stack[place] for name, stack in result.buffers.items()}
    assert found.keys() == set(layout.names)
    try:
        _require_close(found, state)
    except AssertionError as error:
        if rounding_decides(executor, client, **options):
            raise NoAnswerError(str(error)) from error
        raise


def _require_close(found, state):
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, state[name].detach(), rtol=1e-9, atol=1e-9, msg=name)


def rounding_decides(executor, client, **options):
    """Whether plain torch ends elsewhere when its start moves by less than rounding moves it."""
    state = expected(executor, client, **options).state_dict()
    for start in range(_STARTS):
        try:
            _require_close(expected(executor, client, start=start, **options).state_dict(), state)
        except AssertionError:
            return True
    return False


def check(model, kind, *, task=None, **client):
    """Train every client by two executors in another order; returns the plan."""
    world = build(scenario(model, kind, task=task, client=client))
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
        for place, number in enumerate(clients):
            require_plain(one, result, number, place, **client)
    return world.plan
