"""Messages of others made cohorts and replies: the one place that asks which of both they are.

Foreign strategies send ordinary messages, and nodes of a deployment answer with some. The outermost
Grid makes a `Cohort` of the former, the innermost makes `Replies` of the latter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message, MessageType

from fedsim.messages.cohort import Cohort, MessagesError, why_no_cohort
from fedsim.messages.failures import Failure
from fedsim.messages.flower_internals import client_of
from fedsim.messages.layout import Layout
from fedsim.messages.records import named_tensors, only_arrays
from fedsim.messages.replies import Replies

_WORK = (MessageType.TRAIN, MessageType.EVALUATE)


def batch_of(messages: Iterable[Message]) -> Sequence[Message]:
    """Return a cohort as it is, and other messages as a list."""
    return messages if isinstance(messages, Cohort) else list(messages)


def as_cohort(messages: Sequence[Message], layout: Layout | None) -> Cohort | None:
    """Return the cohort that messages are or amount to, or None, see `Cohort.from_messages`."""
    if isinstance(messages, Cohort):
        return messages
    return None if layout is None else Cohort.from_messages(messages, layout)


def asks_for_work(batch: Sequence[Message]) -> bool:
    """Whether some of the messages ask clients to train or to evaluate."""
    if isinstance(batch, Cohort):
        return True
    return any(m.metadata.message_type.partition(".")[0] in _WORK for m in batch)


def cohort_of(messages: Sequence[Message], layout: Layout | None) -> Cohort:
    """Return the cohort that messages are or amount to.

    Args:
        messages: A cohort, or instructions of a foreign strategy, at least one.
        layout: The model's layout; None takes that of the first message's arrays.

    Raises:
        MessagesError: If they cannot be answered and checked together.
    """
    if layout is None and not isinstance(messages, Cohort):
        record = only_arrays(messages[0].content)
        layout = None if record is None else Layout.from_named(named_tensors(record))
    made = as_cohort(messages, layout)
    if made is None:
        raise MessagesError(why_no_cohort(messages))
    return made


def replies_of(messages: Iterable[Message], sent: Cohort) -> Replies:
    """Return what came back, stacked.

    Args:
        messages: Replies, stacked or not.
        sent: The instructions that they answer.
    """
    return messages if isinstance(messages, Replies) else Replies.from_messages(messages, sent)


def present_in(batch: Sequence[Message]) -> Sequence[Message]:
    """Return the messages to those who will answer."""
    if isinstance(batch, Cohort):
        return [batch[place] for place in np.flatnonzero(~batch.is_absent).tolist()]
    return batch


def clients_of(batch: Sequence[Message]) -> tuple[int, ...]:
    """Return the clients that messages are for, in ascending order."""
    if isinstance(batch, Cohort):
        return tuple(batch.client_ids.tolist())
    return tuple(sorted(client_of(message.metadata.dst_node_id) for message in batch))


def configs_of(batch: Sequence[Message]) -> Iterator[Mapping[str, Any]]:
    """Yield the different configs of a round's instructions."""
    if isinstance(batch, Cohort):
        yield from ({**batch.config, **own} for own in batch.own or ({},))
        return
    seen: dict[int, Mapping[str, Any]] = {}
    for message in batch:
        for record in message.content.config_records.values():
            seen.setdefault(id(record), record)
    yield from seen.values()


def stacked(replies: Iterable[Message]) -> Replies | None:
    """Return replies that went through a Grid of fedsim's; None of others."""
    return replies if isinstance(replies, Replies) else None


def failures_of(replies: Iterable[Message]) -> tuple[Failure, ...]:
    """Return who failed, for replies that went through a Grid of fedsim's."""
    stack = stacked(replies)
    return () if stack is None else stack.failures
