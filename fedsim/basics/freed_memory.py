"""Memory that is freed stays with the process, so that the next tensor gets it without the system.

The system hands out fresh memory page by page, each filled with zeros first: for a cohort's
tensors that takes longer than to compute what goes into them. Needs glibc.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's `mallopt`, see malloc.h
_KEPT = 256 * 2**20  # bytes at the end of the heap that are not given back
_LARGE = 32 * 2**20  # bytes from which a tensor is asked of the system, the most that glibc takes
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB of what it frees, in tensors of up to 32 MiB.

    No number hangs on it. Variables by which a user tunes glibc (`MALLOC_TRIM_THRESHOLD_`,
    `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`) are obeyed instead.

    Returns:
        Whether it does.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # both, for glibc adapts neither once one of them is set
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
