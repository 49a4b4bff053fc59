"""What travels between a strategy and its clients, stacked: the Cohort goes out, Replies come back.

Both are lazy sequences of ordinary Flower messages. fedsim's own engine and strategies read the
tensors and never build a message; everybody else iterates and gets messages, each built at its
first read and kept.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from flwr.app import (
    ConfigRecord,
    Error,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from fedsim import flower_internals as internals
from fedsim.errors import RunError
from fedsim.layout import Layout, Payload
from fedsim.records import (
    ARRAYS,
    CONFIG,
    EXTRA,
    METRICS,
    NUM_EXAMPLES,
    SERVER_ROUND,
    WORK,
    ArraysMismatchError,
    array_record,
    model_record,
    model_tensors,
    named_tensors,
    only_arrays,
    only_metrics,
)

SETUP = f"{MessageType.TRAIN}.setup"
DEFAULT_TTL = 43200.0
MAX_EXAMPLES = 10**9
_message_numbers = itertools.count(1)


CAUSES = (
    "raised", "died", "hung", "late", "absent",
    "names", "shape", "dtype", "not finite", "num-examples", "metrics", "twice", "stranger",
)  # fmt: skip


class Failure(NamedTuple):
    """A client that gave no admissible reply.

    Attributes:
        client_id: Who.
        server_round: When.
        cause: One of `CAUSES`: what became of the client, or why its reply was refused.
        reason: What happened, in words, with the remedy when there is one.
    """

    client_id: int
    server_round: int
    cause: str
    reason: str

    def __str__(self) -> str:
        return f"client {self.client_id}, round {self.server_round}: {self.cause}: {self.reason}"


class _LazyMessages(Sequence[Message]):
    """A sequence whose messages are built at first read and kept."""

    _built: dict[int, Message]

    def _build(self, index: int) -> Message:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        """Return one message or a list of them."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if place not in self._built:
            self._built[place] = self._build(place)
        return self._built[place]

    def __iter__(self) -> Iterator[Message]:
        return (self[place] for place in range(len(self)))


@dataclass(frozen=True, eq=False)
class Cohort(_LazyMessages):
    """Instructions to the clients of one round.

    Attributes:
        client_ids: int64 `[K]`, ascending, no client twice.
        server_round: The round, from 1 (0: set-up).
        layout: How the model's tensors lie in `params`.
        shared: What every client receives.
        personal: What each client receives, rows in client order.
        config: Settings, as in any Flower instruction.
        message_type: "train", "evaluate" or "train.setup".
        absent: bool `[K]`, clients that were selected and will not answer (drop-out).
        work: float64 `[K]`, the share of its local work that each client does, in (0, 1]; None
            when all do the whole. It travels in the settings of those who do less.
        node_ids: int64 `[K]`, the nodes addressed; by default client id + 2.
        ttl: Seconds for which a message is valid.
        group: Flower's group id; None takes the round.
        own: Settings of each client that the others' differ from, in client order; None when all
            have the same.
    """

    client_ids: np.ndarray
    server_round: int
    layout: Layout
    shared: Payload
    personal: Payload = field(default_factory=Payload)
    config: Mapping[str, object] = field(default_factory=dict)
    message_type: str = MessageType.TRAIN
    absent: np.ndarray | None = None
    work: np.ndarray | None = None
    node_ids: np.ndarray | None = None
    ttl: float = DEFAULT_TTL
    group: str | None = None
    own: tuple[Mapping[str, object], ...] | None = None
    _built: dict[int, Message] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.client_ids) > 1 and not (np.diff(self.client_ids) > 0).all():
            raise ValueError("a cohort's client ids must ascend, none twice")

    def __len__(self) -> int:
        return len(self.client_ids)

    @property
    def nodes(self) -> np.ndarray:
        """The nodes addressed, int64 `[K]`."""
        if self.node_ids is not None:
            return self.node_ids
        return self.client_ids + internals.FIRST_NODE_ID

    @property
    def group_id(self) -> str:
        """Flower's group id of the messages."""
        return str(self.server_round) if self.group is None else self.group

    @property
    def is_absent(self) -> np.ndarray:
        """Who was selected and will not answer, bool `[K]`."""
        return np.zeros(len(self), dtype=bool) if self.absent is None else self.absent

    def altered(self, **changes: object) -> "Cohort":
        """Return a cohort with some attributes changed and no message built yet."""
        return replace(self, **{**changes, "_built": {}})  # type: ignore[arg-type]

    @cached_property
    def config_record(self) -> ConfigRecord:
        """The settings with the round among them."""
        return ConfigRecord({**self.config, SERVER_ROUND: self.server_round})  # type: ignore[dict-item]

    @property
    def is_partial(self) -> np.ndarray:
        """Who does only a part of its local work, bool `[K]`."""
        return np.zeros(len(self), dtype=bool) if self.work is None else self.work < 1

    def config_record_of(self, index: int) -> ConfigRecord:
        """The settings that one client receives."""
        own: Mapping[str, Any] = {} if self.own is None else self.own[index]
        if self.is_partial[index]:
            assert self.work is not None
            own = {**own, WORK: float(self.work[index])}
        return ConfigRecord({**self.config_record, **own}) if own else self.config_record

    def alike(self) -> list[tuple[Sequence[int], Mapping[str, object]]]:
        """Return the places of clients that have the same settings, and these settings."""
        if self.own is None:
            return [(range(len(self)), self.config)]
        groups: dict[str, list[int]] = {}
        for place, own in enumerate(self.own):
            groups.setdefault(repr(sorted(own.items())), []).append(place)
        return [(places, {**self.config, **self.own[places[0]]}) for places in groups.values()]

    @cached_property
    def _shared_content(self) -> RecordDict:
        return self._content(0)

    def _content_of(self, index: int) -> RecordDict:
        """What one client receives; clients of whom nothing is told apart share one object."""
        if not self.personal.is_empty:
            content = self._content(index)
        elif self.is_partial[index] or self.own is not None:
            content = RecordDict(dict(self._shared_content))
        else:
            return self._shared_content
        content[CONFIG] = self.config_record_of(index)
        return content

    def _content(self, index: int) -> RecordDict:
        mine = self.personal.rows([index]) if not self.personal.is_empty else Payload()
        params = mine.params[0] if mine.params is not None else self.shared.params
        buffers = {**self.shared.buffers, **{n: t[0] for n, t in mine.buffers.items()}}
        extra = {**self.shared.extra, **{n: t[0] for n, t in mine.extra.items()}}
        assert params is not None
        content = RecordDict(
            {ARRAYS: model_record(self.layout, params, buffers), CONFIG: self.config_record}
        )
        if extra:
            content[EXTRA] = array_record(extra)
        return content

    def _build(self, index: int) -> Message:
        internals.ensure_identity()
        return Message(
            self._content_of(index),
            int(self.nodes[index]),
            self.message_type,
            ttl=self.ttl,
            group_id=self.group_id,
        )

    @classmethod
    def from_messages(cls, messages: Sequence[Message], layout: Layout) -> "Cohort | None":
        """Return the cohort that a foreign strategy's messages amount to, or None.

        They do when they are instructions of one kind to different clients, each with one model of
        this layout, in one round. Arrays that differ make a personal payload, settings that differ
        are each client's `own`.
        """
        if not messages:
            return None
        kind = messages[0].metadata.message_type
        asked = [m.metadata.dst_node_id for m in messages]
        if (
            kind not in (MessageType.TRAIN, MessageType.EVALUATE, SETUP)
            or any(m.metadata.message_type != kind for m in messages)
            or len(set(asked)) != len(asked)
            or not all(internals.FIRST_NODE_ID <= node < 2**63 for node in asked)
        ):
            return None
        nodes = np.array(asked, dtype=np.int64)
        order = np.argsort(nodes, kind="stable").tolist()
        ordered = [messages[place] for place in order]
        contents = [message.content for message in ordered]
        alike = all(_same_arrays(content, contents[0]) for content in contents)
        payloads = [_payload(content, layout) for content in (contents[:1] if alike else contents)]
        if any(payload is None for payload in payloads):
            return None
        known = [payload for payload in payloads if payload is not None]
        settings = [settings_of(content) for content in contents]
        work = np.array([share_of_work(each) for each in settings])
        common = [{k: v for k, v in each.items() if k != WORK} for each in settings]
        config, own = _parted(common)
        if any(SERVER_ROUND in each for each in own or ()):
            return None
        return cls(
            client_ids=nodes[order] - internals.FIRST_NODE_ID,
            server_round=int(config.get(SERVER_ROUND, 0)),
            layout=layout,
            shared=known[0] if alike else Payload(),
            personal=Payload() if alike else _stacked(known),
            config={k: value for k, value in config.items() if k != SERVER_ROUND},
            message_type=kind,
            work=work if (work < 1).any() else None,
            ttl=ordered[0].metadata.ttl,
            group=ordered[0].metadata.group_id,
            own=own,
            _built=dict(enumerate(ordered)),
        )


@dataclass(frozen=True, eq=False)
class Replies(_LazyMessages):
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
    admitted: bool = False
    _built: dict[int, Message] = field(default_factory=dict, repr=False)
    _instructions: Mapping[int, Message] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Messages: one per client that answered, then one error per failure that was reported."""
        return len(self.client_ids) + len(self._reported)

    @cached_property
    def _reported(self) -> tuple[Failure, ...]:
        return tuple(f for f in self.failures if f.cause in _ERROR_CODES)

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
            num_examples=join(self.num_examples, later.num_examples),
            metrics=named(self.metrics, later.metrics),
            staleness=join(self.staleness, later.staleness),
            failures=failures,
            _built={},
            _instructions={**self._instructions, **later._instructions},
        )

    def admit(self) -> "Replies":
        """Refuse rows that are not finite or whose counts are out of bounds, with the reason."""
        if self.admitted:
            return self
        keep = np.ones(len(self.client_ids), dtype=bool)
        failures: list[Failure] = []
        stacks = {"params": self.params, **self.buffers, **self.extra}

        knob = "setup_lr" if self.message_type == SETUP else "local_lr"

        def refuse(bad: np.ndarray, cause: str, what: str) -> None:
            for place in np.flatnonzero(bad & keep):
                client = int(self.client_ids[place])
                failures.append(Failure(client, self.server_round, cause, what))
            keep[bad] = False

        for name, stack in stacks.items():
            if stack is not None and stack.is_floating_point() and len(stack):
                what = f"'{name}' holds NaN or infinity; is {knob} too large?"
                refuse(~finite_rows(stack), "not finite", what)
        counts = self.num_examples.numpy()
        bounds = f"num-examples must be in 0..{MAX_EXAMPLES}"
        refuse((counts < 0) | (counts > MAX_EXAMPLES), "num-examples", bounds)
        for name, column in self.metrics.items():
            values = column.numpy()
            # in an evaluation nan says that the samples do not define a metric; a loss always is
            undefined = self.message_type == MessageType.EVALUATE and name != "loss"
            bad = np.isinf(values) if undefined else ~np.isfinite(values)
            refuse(bad, "metrics", f"metric '{name}' is not finite")
        return replace(self.select(keep, failures), admitted=True)

    def _build(self, index: int) -> Message:
        if index >= len(self.client_ids):
            failure = self._reported[index - len(self.client_ids)]
            error = Error(_ERROR_CODES[failure.cause], failure.reason)
            return internals.message_with(self._metadata(failure.client_id), error=error)
        content = RecordDict()
        if self.params is not None:
            buffers = {name: stack[index] for name, stack in self.buffers.items()}
            content[ARRAYS] = model_record(self.layout, self.params[index], buffers)
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
                message_id=f"{next(_message_numbers):064x}",
                node_id=internals.node_of(client),
                message_type=self.message_type,
                group_id=self.group_id,
                ttl=self.ttl,
                created_at=1.0,
            )
        )
        number = f"{next(_message_numbers):064x}"
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
    def from_messages(cls, messages: Iterable[Message], sent: Cohort) -> "Replies":
        """Stack ordinary messages, refusing those that do not fit what was asked for.

        Args:
            messages: Replies in any order, errors among them.
            sent: The instructions they answer; who is missing is listed as absent.
        """
        clients = dict(zip(sent.nodes.tolist(), sent.client_ids.tolist(), strict=True))
        answered: dict[int, _Parsed] = {}
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
                answered[client] = _parse(message, sent)
            except _Refused as refused:
                failures[client] = Failure(client, sent.server_round, refused.cause, str(refused))
        for client in sent.client_ids.tolist():
            if client not in answered and client not in failures:
                failures[client] = Failure(client, sent.server_round, "absent", "no reply arrived")
        return cls._stack(answered, [*failures.values(), *strangers], sent)

    @classmethod
    def _stack(
        cls, answered: "dict[int, _Parsed]", failures: Sequence[Failure], sent: Cohort
    ) -> "Replies":
        failures, odd = list(failures), set[int]()
        extras = _usual(row.signature for row in answered.values())
        metrics = _usual(tuple(sorted(row.metrics)) for row in answered.values())
        for client, row in sorted(answered.items()):
            if row.signature != extras:
                cause, why = (
                    "names",
                    f"extra arrays differ from the usual {[n for n, *_ in extras]}",
                )
            elif not row.metrics.keys() >= set(metrics):
                cause, why = (
                    "metrics",
                    f"metrics {sorted(row.metrics)} lack some of {list(metrics)}",
                )
            else:
                continue
            odd.add(client)
            failures.append(Failure(client, sent.server_round, cause, why))
        ids = sorted(answered.keys() - odd)
        if not ids:
            return cls.empty(sent, failures)
        rows = [answered[client] for client in ids]
        trained = sent.message_type != MessageType.EVALUATE
        places = np.searchsorted(sent.client_ids, ids)
        personal = sent.personal.params
        reference = (
            personal[torch.from_numpy(places)] if personal is not None else sent.shared.params
        )
        return cls(
            server_round=sent.server_round,
            layout=sent.layout,
            client_ids=np.array(ids, dtype=np.int64),
            params=torch.stack([r.params for r in rows if r.params is not None])
            if trained
            else None,
            reference=reference if trained else None,
            buffers={n: torch.stack([r.buffers[n] for r in rows]) for n in rows[0].buffers},
            extra={n: torch.stack([r.extra[n] for r in rows]) for n in rows[0].extra},
            num_examples=torch.tensor([r.num_examples for r in rows], dtype=torch.int64),
            metrics={
                name: torch.tensor([r.metrics[name] for r in rows], dtype=torch.float64)
                for name in metrics
            },
            staleness=torch.zeros(len(rows), dtype=torch.int64),
            failures=tuple(failures),
            message_type=sent.message_type,
            ttl=sent.ttl,
            group=sent.group,
            _built={place: row.message for place, row in enumerate(rows)},
        )


def finite_rows(stack: Tensor) -> np.ndarray:
    """Return which rows of floats `[K, ...]` hold neither NaN nor infinity, bool `[K]`.

    A row's sum is finite only if all of it is; a row whose sum is not may still be (its sum is out
    of range), and is looked at number by number. One pass, ten times as fast as `isfinite`.
    """
    rows = stack.reshape(len(stack), -1)
    finite: np.ndarray = torch.isfinite(rows.sum(dim=1)).numpy()
    if not finite.all():
        for place in np.flatnonzero(~finite).tolist():
            finite[place] = bool(torch.isfinite(rows[place]).all())
    return finite


def settings_of(content: RecordDict) -> ConfigRecord:
    """Return an instruction's settings: its first config record, or an empty one."""
    return next(iter(content.config_records.values()), ConfigRecord())


def share_of_work(config: Mapping[str, object]) -> float:
    """Return the share of its local work that a client is to do, 1 unless the settings say less.

    Raises:
        ValueError: If it is no number in (0, 1].
    """
    share = config.get(WORK, 1.0)
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"'{WORK}' = {share!r} in the instruction's config: must be in (0, 1]")
    return float(share)


def why_no_cohort(messages: Sequence[Message]) -> str:
    """Say why messages are no instructions that can be answered and checked together."""
    kinds = sorted({m.metadata.message_type for m in messages})
    nodes = [m.metadata.dst_node_id for m in messages]
    if len(kinds) > 1:
        return f"messages of the kinds {', '.join(kinds)} in one call; send one kind at a time"
    if kinds and kinds[0] not in (MessageType.TRAIN, MessageType.EVALUATE, SETUP):
        return f"messages of the kind '{kinds[0]}'; fedsim's clients train and evaluate"
    twice = [node for node, many in Counter(nodes).items() if many > 1]
    if twice:
        client = internals.client_of(min(twice))
        return f"several messages to client {client}; send each client one"
    for message in messages:
        client = internals.client_of(message.metadata.dst_node_id)
        names = sorted(message.content.array_records)
        if only_arrays(message.content) is None or not set(names) <= {ARRAYS, EXTRA}:
            held = f"the records {names}" if names else "no arrays"
            return (
                f"client {client} a message with {held}; a message holds the model under "
                f"'{ARRAYS}', and what it sends besides under '{EXTRA}'"
            )
    return f"messages of different rounds; give all the same '{SERVER_ROUND}' in their config"


def _parted(
    settings: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], tuple[Mapping[str, Any], ...] | None]:
    """Settings that all have, and what each has besides; None where nobody has any."""
    first = settings[0]
    if all(each is first or each == first for each in settings[1:]):
        return dict(first), None
    common = {
        key: value
        for key, value in first.items()
        if all(key in each and each[key] == value for each in settings)
    }
    return common, tuple(
        {key: value for key, value in each.items() if key not in common} for each in settings
    )


class MessagesError(RunError):
    """A strategy sent messages that cannot be answered; the text goes on after "sends"."""


def _same_arrays(content: RecordDict, other: RecordDict) -> bool:
    """Whether two instructions hold the very same array records."""
    if content is other:
        return True
    mine, others = content.array_records, other.array_records
    return mine.keys() == others.keys() and all(mine[name] is others[name] for name in mine)


def _usual(signatures: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The most common of the clients' signatures (of equally common ones the smallest)."""
    counted = Counter(signatures)
    return min(counted, key=lambda s: (-counted[s], s)) if counted else ()


def _payload(content: RecordDict, layout: Layout) -> Payload | None:
    """What one instruction carries, or None when it is not one model of this layout."""
    record = only_arrays(content)
    if record is None or not set(content.array_records) <= {ARRAYS, EXTRA}:
        record = record if len(content.array_records) == 1 else None
    if record is None:
        return None
    extra = content.array_records.get(EXTRA)
    params, buffers = model_tensors(layout, record)
    mine = {} if extra is None or extra is record else named_tensors(extra)
    return Payload(params, buffers, mine)


def _stacked(payloads: Sequence[Payload]) -> Payload:
    """One personal payload of several clients' own."""
    return Payload(
        torch.stack([p.params for p in payloads if p.params is not None]),
        {n: torch.stack([p.buffers[n] for p in payloads]) for n in payloads[0].buffers},
        {n: torch.stack([p.extra[n] for p in payloads]) for n in payloads[0].extra},
    )


def _stackable(some: Replies, others: Replies) -> bool:
    """Whether the rows of two stacks hold the same things."""

    def signature(replies: Replies) -> tuple[Any, ...]:
        named = {**replies.buffers, **replies.extra}
        shapes = sorted((name, tuple(t.shape[1:]), str(t.dtype)) for name, t in named.items())
        return shapes, sorted(replies.metrics)

    return signature(some) == signature(others)


_ERROR_CODES = {"raised": 2, "died": 8, "hung": 8, "error": 0}


class _Parsed(NamedTuple):
    message: Message
    params: Tensor | None
    buffers: dict[str, Tensor]
    extra: dict[str, Tensor]
    num_examples: int
    metrics: dict[str, float]

    @property
    def signature(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        return tuple(sorted((n, tuple(t.shape), str(t.dtype)) for n, t in self.extra.items()))


class _Refused(ValueError):
    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


def _parse(message: Message, sent: Cohort) -> _Parsed:
    if message.has_error():
        raise _Refused("raised", str(message.error.reason))
    content = message.content
    metrics = only_metrics(content)
    count = None if metrics is None else metrics.get(NUM_EXAMPLES)
    if metrics is None or not isinstance(count, int):
        raise _Refused("num-examples", f"the reply's metrics hold no integer '{NUM_EXAMPLES}'")
    if not 0 <= count <= MAX_EXAMPLES:
        raise _Refused("num-examples", f"{count} examples: must be in 0..{MAX_EXAMPLES}")
    try:
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if name != NUM_EXAMPLES and isinstance(value, int | float)
        }
    except OverflowError:
        raise _Refused("metrics", "a metric is too large for a float") from None
    params, buffers, extra = None, dict[str, Tensor](), dict[str, Tensor]()
    if sent.message_type != MessageType.EVALUATE:
        record = only_arrays(content)
        if record is None:
            raise _Refused("names", "the reply holds no arrays")
        try:
            params, buffers = model_tensors(sent.layout, record, strict=True)
            if EXTRA in content.array_records:
                extra = named_tensors(content.array_records[EXTRA])
        except ArraysMismatchError as error:
            raise _Refused(error.cause, str(error)) from None
    return _Parsed(message, params, buffers, extra, count, numbers)
