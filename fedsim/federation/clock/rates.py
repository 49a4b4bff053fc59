"""How often clients are part of an aggregation on a virtual clock.

Source: Fraboni et al. 2023 (arXiv 2206.10189), section 4, for the closed forms; elsewhere the
timetable is followed without anybody training.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedsim.federation.clock.timetable import Period, Timetable

Floats = npt.NDArray[np.float64]
_LONG = 10_000  # aggregations that are followed at most


def closed_form(trigger: str, ticks: npt.NDArray[np.int64], window: int) -> Floats | None:
    """Return each client's rate where all work all the time; None where there is no formula.

    Args:
        trigger: "all", "arrival", "count" or "window".
        ticks: int64 `[N]`, how long each client's jobs take, always the same.
        window: Ticks between aggregations under "window".

    Example:
        >>> closed_form("arrival", np.array([10, 2]), 1).round(4).tolist()
        [0.1667, 0.8333]
        >>> closed_form("window", np.array([10, 2]), 5).tolist()
        [0.5, 1.0]
    """
    if trigger == "all":
        return np.ones(len(ticks))
    if trigger == "arrival":
        pace: Floats = 1 / ticks
        rates: Floats = pace / pace.sum()
    elif trigger == "window":
        rates = 1 / -(-ticks // window)
    else:
        return None
    return rates


def followed(
    timetable: Timetable,
    candidates: Callable[[int], list[int]],
    num_clients: int,
    aggregations: int,
) -> Floats:
    """Return the share of aggregations that each client is part of, float64 `[N]`.

    Args:
        timetable: At time zero; it is used up.
        candidates: Who could begin a job in a round, in the order in which they would.
        num_clients: N.
        aggregations: How many are followed, at most 10,000.
    """
    counts = np.zeros(num_clients, dtype=np.int64)
    aggregations = min(aggregations, _LONG)
    for server_round in range(1, aggregations + 1):
        period: Period = timetable.plan(server_round, candidates(server_round))
        timetable.go_to(period)
        counts[[job.client for job in period.due if not job.drops]] += 1
    rates: Floats = counts / aggregations
    return rates
