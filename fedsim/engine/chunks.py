"""Which clients of a cohort share a chunk: a function of the cohort and of the plan alone."""

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Way = Literal["even", "alike"]


def deal(
    samples: Sequence[int] | npt.NDArray[np.int64], size: int, way: Way
) -> list[tuple[int, ...]]:
    """Divide a cohort into chunks of `size` clients, the last one of those that are left.

    The chunks depend on the cohort alone, whoever drops out or fails, and their lengths do not
    depend on the samples. Clients that all hold as many are divided in their order.

    Args:
        samples: How many each client holds, in client order.
        size: Clients per chunk, at least 1.
        way: "even" gives every chunk about as many samples, for clients that wait for nobody in
            their chunk: two by two, for a step of one costs nearly that of two, those that hold
            most go where least has been dealt. "alike" puts clients beside others of their size,
            for those that are padded to the longest.

    Returns:
        For each chunk its clients' places in the cohort, ascending.

    Example:
        >>> deal([9, 2, 2, 8, 2, 2], 3, "even"), deal([9, 1, 8, 2], 2, "alike")
        ([(0, 3, 5), (1, 2, 4)], [(0, 2), (1, 3)])
    """
    held = np.asarray(samples, dtype=np.int64)
    firsts = range(0, len(held), size)
    if not len(held) or (held == held[0]).all():
        return [tuple(range(first, min(first + size, len(held)))) for first in firsts]
    order = np.argsort(-held, kind="stable").tolist()
    if way == "alike":
        return [tuple(sorted(order[first : first + size])) for first in firsts]
    room = [min(size, len(held) - first) for first in firsts]
    chunks: list[list[int]] = [[] for _ in room]
    loads = [(0, chunk) for chunk in range(len(room))]  # a heap of those that have room
    dealt = 0
    while dealt < len(order):
        load, chosen = heapq.heappop(loads)
        pair = order[dealt : dealt + min(2, room[chosen] - len(chunks[chosen]))]
        dealt += len(pair)
        chunks[chosen] += pair
        if len(chunks[chosen]) < room[chosen]:
            heapq.heappush(loads, (load + int(held[pair].sum()), chosen))
    return [tuple(sorted(chunk)) for chunk in chunks]
