"""The finding of one look at the machine."""

from typing import Literal, NamedTuple

State = Literal["ok", "note", "failed"]


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: What was looked at, such as "torch" or "memory".
        state: "ok"; "note" for a thing that is absent or tight and can be done without; "failed"
            for one that must be put right first.
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
