"""How many processes this machine has room for."""

import os
from pathlib import Path

from fedsim.cli.doctor.machine import available_memory, processor_quota

ASSUMED = 2**30  # bytes of a process that has not said yet what it needs
_SPARE = 1.25  # so much more than the largest process seen must be free for another


def usable_processors(root: Path = Path("/")) -> int:
    """Return how many processors this process may use, quotas of control groups included."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = processor_quota(root)
    return max(1, min(count or 1, int(quota) if quota is not None else count or 1))


def has_room(largest: int, starting: int, *, root: Path = Path("/")) -> bool:
    """Return whether memory is left for one more process.

    Args:
        largest: The most bytes that a process of this kind has had; 0 when none has ended a run.
        starting: Processes that have been started and have not taken their memory yet.
        root: Where `proc` and `sys` are.
    """
    free = available_memory(root)
    return free is None or free >= _SPARE * max(largest, ASSUMED) * (starting + 1)
