"""Failures that are certain before round 1, said there."""

import numpy as np
import torch
from torch import nn

from fedsim.basics.errors import ScenarioError
from fedsim.basics.text import names_of
from fedsim.client.batching.schedule import num_held_out
from fedsim.client.procedure import ClientProcedure
from fedsim.client.short_batches import ends_with_one, why_not_one
from fedsim.data.federated import FederatedData
from fedsim.scenario.scenario import Scenario
from fedsim.tasks.task import Task

_LOOKED_AT = 256  # clients among which one that holds samples is looked for


def check_last_batches(
    scenario: Scenario,
    data: FederatedData,
    task: Task,
    model: nn.Module,
    procedure: ClientProcedure,
) -> str | None:
    """Refuse epochs that end with a batch of one sample where the model cannot train on it.

    Args:
        scenario: The scenario.
        data: The clients' data.
        task: Its task.
        model: The task's model; it is left as it is.
        procedure: The client procedure.

    Returns:
        Who does not train for having one sample, in a line, or None.

    Raises:
        ScenarioError: Naming clients, layer and remedy.
    """
    work = procedure.work
    if work.last_batch != "keep":
        return _left_out(data, procedure)
    own = any(each.startswith("[task]") for each in scenario.own_code)
    if not own and not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules()):
        return None
    layer = _why_not_one(data, task, model)
    if layer is None:
        return None  # whatever clients hold: of a million nobody is counted
    sizes = _trained_on(data, procedure)
    short = np.flatnonzero(ends_with_one(sizes, work)).tolist()
    if not short:
        return None
    if work.batch_size == 1:
        raise ScenarioError(f"[client] batch_size = 1: {layer} cannot train on one sample")
    has_key = "last_batch" in scenario.choices["client"].keys
    remedy = "last_batch = 'drop' or 'merge', or " if has_key else ""
    raise ScenarioError(
        f"[client] batch_size = {work.batch_size}: {names_of(short, data.num_clients)} would end "
        f"an epoch with a batch of one sample, which {layer} cannot train on: [client] {remedy}"
        "another batch_size"
    )


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
    drawn = data.clients(holding)
    pair = np.asarray(drawn.rows[0])[:2]
    pair = pair if len(pair) == 2 else pair.repeat(2)
    features = torch.from_numpy(np.asarray(drawn.features[pair]))
    features = features.to(task.dtype) if features.is_floating_point() else features
    targets = torch.from_numpy(np.asarray(drawn.targets[pair]))
    return why_not_one(model, features, lambda o: task.sample_losses(o, targets[: len(o)]))
