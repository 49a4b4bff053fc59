"""What a probe has to say of the machine."""

from typing import Literal, NamedTuple

State = Literal["ok", "note", "failed"]


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: What was looked at, such as "torch" or "memory".
        state: "ok"; "note" for what is absent or tight and can be done without; "failed" for what
            must be put right first.
        found: What is there, in words.
        remedy: What to do about it, with the exact command where there is one; empty when nothing
            is to be done.
        lesser: Whether it may share a line with others like it as long as it is well.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    lesser: bool = False


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
