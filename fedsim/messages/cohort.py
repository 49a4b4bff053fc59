"""What a strategy sends to its clients, stacked: a lazy sequence of ordinary Flower messages.

fedsim's own engine and strategies read the tensors and never build a message; everybody else
iterates and gets messages, each built at its first read and kept.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import (
    ConfigRecord,
    Message,
    MessageType,
    RecordDict,
)

from fedsim.basics.errors import RunError
from fedsim.messages import flower_internals as internals
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.lazy import LazyMessages
from fedsim.messages.records import (
    ARRAYS,
    CONFIG,
    EXTRA,
    SERVER_ROUND,
    WORK,
    array_record,
    model_record,
    model_tensors,
    named_tensors,
    only_arrays,
)

SETUP = f"{MessageType.TRAIN}.setup"
DEFAULT_TTL = 43200.0


@dataclass(frozen=True, eq=False)
class Cohort(LazyMessages):
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
        rounds: int64 `[K]`, the round in which each client's work begins, and by which it draws;
            None when it is this one for all. Another one is where a clock delivers late.
        is_ahead: Whether this is work that is done before its replies are wanted, or might have
            been: all chunks then have as many slots, for a client's bits depend on their number and
            must not on what is done beside it.
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
    rounds: np.ndarray | None = None
    is_ahead: bool = False
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
    def is_built(self) -> bool:
        """Whether all messages are there, as where a foreign strategy has made them."""
        return len(self._built) == len(self)

    @property
    def is_partial(self) -> np.ndarray:
        """Who does only a part of its local work, bool `[K]`."""
        return np.zeros(len(self), dtype=bool) if self.work is None else self.work < 1

    def config_record_of(self, index: int) -> ConfigRecord:
        """The settings that one client receives, as a record."""
        if self.own is None and self.rounds is None and not self.is_partial[index]:
            return self.config_record
        return ConfigRecord(self.settings_of(index))

    def settings_of(self, index: int) -> dict[str, Any]:
        """The settings that one client receives, the round among them."""
        own: Mapping[str, Any] = {} if self.own is None else self.own[index]
        found = {**self.config, SERVER_ROUND: self.round_of(index), **own}
        if self.work is not None and self.work[index] < 1:
            found[WORK] = float(self.work[index])
        return found

    def round_of(self, index: int) -> int:
        """The round in which one client's work begins."""
        return self.server_round if self.rounds is None else int(self.rounds[index])

    def alike(self, *, by_round: bool = True) -> list[tuple[Sequence[int], Mapping[str, object]]]:
        """Return the places of clients that have the same settings, and these settings.

        Args:
            by_round: Whether clients whose work begins in different rounds are apart.
        """
        if self.own is None and (self.rounds is None or not by_round):
            return [(range(len(self)), self.config)]
        groups: dict[tuple[int, str], list[int]] = {}
        owns: Sequence[Mapping[str, object]] = self.own or ({},) * len(self)
        for place, own in enumerate(owns):
            settings = repr(sorted(own.items())) if own else ""
            kind = (self.round_of(place) if by_round else 0, settings)
            groups.setdefault(kind, []).append(place)
        return [(places, {**self.config, **owns[places[0]]}) for places in groups.values()]

    @cached_property
    def _shared_content(self) -> RecordDict:
        return self._content(0)

    def _content_of(self, index: int) -> RecordDict:
        """The message content for one client. Clients whose content is equal share one object."""
        if not self.personal.is_empty:
            content = self._content(index)
        elif self.is_partial[index] or self.own is not None or self.rounds is not None:
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
        config, own = parted(common)
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


def parted(
    settings: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], tuple[Mapping[str, Any], ...] | None]:
    """Return settings that all have, and what each has besides; None where nobody has any."""
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
