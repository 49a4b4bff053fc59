"""Algorithms at Flower's clients, as a user writes them: torch loops, state in the context.

Each trains the model of a `Local` and returns what is sent besides; `LOCAL` has them by name.
Symbols are those of the papers, hyperparameters come with the workload.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

State = Mapping[str, Tensor]
STATE = "client-state"


class Local(NamedTuple):
    """One client in one round.

    Attributes:
        model: Holds the tensors received.
        batches: The round's samples and targets.
        lr: Step size.
        settings: The strategy's hyperparameters.
        message: What was received.
        context: Where state is kept between rounds.
    """

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    lr: float
    settings: Mapping[str, Any]
    message: Message
    context: Context


class Done(NamedTuple):
    """What a client sends back: metrics and arrays besides its model."""

    metrics: dict[str, float]
    arrays: dict[str, ArrayRecord]


def kept(local: Local, first: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the client's state, made by `first` before it trains for the first time."""
    if STATE in local.context.state:
        return local.context.state[STATE].to_torch_state_dict()
    return {n: first(n, p.detach()) for n, p in local.model.named_parameters()}


def keep(local: Local, state: State) -> None:
    """Keep a state until the client's next round."""
    local.context.state[STATE] = ArrayRecord(dict(state))


def received(local: Local) -> dict[str, Tensor]:
    """Return a copy of the model received."""
    return {n: p.detach().clone() for n, p in local.model.named_parameters()}


def descend(
    local: Local,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    correct: Callable[[str, nn.Parameter], Tensor] | None = None,
) -> int:
    """Train by SGD and return the number of steps.

    Args:
        local: The client.
        penalty: Added to the loss.
        correct: Gives what is added to a parameter's gradient.
    """
    optimizer = torch.optim.SGD(local.model.parameters(), lr=local.lr)
    steps = 0
    for x, y in local.batches:
        optimizer.zero_grad()
        loss = cross_entropy(local.model(x), y)
        if penalty is not None:
            loss = loss + penalty(local.model)
        loss.backward()
        if correct is not None:
            for name, parameter in local.model.named_parameters():
                parameter.grad.add_(correct(name, parameter))
        optimizer.step()
        steps += 1
    return steps


def fedavg(local: Local) -> Done:
    """Plain SGD."""
    descend(local)
    return Done({}, {})


def fedprox(local: Local) -> Done:
    """SGD with mu/2 * |w - w_t|^2 in the loss (Li et al., MLSys 2020)."""
    start = received(local)
    mu = local.message.content["config"]["proximal-mu"]

    def penalty(model: nn.Module) -> Tensor:
        return mu / 2 * sum((p - start[n]).square().sum() for n, p in model.named_parameters())

    descend(local, penalty)
    return Done({}, {})


def fednova(local: Local) -> Done:
    """SGD; tau_i is sent besides (Wang et al., NeurIPS 2020)."""
    return Done({"local-steps": float(descend(local))}, {})


def scaffold(local: Local) -> Done:
    """SGD with gradients corrected by c - c_i, option II (Karimireddy et al., ICML 2020)."""
    start = received(local)
    server = local.message.content["control"].to_torch_state_dict()
    own = kept(local, lambda _, p: torch.zeros_like(p))
    correction = {n: server[n] - own[n] for n in own}
    steps = descend(local, correct=lambda name, _: correction[name])
    after = {
        n: own[n] - server[n] + (start[n] - p.detach()) / (steps * local.lr)
        for n, p in local.model.named_parameters()
    }
    keep(local, after)
    return Done({}, {"control": ArrayRecord({n: after[n] - own[n] for n in own})})


def feddyn(local: Local) -> Done:
    """SGD with -<lambda_k, w> + alpha/2 * |w - w_t|^2 in the loss (Acar et al., ICLR 2021)."""
    start, alpha = received(local), local.settings["alpha"]
    own = kept(local, lambda _, p: torch.zeros_like(p))
    descend(local, correct=lambda n, p: alpha * (p.detach() - start[n]) - own[n])
    keep(
        local,
        {n: own[n] - alpha * (p.detach() - start[n]) for n, p in local.model.named_parameters()},
    )
    return Done({}, {})


def ditto(local: Local) -> Done:
    """SGD of the shared model and of an own one held near it (Li et al., ICML 2021)."""
    start, strength = received(local), local.settings["strength"]
    mine = kept(local, lambda _, p: p.clone())
    batches = list(local.batches)
    descend(local._replace(batches=iter(batches)))
    shared = received(local)
    local.model.load_state_dict(mine)
    descend(
        local._replace(batches=iter(batches)),
        correct=lambda n, p: strength * (p.detach() - start[n]),
    )
    keep(local, received(local))
    local.model.load_state_dict(shared)
    return Done({}, {})


LOCAL: dict[str, Callable[[Local], Done]] = {
    each.__name__: each for each in (fedavg, fedprox, fednova, scaffold, feddyn, ditto)
}
