"""Words for people."""

from collections.abc import Iterable, Sequence
from typing import Any

_NAMED = 10  # clients


def names_of(clients: Sequence[Any], total: int) -> str:
    """Name clients in a sentence, the first ten of many.

    Example:
        >>> names_of([1], 4), names_of([1, 2, 3], 4)
        ('client 1', 'clients 1, 2, 3')
    """
    shown = ", ".join(str(client) for client in clients[:_NAMED])
    if len(clients) > _NAMED:
        return f"clients {shown}, ... ({len(clients)} of {total})"
    return f"client{'s' if len(clients) > 1 else ''} {shown}"


def in_bytes(count: float) -> str:
    """Write a number of bytes for people.

    Example:
        >>> in_bytes(512), in_bytes(3 * 2**20), in_bytes(23.5 * 2**30)
        ('512 B', '3.0 MiB', '23.5 GiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def in_seconds(value: float) -> str:
    """Return a time as people read it.

    Example:
        >>> in_seconds(0.0123), in_seconds(2)
        ('12.3 ms', '2.00 s')
    """
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def twice_in(names: Iterable[str]) -> str | None:
    """Return the first name that is there a second time, or None.

    Example:
        >>> twice_in(["a", "b", "a"]), twice_in(["a", "b"])
        ('a', None)
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
