"""How a strategy declares that one of its keys has no effect while another has a certain value.

A client procedure declares it in the same way.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedsim.basics.errors import show

Beside = Callable[[Mapping[str, Any]], str | None]


class Idle(NamedTuple):
    """Keys that can have no effect.

    Attributes:
        keys: The keys.
        beside: Table -> the key and value that leave them nothing to do, or None.
    """

    keys: tuple[str, ...]
    beside: Beside


def at(key: str, value: Any) -> Beside:
    """Without effect when a key has this value."""
    return lambda table: f"{key} = {show(value)}" if table[key] == value else None


def given(key: str) -> Beside:
    """Without effect when an optional key has a value."""
    return lambda table: f"{key} = {table[key]}" if table[key] is not None else None
