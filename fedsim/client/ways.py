"""The ways to train a chunk: one client after another, under vmap, or as a chain of layers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from fedsim.client.batching.batches import Batches
from fedsim.client.chains.stepping import Stepping
from fedsim.client.chains.training import ChainTraining, owned
from fedsim.client.gradients import Gradients
from fedsim.client.inputs import Inputs, select
from fedsim.client.job import ChunkJob, ChunkResult
from fedsim.client.overriding import descent_of
from fedsim.client.part import sent_as
from fedsim.client.procedure import (
    GUIDANCE,
    Batch,
    Carry,
    ClientProcedure,
    Descent,
    Gradient,
    Named,
)
from fedsim.messages.layout import Rows

LARGE = 100_000  # parameters from which steps cost more to take than to start


def waits(procedure: ClientProcedure, dim: int, training: ChainTraining) -> bool:
    """Whether the clients of a chunk that trains as a chain wait for the longest of them."""
    stepped = dim < LARGE and descent_of(procedure, 1) is None
    return stepped and not training.chain.convolves


def train_together(
    inputs: Inputs, job: ChunkJob, out: Rows | None, training: ChainTraining
) -> ChunkResult:
    """Train a dense chain: clients in descending order of their steps, one product for all."""
    procedure = inputs.procedure
    members = list(range(len(job.client_ids)))
    doubled = job.members_in_slots
    descent = _descent(inputs, job)
    slots, batches = inputs.batches(job, doubled, longest_first=True, reuse=descent is not None)
    places = np.argsort(slots, kind="stable")[: len(members)]  # of each member
    picks = slice(0, len(members)) if slots == doubled else places
    with torch.no_grad():
        params, buffers, sent = inputs.received(job, slots, reuse=descent is not None)
        sent |= batches.known
        if descent is not None:
            own_state = inputs.state(job, slots, params) if _remembers(descent) else {}
            carry: Carry = {}
            if _looks(descent):
                received = inputs.received(job, slots, views=True)[0]
                carry = over_clients(procedure.begin, received, {}, sent, own_state)
            push = over_clients(procedure.push, carry) if descent.pushes else {}
            # moments go on in place, and what a client remembers may be the job's own
            kept = owned({n: own_state[n] for n in params}) if descent.keeps_moments else {}
            stepping = _stepping(descent, params, sent, kept, push)
            losses = training.descend_together(params, batches, stepping)
            if descent.companion is not None:
                carry = _accompanied(descent.companion, procedure, carry, training, batches)
            extra: Named = {}
            state = {**own_state, **stepping.moments} if descent.keeps_moments else {}
            if descent.looks_back:
                steps = torch.from_numpy(batches.schedule.steps)
                carry = _ended(descent, carry, params, stepping.moments, steps)
                extra, state = over_clients(procedure.finish, carry, own_state)
        else:
            own_state = inputs.state(job, slots, params)
            carry = vmap(procedure.begin)(params, buffers, sent, own_state)
            carry = pytree.tree_map(Tensor.contiguous, carry)
            carry, losses = training.step_together(carry, batches, job.server_round)
            extra, state = vmap(procedure.finish)(carry, own_state)
            # a client without steps hands back exactly what it received
            idle = torch.from_numpy(batches.schedule.steps == 0)
            params = select(idle, params, carry["params"])
        flat = inputs.laid(params, out, places.tolist())
        _, extra, state = inputs.parted(buffers, params, buffers, extra, state)
        extra, state = ({n: t[picks] for n, t in part.items()} for part in (extra, state))
    every = slice(0, len(members))
    schedule = batches.schedule
    return ChunkResult(
        params=flat,
        buffers=rows_of(inputs.received_buffers(job, members), every),
        extra=rows_of(extra, every),
        state=rows_of(state, every),
        num_examples=schedule.num_examples[places],
        metrics={"loss": _mean(torch.from_numpy(losses), schedule.seen)[places]},
        samples=int(schedule.seen[places].sum()),
        computed=schedule.computed(leaving=descent is not None),
    )


def trains_alone(inputs: Inputs, job: ChunkJob, training: ChainTraining | None) -> bool:
    """Whether a dense chain trains one client after another.

    So it does where it is large and `step` must be called: its tensors stay in a cache then,
    and no client waits for a longer one. A descent has neither trouble.
    """
    dense = training is not None
    return dense and inputs.whole.dim >= LARGE and _descent(inputs, job) is None


def _descent(inputs: Inputs, job: ChunkJob) -> Descent | None:
    """The descent that the executor may take itself, in place of the procedure's steps; or None."""
    descent = descent_of(inputs.procedure, job.server_round)
    if descent is None:
        return None
    for name in (*job.shared.extra, *job.personal.extra):
        if name.partition(".")[0] not in descent.takes:
            return None
    if descent.largest > torch.finfo(inputs.whole.dtype).max:
        # too large for the dtype: a product with it raises here, while `step` gives infinity, and
        # the client is then refused by name
        return None
    return descent


def train_vmap(
    inputs: Inputs, gradients: Gradients, job: ChunkJob, out: Rows | None
) -> ChunkResult:
    """Train every step of the whole chunk as one call under `torch.func.vmap`."""
    procedure = inputs.procedure
    members = list(range(len(job.client_ids)))
    slots = job.members_in_slots
    _, batches = inputs.batches(job, slots)
    plan = batches.schedule
    params, received, extra = inputs.received(job, slots)
    extra |= batches.known
    state = inputs.state(job, slots, params)
    buffers = inputs.own_statistics(job, slots, received)
    carry = vmap(procedure.begin)(params, buffers, extra, state)
    losses = torch.zeros(len(slots), dtype=torch.float64, device=inputs.device)

    gradient = gradients.together

    def one_step(carry: Carry, batch: Batch) -> tuple[Carry, Tensor]:
        return procedure.step(carry, batch, gradient, server_round=job.server_round)

    for step in range(plan.num_steps):
        moved, loss = vmap(one_step)(carry, batches.together(step))
        counts = plan.samples(step)
        active = counts > 0
        carry = moved if plan.all_active(step) else select(active, moved, carry)
        losses += torch.where(active, loss.double() * counts, 0.0)
    reply_extra, new_state = vmap(procedure.finish)(carry, state)
    # a client without steps hands back exactly what it received, whatever `begin` made of it
    params, buffers = carry["params"], {**buffers, **carry["buffers"]}
    keep = slice(0, len(members))
    buffers, reply_extra, new_state = inputs.parted(
        received, params, buffers, reply_extra, new_state
    )
    return ChunkResult(
        params=inputs.laid({n: p[keep] for n, p in params.items()}, out),
        buffers=rows_of(buffers, keep),
        extra=rows_of(reply_extra, keep),
        state=rows_of(new_state, keep),
        num_examples=plan.num_examples[keep],
        metrics={"loss": _mean(losses.cpu(), plan.seen)[keep]},
        samples=int(plan.seen[keep].sum()),
        computed=plan.computed(),
    )


def train_one_by_one(
    inputs: Inputs,
    gradients: Gradients,
    job: ChunkJob,
    out: Rows | None,
    training: ChainTraining | None,
) -> ChunkResult:
    """Train one client after another, with batches of their true sizes."""
    procedure = inputs.procedure
    members = list(range(len(job.client_ids)))
    descent = None if training is None else _descent(inputs, job)
    gradient: Gradient = gradients.alone if training is None else training.gradient
    _, batches = inputs.batches(job, members, reuse=descent is not None)
    plan = batches.schedule
    params, received, extra = inputs.received(job, members)
    extra |= batches.known
    state = inputs.state(job, members, params)
    buffers = inputs.own_statistics(job, members, received)
    losses = torch.zeros(len(members), dtype=torch.float64)
    results: list[tuple[Named, Named, Named, Named]] = []
    for slot in members:
        own_state = row_of(state, slot)
        mine = {n: b.clone() for n, b in row_of(buffers, slot).items()}
        if training is not None and descent is not None:
            with torch.no_grad():
                losses[slot], *found = _descended(
                    training, descent, procedure, batches, slot,
                    (row_of(params, slot), row_of(extra, slot), own_state),
                )  # fmt: skip
            results.append((found[0], mine, found[1], found[2]))
            continue
        inputs.surroundings.begin(job.round_of(slot), job.client_ids[slot])
        carry = procedure.begin(row_of(params, slot), mine, row_of(extra, slot), own_state)
        for step in range(int(plan.steps[slot])):
            carry, loss = procedure.step(
                carry, batches.single(slot, step), gradient, server_round=job.server_round
            )
            losses[slot] += float(loss) * int(plan.counts[slot, step])
        reply_extra, own_state = procedure.finish(carry, own_state)
        results.append((carry["params"], {**mine, **carry["buffers"]}, reply_extra, own_state))
    stacked: list[Named] = [
        {n: torch.stack([r[part][n] for r in results]) for n in results[0][part]}
        for part in range(4)
    ]
    every = slice(0, len(members))
    buffers, reply_extra, new_state = inputs.parted(received, *stacked)
    return ChunkResult(
        params=inputs.laid(stacked[0], out),
        buffers=rows_of(buffers, every),
        extra=rows_of(reply_extra, every),
        state=rows_of(new_state, every),
        num_examples=plan.num_examples,
        metrics={"loss": _mean(losses, plan.seen)},
        samples=int(plan.seen.sum()),
        computed=int(plan.seen.sum()),
    )


def over_clients(function: Callable[..., Any], *trees: Any) -> Any:
    """Call a function of one client for several; what is the same for all is computed once.

    Args:
        function: Of trees of one client's tensors.
        *trees: Trees of tensors with a row per client. A tensor that is one row, laid out for all
            by `expand`, counts as the same for all.

    Returns:
        What it returns, with a row per client.
    """
    leaves, form = pytree.tree_flatten(trees)
    if not leaves:
        return function(*trees)
    dims = [None if len(leaf) > 1 and leaf.stride(0) == 0 else 0 for leaf in leaves]
    rows = [leaf[0] if dim is None else leaf for leaf, dim in zip(leaves, dims, strict=True)]

    def of_one(*found: Tensor) -> Any:
        return function(*pytree.tree_unflatten(list(found), form))

    if all(dim is None for dim in dims):
        lead = len(leaves[0])
        return pytree.tree_map(lambda t: t.expand(lead, *t.shape), of_one(*rows))
    return vmap(of_one, in_dims=tuple(dims))(*rows)


def _descended(
    training: ChainTraining,
    descent: Descent,
    procedure: ClientProcedure,
    batches: Batches,
    slot: int,
    given: tuple[Named, Named, Named],
) -> tuple[float, Named, Named, Named]:
    """Train one client by descent: (sum of losses, parameters, what else it returns, its state).

    Args:
        training: Trains the chain.
        descent: What a step does.
        procedure: What else happens in a round.
        batches: The chunk's batches.
        slot: The client.
        given: The parameters received, what else was sent, the client's state.
    """
    received, sent, state = given
    carry = procedure.begin(received, {}, sent, state) if _looks(descent) else {}
    push = owned(procedure.push(carry)) if descent.pushes else {}
    trained, kept = owned(received), owned(state) if descent.keeps_moments else {}
    stepping = _stepping(descent, trained, sent, kept, push)
    loss = training.descend_alone(trained, batches, slot, stepping)
    if descent.companion is not None:
        start, added = procedure.companion(carry)
        mine, beside = owned(start), Stepping(descent.companion, {}, {}, owned(added))
        batches.schedule.rewind()
        training.descend_alone(mine, batches, slot, beside)
        carry = procedure.accompanied(carry, mine)
    if not descent.looks_back:
        return loss, trained, {}, {**state, **stepping.moments} if kept else state
    first = next(iter(received.values()))
    steps = torch.tensor(float(batches.schedule.steps[slot]), dtype=first.dtype)
    carry = _ended(descent, carry, trained, stepping.moments, steps)
    return loss, trained, *procedure.finish(carry, state)


def _accompanied(
    descent: Descent,
    procedure: ClientProcedure,
    carry: Carry,
    training: ChainTraining,
    batches: Batches,
) -> Carry:
    """What a procedure carries after the clients' own models were trained by descent too."""
    start, push = over_clients(procedure.companion, carry)
    mine = {n: t.clone(memory_format=torch.contiguous_format) for n, t in start.items()}
    batches.schedule.rewind()
    training.descend_together(mine, batches, Stepping(descent, {}, {}, push))
    after: Carry = over_clients(procedure.accompanied, carry, mine)
    return after


def _looks(descent: Descent) -> bool:
    """Whether `begin` must be called for a descent."""
    return descent.pushes or descent.looks_back


def _remembers(descent: Descent) -> bool:
    """Whether a descent needs what clients keep."""
    return descent.keeps_moments or _looks(descent)


def _ended(descent: Descent, carry: Carry, params: Named, moments: Named, steps: Tensor) -> Carry:
    """What a procedure finishes from after a descent."""
    first = next(iter(params.values()))
    steps = steps.to(first.dtype)
    ended = {**carry, "params": params, "steps": steps, "path": descent.path(steps)}
    return {**ended, "moments": moments} if descent.keeps_moments else ended


def _stepping(descent: Descent, params: Named, sent: Named, kept: Named, push: Named) -> Stepping:
    """Steps of these clients; moments that are kept go on in place."""
    if not descent.momentum:
        moments: Named = {}
    elif descent.keeps_moments:
        moments = {name: kept[name] for name in params}
    else:
        moments = {n: torch.zeros_like(p) for n, p in params.items()}
    guidance = sent_as(GUIDANCE, sent)
    return Stepping(descent, moments, guidance, push)


def row_of(named: Mapping[str, Tensor], slot: int) -> Named:
    """Return one slot's tensors."""
    return {name: tensor[slot] for name, tensor in named.items()}


def rows_of(named: Mapping[str, Tensor], index: slice) -> dict[str, Tensor]:
    """Return some slots' tensors on the CPU."""
    return {name: tensor[index].cpu() for name, tensor in named.items()}


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.clamp(min=1)
