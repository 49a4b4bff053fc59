"""Bytes of cohorts and replies on the wire, counted without building a message."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord
from torch import Tensor

from fedsim.messages import flower_internals as internals
from fedsim.messages.adapting import present_in
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Layout
from fedsim.messages.records import (
    ARRAYS,
    CONFIG,
    EXTRA,
    METRICS,
    NUM_EXAMPLES,
    SERVER_ROUND,
    array_record,
)
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
    partial = cohort.is_partial
    for places, _ in cohort.alike():
        mine = sent
        if len(places) < len(cohort):
            mine = np.zeros(len(cohort), dtype=bool)
            mine[list(places)] = True
            mine &= sent
        asked_alike += [mine & ~partial, *([mine & partial] if cohort.work is not None else [])]
    for asked in asked_alike:
        if not asked.any():
            continue
        records[CONFIG] = _config_bytes(cohort.settings_of(int(np.flatnonzero(asked)[0])))
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
    for kind, count in _counted(16 * nodes + digits):
        records[METRICS] = _metrics_bytes(tuple(replies.metrics), kind % 16)
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
    return dict(_counted(lengths))


def _counted(kinds: np.ndarray) -> list[tuple[int, int]]:
    """The different numbers, ascending, and how often each is there."""
    if len(kinds) == 1:  # a reply at a time, as asynchronous servers take them
        return [(int(kinds[0]), 1)]
    found, many = np.unique(kinds, return_counts=True)
    return list(zip(found.tolist(), many.tolist(), strict=True))


def _config_bytes(settings: Mapping[str, Any]) -> int:
    """Bytes of a client's settings; rounds whose numbers are as long count as one."""
    alike = {**settings}
    if isinstance(server_round := alike.get(SERVER_ROUND), int) and server_round >= 0:
        digits = int(_lengths_of(np.array([server_round]), _ZIGZAG_LIMITS)[0])
        alike[SERVER_ROUND] = 0 if digits == 1 else int(_ZIGZAG_LIMITS[digits - 2])
    kind = tuple((name, type(value), value) for name, value in alike.items())
    try:
        return _known_config_bytes(kind)
    except TypeError:  # lists, which no dictionary takes for a key
        return internals.record_bytes(ConfigRecord(alike))


@lru_cache(maxsize=256)
def _known_config_bytes(kind: tuple[tuple[str, type, Any], ...]) -> int:
    return internals.record_bytes(ConfigRecord({name: value for name, _, value in kind}))


@lru_cache(maxsize=256)
def _metrics_bytes(names: tuple[str, ...], digits: int) -> int:
    """Bytes of a reply's metrics, whose floats all take as many, with a count of so many bytes."""
    count = 0 if digits == 1 else int(_ZIGZAG_LIMITS[digits - 2])
    return internals.record_bytes(MetricRecord({NUM_EXAMPLES: count, **dict.fromkeys(names, 1.0)}))


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
