"""Bytes of cohorts and replies on the wire, counted without building a message."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Message
from torch import Tensor

from fedsim.messages import flower_internals as internals
from fedsim.messages.adapting import present_in
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout
from fedsim.messages.records import ARRAYS, CONFIG, EXTRA, METRICS, array_record
from fedsim.messages.replies import Replies


def cohort_bytes(cohort: Cohort) -> int:
    """Return the bytes of a cohort's instructions as Flower messages; the absent get none."""
    if not len(cohort):
        return 0
    if cohort.is_built:  # a foreign strategy may call its records otherwise
        return sum_of_bytes(present_in(cohort))
    extra = dict(cohort.shared.extra)
    extra.update({name: stack[0] for name, stack in cohort.personal.extra.items()})
    records = {ARRAYS: _model_bytes(cohort.layout)}
    if extra:
        records[EXTRA] = _arrays_bytes(
            tuple((n, tuple(t.shape), t.dtype) for n, t in extra.items())
        )
    total, sent = 0, ~cohort.is_absent
    asked_alike = []
    for places, _ in cohort.alike():
        mine = np.zeros(len(cohort), dtype=bool)
        mine[list(places)] = True
        asked_alike += [sent & mine & ~cohort.is_partial, sent & mine & cohort.is_partial]
    for asked in asked_alike:
        if not asked.any():
            continue
        settings = cohort.config_record_of(int(np.flatnonzero(asked)[0]))
        records[CONFIG] = internals.record_bytes(settings)
        for length, count in _lengths(cohort.nodes[asked]).items():
            metadata = internals.instruction_metadata_bytes(
                length, cohort.message_type, cohort.group_id, cohort.ttl
            )
            total += count * internals.message_bytes(metadata, records)
    return total


def replies_bytes(replies: Replies) -> int:
    """Return the bytes of stacked replies as Flower messages (errors are built and measured)."""
    records: dict[str, int] = {}
    if replies.encoded:
        records[ARRAYS] = _rows_bytes({**replies.encoded, **replies.buffers})
    elif replies.params is not None:
        records[ARRAYS] = _model_bytes(replies.layout)
    if replies.extra:
        records[EXTRA] = _rows_bytes(replies.extra)
    total = sum_of_bytes(replies[len(replies.client_ids) :]) if replies.failures else 0
    if not len(replies.client_ids):
        return total
    counts = replies.num_examples.numpy()
    # zigzag doubles them, so that a byte holds half as much
    digits = _lengths_of(np.where(counts >= 0, counts, ~counts), _ZIGZAG_LIMITS)
    nodes = _lengths_of(replies.client_ids + internals.FIRST_NODE_ID)
    # replies differ in length by these two numbers alone
    kinds, first, many = np.unique(16 * nodes + digits, return_index=True, return_counts=True)
    for kind, place, count in zip(kinds.tolist(), first.tolist(), many.tolist(), strict=True):
        records[METRICS] = internals.record_bytes(replies.metric_record(place))
        metadata = internals.reply_metadata_bytes(
            kind // 16, replies.message_type, replies.group_id, replies.ttl
        )
        total += count * internals.message_bytes(metadata, records)
    return total


_VARINT_LIMITS = np.array([1 << 7 * length for length in range(1, 9)], dtype=np.int64)
_ZIGZAG_LIMITS = np.array([1 << 7 * length - 1 for length in range(1, 10)], dtype=np.int64)


def _lengths_of(values: np.ndarray, limits: np.ndarray = _VARINT_LIMITS) -> np.ndarray:
    """Return how many bytes protobuf takes for each number from 0 to 2^63 - 1."""
    return np.searchsorted(limits, values, side="right") + 1


def _lengths(nodes: np.ndarray) -> dict[int, int]:
    """How many nodes have ids of each protobuf length."""
    if nodes.dtype != np.int64:  # Flower's own, up to 2^64 - 1
        lengths = np.array([internals.varint_length(node) for node in nodes.tolist()])
    else:
        lengths = _lengths_of(nodes)
    found, many = np.unique(lengths, return_counts=True)
    return dict(zip(found.tolist(), many.tolist(), strict=True))


@lru_cache(maxsize=64)
def _arrays_bytes(specs: tuple[tuple[str, tuple[int, ...], Any], ...]) -> int:
    import torch

    named = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in specs}
    return internals.record_bytes(array_record(named))


def _rows_bytes(stacks: Mapping[str, Tensor]) -> int:
    """Bytes of one row of each of these stacks."""
    return _arrays_bytes(tuple((n, tuple(t.shape[1:]), t.dtype) for n, t in stacks.items()))


def _model_bytes(layout: Layout) -> int:
    specs = {spec.name: tuple(spec) for spec in (*layout.trainable, *layout.buffers)}
    return _arrays_bytes(tuple(specs[name] for name in layout.names))


def sum_of_bytes(messages: Iterable[Message]) -> int:
    """Return how many bytes ordinary messages take."""
    return sum(internals.wire_bytes(message) for message in messages)
