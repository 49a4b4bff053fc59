"""What a server will not use of the replies of a plain Flower app, said when it comes.

The app's own arithmetic stays its own: nothing is changed or left out here.
"""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

from fedsim.messages import flower_internals as internals
from fedsim.messages.admission import MAX_EXAMPLES
from fedsim.messages.records import NUM_EXAMPLES, SERVER_ROUND

_LINES = 5  # of one kind of message in a round; the others are counted
_OWN = "; the app is given it as it is: have the client raise, or the strategy leave it out"
_NPY = "numpy.ndarray"  # Flower's name of arrays as NumPy writes them
_HEADER = 10_000  # bytes in which an array's header lies
_NUMBERS = "biuf"
_KINDS = {"c": "complex numbers", "U": "text", "S": "text", "O": "objects"}
Signature = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class _Tally:
    """What has come of one kind of message in one round."""

    asked: int = 0
    counted: int = 0
    unsaid: int = 0
    lines: int = 0
    first: str = ""
    usual: tuple[int, Signature] | None = None  # who replied first, with which arrays
    sent_finite: dict[int, bool] = field(default_factory=dict)


class ReplyWatch:
    """Names clients whose replies a server of Flower's will not use, or should not.

    Args:
        tell: Tells the user, a line at a time.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._key: tuple[str, str] | None = None
        self._tally = _Tally()
        self._spoilt = False
        self.said: set[str] = set()

    def look(self, asked: Message, reply: Message | None, why_none: str = "") -> None:
        """Take note of a reply.

        Args:
            asked: The instruction.
            reply: Its reply; None where none will come.
            why_none: Why none will come.
        """
        kind = asked.metadata.message_type.partition(".")[0]
        if kind not in (MessageType.TRAIN, MessageType.EVALUATE):
            return
        key = kind, _round(asked)
        if key != self._key:
            self.flush()
            self._key, self._tally = key, _Tally()
        tally = self._tally
        tally.asked += 1
        client = internals.client_of(asked.metadata.dst_node_id)
        if reply is None:
            self._say(client, why_none)
        elif reply.has_error():
            reason = str(reply.error.reason)
            self.said.add(reason)
            self._say(client, reason.removeprefix(f"client {client}: "), error=True)
        else:
            self._look_into(client, asked.content, reply.content)

    def end_of_call(self) -> None:
        """Take note that a call has been answered: without a number it was a round."""
        if self._key is not None and not self._key[1]:
            self.flush()
            self._key = None

    def flush(self) -> None:
        """Say what a round came to, if there is something to say."""
        if self._key is None or not self._tally.asked:
            return
        tally, where = self._tally, _where(*self._key)
        if tally.unsaid:
            self._tell(f"{where}: {tally.unsaid} more clients like these")
        if self._key[0] == MessageType.TRAIN and not tally.counted:
            self._tell(
                f"{where}: nobody's training counted, of {tally.asked} clients asked (the first "
                f"cause: {tally.first}); the model is what it was, or what the app makes of nothing"
            )
        self._key, self._tally = None, _Tally()

    def _look_into(self, client: int, sent: RecordDict, content: RecordDict) -> None:
        tally = self._tally
        assert self._key is not None
        kind = self._key[0]
        trains = kind == MessageType.TRAIN
        problem = internals.unreadable_by_old_server(sent, content)
        if problem is None and trains:
            problem = self._arrays(client, sent, content)
        not_finite = None
        if problem is None:
            not_finite = _not_finite(content, trains)
        examples = _examples(content)
        if problem is None and trains and examples == 0:
            tally.first = tally.first or f"client {client} trained on 0 examples"
        elif problem is None and not_finite is None:
            tally.counted += 1
        if not_finite is not None:
            tally.counted += trains  # the app counts it, alas
            if self._sent_finite(sent):
                self._say(client, f"reply is not finite: {not_finite}{_OWN}")
        elif problem is not None:
            self._say(client, problem)
        elif trains and isinstance(examples, int) and not 0 <= examples <= MAX_EXAMPLES:
            self._say(client, f"{examples} examples: must be in 0..{MAX_EXAMPLES}{_OWN}")

    def _sent_finite(self, sent: RecordDict) -> bool:
        """Whether what a client was sent is finite; said once where it is not."""
        known = self._tally.sent_finite
        if id(sent) not in known:
            known[id(sent)] = _not_finite(sent, trains=True) is None
            if not known[id(sent)] and not self._spoilt:
                self._spoilt = True
                assert self._key is not None
                self._tell(
                    f"{_where(*self._key)}: the model that the server sends is not finite from "
                    "here on; the app made it so, of the replies before"
                )
        return known[id(sent)]

    def _arrays(self, client: int, sent: RecordDict, content: RecordDict) -> str | None:
        """What is wrong with the arrays of a reply to training, or None."""
        if sent.array_records and not content.array_records:
            return "the reply holds no arrays, and the instruction did"
        found, odd = list[tuple[str, tuple[int, ...]]](), ""
        for record, arrays in content.array_records.items():
            for name, array in arrays.items():
                shape, kind = _described(array)
                found.append((f"{record}/{name}", shape))
                if kind not in _NUMBERS:
                    odd = odd or f"'{record}' '{name}' holds {_KINDS.get(kind, 'no numbers')}"
        if odd:
            return f"{odd}; return real numbers"
        mine = tuple(found)
        if self._tally.usual is None:
            self._tally.usual = client, mine
        first, usual = self._tally.usual
        if mine == usual:
            return None
        return (
            f"its {len(mine)} arrays differ in name or shape from the {len(usual)} of client "
            f"{first}{_first_difference(mine, usual)}; return the same from every client"
        )

    def _say(self, client: int, what: str, *, error: bool = False) -> None:
        tally = self._tally
        tally.first = tally.first or f"client {client}: {what}"
        if tally.lines == _LINES:
            tally.unsaid += 1
            return
        tally.lines += 1
        assert self._key is not None
        if error:
            self._tell(f"{_where(*self._key)}: client {client}: {what}")
            return
        number = f", round {self._key[1]}" if self._key[1] else ""
        self._tell(f"client {client}{number}, {self._key[0]}: {what}")


def _round(asked: Message) -> str:
    """The number of the round in which an instruction is sent, or nothing."""
    for config in asked.content.config_records.values():
        for name in (SERVER_ROUND, "server_round"):
            if isinstance(config.get(name), int):
                return str(config[name])
    return str(asked.metadata.group_id or "")


def _where(kind: str, number: str) -> str:
    return f"round {number}, {kind}" if number else kind


def _described(array: Array) -> tuple[tuple[int, ...], str]:
    """An array's shape and kind of numbers; Flower's old interface has both in the bytes alone."""
    if array.shape or array.stype != _NPY:
        return tuple(array.shape), _kind(array.dtype)
    file = io.BytesIO(array.data[:_HEADER])
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError:
        return tuple(array.shape), _kind(array.dtype)
    return shape, dtype.kind


def _kind(dtype: str) -> str:
    try:
        return np.dtype(dtype).kind
    except TypeError:
        return "f"  # one of torch's that NumPy does not know


def _first_difference(mine: Signature, usual: Signature) -> str:
    for (name, shape), (other, expected) in zip(mine, usual, strict=False):
        if name == other and shape != expected:
            return f" ('{name}' is {list(shape)}, not {list(expected)})"
    return ""


def _examples(content: RecordDict) -> object:
    for record in content.metric_records.values():
        for name in (NUM_EXAMPLES, "num_examples"):
            if name in record:
                return record[name]
    return None


def _not_finite(content: RecordDict, trains: bool) -> str | None:
    """The first array or number of a content that is not finite, in words, or None."""
    for record, arrays in content.array_records.items():
        if (found := _first_array(arrays)) is not None:
            return f"'{record}' {found}"
    for metrics in content.metric_records.values():
        for name, value in metrics.items():
            # in an evaluation nan says that the samples do not define a metric; a loss always is
            if (trains or name.endswith("loss")) and not all(map(math.isfinite, _numbers(value))):
                return f"metric '{name}' = {value}"
    return None


def _first_array(arrays: ArrayRecord) -> str | None:
    for name, array in arrays.items():
        if array.stype != "numpy.ndarray" or not array.data:
            continue
        try:
            values = array.numpy()
        except Exception as error:  # bytes of a client's may be anything
            return f"['{name}'] cannot be read ({error})"
        if values.dtype.kind in "fc" and not np.isfinite(values).all():
            return f"['{name}'] holds NaN or infinity"
    return None


def _numbers(value: object) -> Iterable[float]:
    if isinstance(value, list | tuple):
        return [float(v) for v in value]
    return [float(value)] if isinstance(value, int | float) else []
