"""A cohort in chunks: dealt, cut into works, stacked again, client states kept.

Which clients share a chunk is a function of the cohort and of the plan alone.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.client.clipping import bound_of
from fedsim.client.job import ChunkJob, ChunkResult
from fedsim.engine.client_app import CohortApp
from fedsim.engine.client_states import ClientStore
from fedsim.engine.work import ChunkWork
from fedsim.messages.cohort import Cohort
from fedsim.messages.failures import Failure
from fedsim.messages.layout import Payload, rows_at
from fedsim.messages.replies import Replies

Way = Literal["even", "alike"]
Done = Mapping[tuple[int, ...], ChunkResult]  # by the places of a chunk's members


def deal(
    samples: Sequence[int] | npt.NDArray[np.int64], size: int, way: Way
) -> list[tuple[int, ...]]:
    """Divide a cohort into chunks of `size` clients, the last one of those that are left.

    The chunks depend on the cohort alone, not on who drops out or fails, and their lengths do not
    depend on the samples. Clients that all hold as many are divided in their order.

    Args:
        samples: How many each client holds, in client order.
        size: Clients per chunk, at least 1.
        way: "even" gives every chunk about as many samples, for clients that wait for nobody in
            their chunk: two by two, for a step of one costs nearly that of two, those that hold
            most go where least has been dealt. "alike" puts clients beside others of their size,
            for those that are padded to the longest.

    Returns:
        For each chunk its clients' places in the cohort, ascending.

    Example:
        >>> deal([9, 2, 2, 8, 2, 2], 3, "even"), deal([9, 1, 8, 2], 2, "alike")
        ([(0, 3, 5), (1, 2, 4)], [(0, 2), (1, 3)])
    """
    held = np.asarray(samples, dtype=np.int64)
    firsts = range(0, len(held), size)
    if not len(held) or (held == held[0]).all():
        return [tuple(range(first, min(first + size, len(held)))) for first in firsts]
    order = np.argsort(-held, kind="stable").tolist()
    if way == "alike":
        return [tuple(sorted(order[first : first + size])) for first in firsts]
    room = [min(size, len(held) - first) for first in firsts]
    chunks: list[list[int]] = [[] for _ in room]
    loads = [(0, chunk) for chunk in range(len(room))]  # a heap of those that have room
    dealt = 0
    while dealt < len(order):
        load, chosen = heapq.heappop(loads)
        pair = order[dealt : dealt + min(2, room[chosen] - len(chunks[chosen]))]
        dealt += len(pair)
        chunks[chosen] += pair
        if len(chunks[chosen]) < room[chosen]:
            heapq.heappush(loads, (load + int(held[pair].sum()), chosen))
    return [tuple(sorted(chunk)) for chunk in chunks]


class _Dealt(NamedTuple):
    """A chunk of clients that are asked alike: their places, bound and own keys of `[client]`."""

    places: tuple[int, ...]
    bound: float | None
    settings: dict[str, Any]


def cut(
    cohort: Cohort,
    app: CohortApp,
    store: ClientStore,
    *,
    trains: bool,
    client_timeout_s: float | None,
) -> list[ChunkWork]:
    """Cut a cohort into chunks by the plan; a chunk of absent clients only needs no work.

    Args:
        cohort: The clients, and what they receive.
        app: Whose plan and executor do it.
        store: The clients' states.
        trains: Whether they train; else they evaluate.
        client_timeout_s: Seconds one client may take; None waits for ever.

    Raises:
        ScenarioError: If a client's own keys of `[client]` cannot be, before anybody trains.
    """
    works: list[ChunkWork] = []
    for places, bound, settings in _dealt(cohort, app, trains):
        chosen = list(places)
        ids = tuple(cohort.client_ids[chosen].tolist())
        absent = tuple(cohort.is_absent[chosen].tolist())
        if all(absent):
            continue
        remembers = trains or app.executor.evaluates_with_memory
        state, has_state = store.rows(ids) if remembers else ({}, ())
        job = ChunkJob(
            action="train" if trains else "evaluate",
            server_round=cohort.round_of(chosen[0]),
            client_ids=ids,
            absent=absent,
            layout=cohort.layout.fingerprint,
            shared=Payload(),
            personal=cohort.personal.rows(chosen),
            state=state,
            has_state=has_state,
            work=() if cohort.work is None else tuple(cohort.work[chosen].tolist()),
            clipping_norm=bound,
            settings=settings,
            rounds=() if cohort.rounds is None else tuple(cohort.rounds[chosen].tolist()),
            slots=app.plan.chunk_size if cohort.is_ahead else 0,
        )
        limit = None if client_timeout_s is None else client_timeout_s * len(ids)
        works.append(ChunkWork(len(works), job, places, False, limit))
    return works


def _dealt(cohort: Cohort, app: CohortApp, trains: bool) -> Iterator[_Dealt]:
    executor, size = app.executor, app.plan.chunk_size
    apart = executor.procedure.follows_rounds
    for places, config in cohort.alike(by_round=apart):
        bound = bound_of(config) if trains else None
        settings = executor.settings_of(config) if trains else {}
        if settings:
            executor.under(settings)  # or refused here, before anybody trains
        samples: Sequence[int] | np.ndarray = [0] * len(places)
        if trains and len(places) > size:
            whole = len(places) == len(cohort)
            ids = cohort.client_ids if whole else cohort.client_ids[list(places)]
            samples = executor.data.sizes(ids.tolist())
        for dealt in deal(samples, size, "alike" if executor.pads else "even"):
            mine = tuple(places[place] for place in dealt)
            yield _Dealt(mine, bound, settings)


def absences(cohort: Cohort) -> dict[int, Failure]:
    """Return, by client, who was selected and dropped out."""
    gone = cohort.client_ids[np.flatnonzero(cohort.is_absent)].tolist()
    why = "was selected and dropped out"
    return {client: Failure(client, cohort.server_round, "absent", why) for client in gone}


def stacked(
    cohort: Cohort, done: Done, rows: Tensor | None, failures: Mapping[int, Failure]
) -> Replies:
    """Put the results of chunks together again, in client order.

    Args:
        cohort: Who was asked.
        done: What came of the chunks.
        rows: Where they wrote their parameters, `[K, dim]`; None if they evaluated.
        failures: Who failed, by client: nothing of theirs is among the replies.
    """
    ids = cohort.client_ids
    keep = np.array([client not in failures for client in ids.tolist()], dtype=bool)
    results = [done[places] for places in sorted(done)]
    if not results or not keep.any():
        return Replies.empty(cohort, [failures[c] for c in sorted(failures)])
    members = [place for places in sorted(done) for place in places]
    in_order = members == list(range(len(ids)))

    def join(parts: list[Tensor]) -> Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if in_order:
            return whole
        full = whole.new_zeros((len(ids), *whole.shape[1:]))
        full[members] = whole
        return full

    personal, shared = cohort.personal.params, cohort.shared.params
    trained = rows is not None
    replies = Replies(
        server_round=cohort.server_round,
        layout=cohort.layout,
        client_ids=ids,
        params=rows,
        reference=(personal if personal is not None else shared) if trained else None,
        buffers={n: join([r.buffers[n] for r in results]) for n in results[0].buffers},
        extra=extra_of(cohort, {places: done[places].extra for places in sorted(done)}),
        encoded={n: join([r.encoded[n] for r in results]) for n in results[0].encoded},
        num_examples=join([r.num_examples for r in results]),
        metrics={n: join([r.metrics[n] for r in results]) for n in results[0].metrics},
        staleness=torch.zeros(len(ids), dtype=torch.int64),
        message_type=cohort.message_type,
        ttl=cohort.ttl,
        group=cohort.group,
    )
    return replies.select(keep, [failures[c] for c in sorted(failures)])


def extra_of(
    cohort: Cohort, parts: Mapping[tuple[int, ...], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Put what clients returned besides together, `[K, ...]` by name in client order.

    Tensors like the model's ("control.NAME") become views of one flat `[K, dim]`, as strategies
    take them, so that nothing is copied a second time.

    Args:
        cohort: Who was asked.
        parts: What the members of chunks returned, by their places.
    """
    layout, count = cohort.layout, len(cohort.client_ids)
    make = torch.empty if sum(map(len, parts)) == count else torch.zeros
    first = next(iter(parts.values()))
    whole: dict[str, Tensor] = {}
    for kind in dict.fromkeys(name.partition(".")[0] for name in first):
        names = {spec.name: f"{kind}.{spec.name}" for spec in layout.trainable}
        if names and all(
            (mine := first.get(names[spec.name])) is not None
            and (tuple(mine.shape[1:]), mine.dtype) == (spec.shape, layout.dtype)
            for spec in layout.trainable
        ):
            flat = make((count, layout.dim), dtype=layout.dtype)
            whole |= {names[name]: view for name, view in layout.unflatten(flat).items()}
    for name, tensor in first.items():
        if name not in whole:
            whole[name] = make((count, *tensor.shape[1:]), dtype=tensor.dtype)
        for places, part in parts.items():
            rows = rows_at(whole[name], places)
            if isinstance(rows, Tensor):
                rows.copy_(part[name])
            else:
                whole[name][list(places)] = part[name]
    return {name: whole[name] for name in first}


def keep_memories(store: ClientStore, cohort: Cohort, done: Done, replies: Replies) -> None:
    """Keep the states of the clients whose replies are admitted, and of nobody else."""
    admitted = set(replies.admit().client_ids.tolist())
    for places, result in done.items():
        members = cohort.client_ids[list(places)].tolist()
        rows = [row for row, client in enumerate(members) if client in admitted]
        state = dict(result.state)
        if len(rows) < len(members):
            state = {name: stack[rows] for name, stack in state.items()}
        store.commit([members[row] for row in rows], state)
