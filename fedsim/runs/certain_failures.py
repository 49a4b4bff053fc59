"""Failures that are certain before round 1, said there."""

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.basics.errors import ScenarioError
from fedsim.basics.text import names_of
from fedsim.client.batching.schedule import num_held_out
from fedsim.client.procedure import ClientProcedure
from fedsim.client.short_batches import ends_with_one, first_trouble, odd_sizes
from fedsim.data.federated import FederatedData
from fedsim.scenario.scenario import Scenario
from fedsim.tasks.task import Task

_SIZES = 16  # of batches that are not full, that are tried
_LOOKED_AT = 256  # clients among which one that holds samples is looked for


def check_last_batches(
    scenario: Scenario,
    data: FederatedData,
    task: Task,
    model: nn.Module,
    procedure: ClientProcedure,
    *,
    alone: bool = False,
) -> str | None:
    """Refuse epochs that end with a batch of one sample where the model cannot train on it.

    A user's own model that trains client by client may fail on batches of other sizes too, as one
    that has the size of a full batch written down.

    Args:
        scenario: The scenario.
        data: The clients' data.
        task: Its task.
        model: The task's model; it is left as it is.
        procedure: The client procedure.
        alone: Whether clients train one by one: batches of those that train together are filled up.

    Returns:
        Who does not train for having one sample, in a line, or None.

    Raises:
        ScenarioError: Naming clients, layer and remedy.
    """
    work = procedure.work
    own = any(each.startswith("[task]") for each in scenario.own_code)
    if work.last_batch == "keep" and (own or _normalises(model)):
        _check_lone(scenario, data, task, model, procedure)
    if own and alone:
        _check_sizes(data, task, model, procedure)
    return _left_out(data, procedure) if work.last_batch != "keep" else None


def _normalises(model: nn.Module) -> bool:
    return any(isinstance(each, nn.modules.batchnorm._NormBase) for each in model.modules())


def _check_lone(
    scenario: Scenario, data: FederatedData, task: Task, model: nn.Module,
    procedure: ClientProcedure,
) -> None:  # fmt: skip
    """Refuse a batch of one sample where the model cannot train on it."""
    work = procedure.work
    layer = _why_not_one(data, task, model)
    if layer is None:
        return  # whatever clients hold: of a million nobody is counted
    sizes = _trained_on(data, procedure)
    short = np.flatnonzero(ends_with_one(sizes, work)).tolist()
    if not short:
        return
    if work.batch_size == 1:
        raise ScenarioError(f"[client] batch_size = 1: {layer} cannot train on one sample")
    has_key = "last_batch" in scenario.choices["client"].keys
    remedy = "last_batch = 'drop' or 'merge', or " if has_key else ""
    raise ScenarioError(
        f"[client] batch_size = {work.batch_size}: {names_of(short, data.num_clients)} would end "
        f"an epoch with a batch of one sample, which {layer} cannot train on: [client] {remedy}"
        "another batch_size"
    )


def _check_sizes(
    data: FederatedData, task: Task, model: nn.Module, procedure: ClientProcedure
) -> None:
    """Refuse batches that are not full where the model cannot train on them.

    Raises:
        ScenarioError: Naming clients, layer and remedy.
    """
    work, held = procedure.work, _trained_on(data, procedure)
    odd = odd_sizes(held, work)
    full = work.batch_size
    if not odd.any() or held.max() < full:
        return
    tried = np.unique(odd[odd > 0])[:_SIZES].tolist()
    features, targets = _samples(data, task, int(held.argmax()), max(full, *tried))
    found = first_trouble(
        tried, model, features[:full], lambda o: task.sample_losses(o, targets[: len(o)])
    )
    if found is not None:
        size, layer = found
        who = names_of(np.flatnonzero(odd == size).tolist(), data.num_clients)
        raise ScenarioError(
            f"[client] batch_size = {full}: {who} would train on a batch of {size}, which {layer} "
            f"cannot, though it can on {full}: let the model take batches of any size, or choose a "
            "batch_size or a last_batch by which there is none"
        )


def _samples(data: FederatedData, task: Task, client: int, count: int) -> tuple[Tensor, Tensor]:
    """So many samples of a client, again and again where it has fewer."""
    drawn = data.clients([client])
    rows = np.resize(np.asarray(drawn.rows[0]), count)
    features = torch.from_numpy(np.asarray(drawn.features[rows]))
    features = features.to(task.dtype) if features.is_floating_point() else features
    return features, torch.from_numpy(np.asarray(drawn.targets[rows]))


def _trained_on(data: FederatedData, procedure: ClientProcedure) -> np.ndarray:
    """How many samples each client trains on, int64 `[N]`."""
    sizes = data.sizes(range(data.num_clients))
    if not procedure.holds_out:
        return sizes
    return np.array([n - num_held_out(n, procedure.holds_out) for n in sizes.tolist()])


def _left_out(data: FederatedData, procedure: ClientProcedure) -> str | None:
    """Say who does not train for having one sample, whatever the model, or None."""
    work, sizes = procedure.work, _trained_on(data, procedure)
    alone = np.flatnonzero(sizes == 1).tolist() if work.batch_size > 1 else []
    names = names_of(alone, data.num_clients)
    return (
        f"{names}: one sample, no training: [client] last_batch = '{work.last_batch}'"
        if alone
        else None
    )


def _why_not_one(data: FederatedData, task: Task, model: nn.Module) -> str | None:
    """Say which layer cannot train on one sample, tried on one of the first clients', or None."""
    looked_at = list(range(min(data.num_clients, _LOOKED_AT)))
    holding = np.flatnonzero(np.asarray(data.sizes(looked_at)))[:1].tolist()
    if not holding:
        return None
    features, targets = _samples(data, task, holding[0], 2)
    found = first_trouble([1], model, features, lambda o: task.sample_losses(o, targets[: len(o)]))
    return None if found is None else found[1]
