"""Threads of kernels, which decide bits."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """Compute with so many threads, and with those of before afterwards."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def pinned_threads() -> Iterator[None]:
    """Compute with one thread in all libraries: more change bits and slow the workers down."""
    from threadpoolctl import threadpool_limits  # what trains clients needs torch alone

    with with_threads(1), threadpool_limits(limits=1):
        yield
