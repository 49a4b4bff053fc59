"""Replies read from ordinary Flower messages."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from flwr.app import (
    Message,
    MessageType,
)
from torch import Tensor

from fedsim.messages.admission import MAX_EXAMPLES
from fedsim.messages.cohort import Cohort
from fedsim.messages.encoded import encoded_tensors, is_encoded
from fedsim.messages.failures import CAUSE_OF_CODE
from fedsim.messages.records import (
    EXTRA,
    NUM_EXAMPLES,
    ArraysMismatchError,
    model_tensors,
    named_tensors,
    only_arrays,
    only_metrics,
)


class Parsed(NamedTuple):
    """What an ordinary message holds, one client's."""

    message: Message
    params: Tensor | None
    buffers: dict[str, Tensor]
    extra: dict[str, Tensor]
    num_examples: int
    metrics: dict[str, float]
    encoded: dict[str, Tensor]

    @property
    def signature(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Names, shapes and types of the arrays that came besides the model, or in its place."""
        named = {**self.extra, **self.encoded}
        return tuple(sorted((n, tuple(t.shape), str(t.dtype)) for n, t in named.items()))


class ReplyForm(NamedTuple):
    """What replies hold besides the model.

    Attributes:
        arrays: Names, shapes and types of arrays besides the model, or in its place, sorted.
        metrics: Names of metrics.
        by_vote: Whether this is what most replies hold; then no other array may stand beside it.
    """

    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    metrics: tuple[str, ...]
    by_vote: bool = False

    @property
    def names(self) -> frozenset[str]:
        """Names of the arrays."""
        return frozenset(name for name, *_ in self.arrays)

    def has_arrays(self, row: Parsed) -> bool:
        """Whether a reply holds these arrays, and none more that the model is read from."""
        if self.by_vote:
            return row.signature == self.arrays
        return {*self.arrays} <= {*row.signature} and row.encoded.keys() <= self.names

    def is_all_of(self, row: Parsed) -> bool:
        """Whether a reply holds nothing more."""
        return row.signature == self.arrays and row.metrics.keys() == {*self.metrics}

    def has_metrics(self, row: Parsed) -> bool:
        """Whether a reply holds these metrics."""
        return row.metrics.keys() >= {*self.metrics}


class Refused(ValueError):
    """A reply does not fit what was asked for; `cause` is one of `CAUSES`."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


def parse(message: Message, sent: Cohort) -> Parsed:
    """Read a reply.

    Raises:
        Refused: If it does not fit what was asked for.
    """
    if message.has_error():
        cause = CAUSE_OF_CODE.get(message.error.code, "raised")
        raise Refused(cause, str(message.error.reason))
    content = message.content
    metrics = only_metrics(content)
    count = None if metrics is None else metrics.get(NUM_EXAMPLES)
    if metrics is None or not isinstance(count, int):
        raise Refused("num-examples", f"the reply's metrics hold no integer '{NUM_EXAMPLES}'")
    if not 0 <= count <= MAX_EXAMPLES:
        raise Refused("num-examples", f"{count} examples: must be in 0..{MAX_EXAMPLES}")
    try:
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if name != NUM_EXAMPLES and isinstance(value, int | float)
        }
    except OverflowError:
        raise Refused("metrics", "a metric is too large for a float") from None
    params, buffers, extra = None, dict[str, Tensor](), dict[str, Tensor]()
    encoded = dict[str, Tensor]()
    if sent.message_type != MessageType.EVALUATE:
        record = only_arrays(content)
        if record is None:
            raise Refused("names", "the reply holds no arrays")
        try:
            if is_encoded(record):
                base = _received(message, sent)
                params, buffers, encoded = encoded_tensors(sent.layout, record, base)
            else:
                params, buffers = model_tensors(sent.layout, record, strict=True)
            if EXTRA in content.array_records:
                extra = named_tensors(content.array_records[EXTRA])
        except ArraysMismatchError as error:
            raise Refused(error.cause, str(error)) from None
    return Parsed(message, params, buffers, extra, count, numbers, encoded)


def _received(message: Message, sent: Cohort) -> Tensor:
    """What the client started from, `[dim]`."""
    if sent.personal.params is None:
        assert sent.shared.params is not None
        return sent.shared.params
    place = sent.nodes.tolist().index(message.metadata.src_node_id)
    return sent.personal.params[place]


def expected(rows: Iterable[Parsed], declared: ReplyForm | None = None) -> ReplyForm:
    """Return what every reply of a round must hold besides the model.

    Args:
        rows: The replies.
        declared: What procedure and task declare; None, or what no reply holds, takes the most
            common arrays and metrics (of equally common ones the smallest).
    """
    replies = list(rows)
    if declared is not None and any(
        declared.has_arrays(row) and declared.has_metrics(row) for row in replies
    ):
        return declared
    arrays = _usual(row.signature for row in replies)
    metrics = _usual(tuple(sorted(row.metrics)) for row in replies)
    return ReplyForm(arrays, metrics, by_vote=True)


def declared_by(row: Parsed) -> ReplyForm:
    """Return what a reply holds that is right by definition."""
    return ReplyForm(row.signature, tuple(sorted(row.metrics)))


def _usual(signatures: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the most common of the clients' signatures (of equally common ones the smallest)."""
    counted = Counter(signatures)
    return min(counted, key=lambda s: (-counted[s], s)) if counted else ()
