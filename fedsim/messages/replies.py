"""What the clients of a round returned, stacked; a lazy sequence of ordinary Flower messages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Error,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from fedsim.messages import flower_internals as internals
from fedsim.messages.admission import refusals
from fedsim.messages.cohort import DEFAULT_TTL, Cohort
from fedsim.messages.failures import ERROR_CODES, Failure
from fedsim.messages.layout import Layout
from fedsim.messages.lazy import LazyMessages, next_message_id
from fedsim.messages.parsing import Parsed, Refused, ReplyForm, expected, parse
from fedsim.messages.records import ARRAYS, EXTRA, METRICS, NUM_EXAMPLES, array_record, model_record


@dataclass(frozen=True, eq=False)
class Replies(LazyMessages):
    """What the clients of one round returned, stacked in client order.

    Attributes:
        server_round: The round.
        layout: How the model's tensors lie in `params`.
        client_ids: int64 `[K]`, ascending: who answered.
        params: `[K, dim]` trained tensors; None after evaluation.
        reference: `[dim]` or `[K, dim]`, what each client started from; None after evaluation.
        buffers: By name `[K, ...]`, each in its own dtype.
        extra: What the procedure returns besides, by name `[K, ...]`.
        num_examples: int64 `[K]`.
        metrics: float64 `[K]` by name.
        staleness: int64 `[K]`, rounds between broadcast and aggregation.
        failures: Who of the cohort gave no admissible reply, and why.
        message_type: Of the instructions.
        ttl: Of the instructions.
        group: Flower's group id of the instructions; None takes the round.
        encoded: What was sent in place of `params` where replies are compressed, by base, codec and
            name ("model.sparse.values"), `[K, ...]`.
        admitted: Whether `admit` has been through.
    """

    server_round: int
    layout: Layout
    client_ids: np.ndarray
    params: Tensor | None
    reference: Tensor | None
    buffers: Mapping[str, Tensor]
    extra: Mapping[str, Tensor]
    num_examples: Tensor
    metrics: Mapping[str, Tensor]
    staleness: Tensor
    failures: tuple[Failure, ...] = ()
    message_type: str = MessageType.TRAIN
    ttl: float = DEFAULT_TTL
    group: str | None = None
    encoded: Mapping[str, Tensor] = field(default_factory=dict)
    admitted: bool = False
    _built: dict[int, Message] = field(default_factory=dict, repr=False)
    _instructions: Mapping[int, Message] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Messages: one per client that answered, then one error per failure that was reported."""
        return len(self.client_ids) + len(self._reported)

    @cached_property
    def _reported(self) -> tuple[Failure, ...]:
        return tuple(f for f in self.failures if f.cause in ERROR_CODES)

    @property
    def group_id(self) -> str:
        """Flower's group id of the messages."""
        return str(self.server_round) if self.group is None else self.group

    @property
    def num_clients(self) -> int:
        """K, the clients that answered."""
        return len(self.client_ids)

    @cached_property
    def update(self) -> Tensor:
        """`params - reference`, `[K, dim]` in the parameters' dtype."""
        if self.params is None or self.reference is None:
            raise ValueError("replies to an evaluation hold no update")
        return self.params - self.reference

    def select(self, keep: np.ndarray, failures: Sequence[Failure] = ()) -> "Replies":
        """Return the rows where `keep` `[K]` holds; `failures` name those left out."""
        if keep.all():
            return self if not failures else replace(self, failures=(*self.failures, *failures))
        rows = torch.from_numpy(np.flatnonzero(keep))
        reference = self.reference
        if reference is not None and reference.dim() == 2:
            reference = reference[rows]
        return replace(
            self,
            client_ids=self.client_ids[keep],
            params=None if self.params is None else self.params[rows],
            reference=reference,
            buffers={n: t[rows] for n, t in self.buffers.items()},
            extra={n: t[rows] for n, t in self.extra.items()},
            encoded={n: t[rows] for n, t in self.encoded.items()},
            num_examples=self.num_examples[rows],
            metrics={n: t[rows] for n, t in self.metrics.items()},
            staleness=self.staleness[rows],
            failures=(*self.failures, *failures),
            _built={
                place: self._built[old]
                for place, old in enumerate(rows.tolist())
                if old in self._built
            },
        )

    def completed(self, later: "Replies", asked: Iterable[int]) -> "Replies":
        """Return these replies with those of clients who were asked again and now answered.

        Args:
            later: Admitted replies to the same instructions.
            asked: Who was asked again; whatever `later` says of anybody else does not count.
        """
        again = set(asked)
        later = later.select(np.isin(later.client_ids, sorted(again)))
        odd: dict[int, Failure] = {}
        if later.num_clients and self.num_clients and not _stackable(self, later):
            why = "its extra arrays or metrics differ from those of the others"
            ids = later.client_ids.tolist()
            odd = {c: Failure(c, self.server_round, "names", why) for c in ids}
            later = later.select(np.zeros(later.num_clients, dtype=bool))
        known = {f.client_id: f for f in later.failures if f.cause != "absent"} | odd
        came = set(later.client_ids.tolist())
        failures = tuple(
            known.get(f.client_id, f) if f.client_id in again else f
            for f in self.failures
            if f.client_id not in came
        )
        if not later.num_clients:
            return replace(self, failures=failures)
        if not self.num_clients:
            return replace(later, failures=failures)
        joined = np.concatenate([self.client_ids, later.client_ids])
        order = torch.from_numpy(np.argsort(joined, kind="stable"))

        def join(mine: Tensor, others: Tensor) -> Tensor:
            return torch.cat([mine, others])[order]

        def stacked(mine: Tensor | None, others: Tensor | None) -> Tensor | None:
            return None if mine is None or others is None else join(mine, others)

        def named(mine: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: join(mine[name], others[name]) for name in mine}

        return replace(
            self,
            client_ids=joined[order.numpy()],
            params=stacked(self.params, later.params),
            reference=self.reference
            if self.reference is None or self.reference.dim() == 1
            else stacked(self.reference, later.reference),
            buffers=named(self.buffers, later.buffers),
            extra=named(self.extra, later.extra),
            encoded=named(self.encoded, later.encoded),
            num_examples=join(self.num_examples, later.num_examples),
            metrics=named(self.metrics, later.metrics),
            staleness=join(self.staleness, later.staleness),
            failures=failures,
            _built={},
            _instructions={**self._instructions, **later._instructions},
        )

    def admit(self) -> "Replies":
        """Refuse rows that are not finite or whose counts are out of bounds, with the reason.

        They are looked at once, however often this is asked.
        """
        return self if self.admitted else self._admitted

    @cached_property
    def _admitted(self) -> "Replies":
        keep = np.ones(len(self.client_ids), dtype=bool)
        failures: list[Failure] = []
        stacks = {"params": self.params, **self.buffers, **self.extra, **self.encoded}
        for bad, cause, what in refusals(
            stacks, self.num_examples, self.metrics, message_type=self.message_type
        ):
            if not bad.any():
                continue
            for place in np.flatnonzero(bad & keep):
                client = int(self.client_ids[place])
                failures.append(Failure(client, self.server_round, cause, what))
            keep[bad] = False
        return replace(self.select(keep, failures), admitted=True)

    def _build(self, index: int) -> Message:
        if index >= len(self.client_ids):
            failure = self._reported[index - len(self.client_ids)]
            error = Error(ERROR_CODES[failure.cause], failure.reason)
            return internals.message_with(self._metadata(failure.client_id), error=error)
        content = RecordDict()
        if self.params is not None:
            buffers = {name: stack[index] for name, stack in self.buffers.items()}
            encoded = {name: stack[index] for name, stack in self.encoded.items()}
            content[ARRAYS] = (
                array_record({**encoded, **buffers})
                if encoded
                else model_record(self.layout, self.params[index], buffers)
            )
        content[METRICS] = self.metric_record(index)
        if self.extra:
            content[EXTRA] = array_record({name: t[index] for name, t in self.extra.items()})
        client = int(self.client_ids[index])
        return internals.message_with(self._metadata(client), content=content)

    def metric_record(self, index: int) -> MetricRecord:
        """Return one client's metrics with its number of examples."""
        values: dict[str, int | float] = {NUM_EXAMPLES: int(self.num_examples[index])}
        values.update({name: float(column[index]) for name, column in self.metrics.items()})
        return MetricRecord(values)  # type: ignore[arg-type]

    def _metadata(self, client: int) -> Metadata:
        sent = self._instructions.get(client)
        metadata = (
            sent.metadata
            if sent is not None
            else internals.instruction_metadata(
                run_id=1,
                message_id=next_message_id(),
                node_id=internals.node_of(client),
                message_type=self.message_type,
                group_id=self.group_id,
                ttl=self.ttl,
                created_at=1.0,
            )
        )
        number = next_message_id()
        return internals.reply_metadata(metadata, message_id=number, created_at=metadata.created_at)

    @classmethod
    def empty(cls, cohort: Cohort, failures: Sequence[Failure] = ()) -> "Replies":
        """Return the replies of a round in which nobody answered."""
        layout, none = cohort.layout, torch.zeros(0, dtype=torch.int64)
        return cls(
            server_round=cohort.server_round,
            layout=layout,
            client_ids=np.zeros(0, dtype=np.int64),
            params=torch.zeros((0, layout.dim), dtype=layout.dtype),
            reference=cohort.shared.params
            if cohort.shared.params is not None
            else torch.zeros((0, layout.dim), dtype=layout.dtype),
            buffers={s.name: torch.zeros((0, *s.shape), dtype=s.dtype) for s in layout.buffers},
            extra={},
            num_examples=none,
            metrics={},
            staleness=none,
            failures=tuple(failures),
            message_type=cohort.message_type,
            ttl=cohort.ttl,
            group=cohort.group,
        )

    @classmethod
    def from_messages(
        cls, messages: Iterable[Message], sent: Cohort, declared: ReplyForm | None = None
    ) -> "Replies":
        """Stack ordinary messages, refusing those that do not fit what was asked for.

        Args:
            messages: Replies in any order, errors among them.
            sent: The instructions they answer; who is missing is listed as absent.
            declared: What replies hold besides the model; None goes by what most of them hold.
        """
        clients = dict(zip(sent.nodes.tolist(), sent.client_ids.tolist(), strict=True))
        answered: dict[int, Parsed] = {}
        failures: dict[int, Failure] = {}
        strangers: list[Failure] = []
        for message in messages:
            client = clients.get(message.metadata.src_node_id)
            if client is None:
                node = message.metadata.src_node_id
                why = f"node {node} was not asked in this round"
                strangers.append(Failure(node - 2, sent.server_round, "stranger", why))
                continue
            if client in answered or client in failures:
                why = "a second reply in one round; the first counts"
                strangers.append(Failure(client, sent.server_round, "twice", why))
                continue
            try:
                answered[client] = parse(message, sent)
            except Refused as refused:
                failures[client] = Failure(client, sent.server_round, refused.cause, str(refused))
        for client in sent.client_ids.tolist():
            if client not in answered and client not in failures:
                failures[client] = Failure(client, sent.server_round, "absent", "no reply arrived")
        return _stacked(answered, [*failures.values(), *strangers], sent, declared)


def _stackable(some: Replies, others: Replies) -> bool:
    """Whether the rows of two stacks hold the same things."""

    def signature(replies: Replies) -> tuple[Any, ...]:
        named = {**replies.buffers, **replies.extra, **replies.encoded}
        shapes = sorted((name, tuple(t.shape[1:]), str(t.dtype)) for name, t in named.items())
        return shapes, sorted(replies.metrics)

    return signature(some) == signature(others)


def _stacked(
    answered: Mapping[int, Parsed],
    failures: Sequence[Failure],
    sent: Cohort,
    declared: ReplyForm | None,
) -> Replies:
    """Replies of those whose arrays and metrics are those expected; what they hold more is left."""
    failures, odd = list(failures), set[int]()
    wanted = expected(answered.values(), declared)
    for client, row in sorted(answered.items()):
        if not wanted.has_arrays(row):
            cause = "names"
            why = f"extra arrays differ from those expected, {sorted(wanted.names)}"
        elif not wanted.has_metrics(row):
            cause = "metrics"
            why = f"metrics {sorted(row.metrics)} lack some of {list(wanted.metrics)}"
        else:
            continue
        odd.add(client)
        failures.append(Failure(client, sent.server_round, cause, why))
    ids = sorted(answered.keys() - odd)
    if not ids:
        return Replies.empty(sent, failures)
    rows, names = [answered[client] for client in ids], wanted.names
    trained = sent.message_type != MessageType.EVALUATE
    places = np.searchsorted(sent.client_ids, ids)
    personal = sent.personal.params
    reference = personal[torch.from_numpy(places)] if personal is not None else sent.shared.params
    return Replies(
        server_round=sent.server_round,
        layout=sent.layout,
        client_ids=np.array(ids, dtype=np.int64),
        params=torch.stack([r.params for r in rows if r.params is not None]) if trained else None,
        reference=reference if trained else None,
        buffers={n: torch.stack([r.buffers[n] for r in rows]) for n in rows[0].buffers},
        extra={n: torch.stack([r.extra[n] for r in rows]) for n in rows[0].extra if n in names},
        encoded={n: torch.stack([r.encoded[n] for r in rows]) for n in rows[0].encoded},
        num_examples=torch.tensor([r.num_examples for r in rows], dtype=torch.int64),
        metrics={
            name: torch.tensor([r.metrics[name] for r in rows], dtype=torch.float64)
            for name in wanted.metrics
        },
        staleness=torch.zeros(len(rows), dtype=torch.int64),
        failures=tuple(failures),
        message_type=sent.message_type,
        ttl=sent.ttl,
        group=sent.group,
        # one that holds more is built anew without it
        _built={n: row.message for n, row in enumerate(rows) if wanted.is_all_of(row)},
    )
