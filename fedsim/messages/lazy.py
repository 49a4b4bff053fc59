"""Sequences of Flower messages that are built when they are read."""

import itertools
from collections.abc import Iterator, Sequence
from typing import overload

from flwr.app import Message

_numbers = itertools.count(1)


def next_message_id() -> str:
    """Return a message id that no other message of this process has."""
    return f"{next(_numbers):064x}"


class LazyMessages(Sequence[Message]):
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
