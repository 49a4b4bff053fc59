"""How many processes this machine has room for."""

from pathlib import Path

from fedsim.basics.machine import available_memory

ASSUMED = 2**30  # bytes of a process that has not said yet what it needs
_SPARE = 1.25  # so much more than the largest process seen must be free for another


def has_room(largest: int, starting: int, *, root: Path = Path("/")) -> bool:
    """Return whether memory is left for one more process.

    Args:
        largest: The most bytes that a process of this kind has had; 0 when none has ended a run.
        starting: Processes that have been started and have not taken their memory yet.
        root: Where `proc` and `sys` are.
    """
    free = available_memory(root)
    return free is None or free >= _SPARE * max(largest, ASSUMED) * (starting + 1)
