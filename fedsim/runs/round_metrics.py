"""What is recorded of a round: metrics by name, `phase/name`."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message, MetricRecord
from flwr.serverapp import Grid

from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages.adapting import stacked
from fedsim.messages.failures import Failure
from fedsim.messages.records import NUM_EXAMPLES
from fedsim.runs.policy import missing
from fedsim.scenario.expectations import failed_by

_log = logging.getLogger("fedsim")


def strategy_metrics(trained: MetricRecord | None, replies: Iterable[Message]) -> dict[str, Any]:
    """Return a strategy's metrics: `train/` when clients measured them, else `server/`."""
    named: dict[str, Any] = {}
    stack = stacked(replies)
    measured = set() if stack is None else {*stack.metrics, NUM_EXAMPLES}
    for name, value in (trained or {}).items():
        if isinstance(value, int | float):
            phase = "train" if name in measured or not measured else "server"
            named[f"{phase}/{name.replace('-', '_')}"] = value
    return named


def participation_metrics(selected: Sequence[int], failures: Sequence[Failure]) -> dict[str, int]:
    """Return how many clients were selected, replied and failed, and how they failed."""
    causes = Counter(failure.cause for failure in failures)
    absent = causes.pop("absent", 0)
    counted = {f"clients/{failed_by(cause)}": count for cause, count in sorted(causes.items())}
    return {
        "clients/selected": len(selected),
        "clients/replied": len(set(selected) - missing(failures)),
        "clients/absent": absent,
        "clients/failed": sum(causes.values()),
        **counted,
    }


def beyond_what_is_borne(metrics: Mapping[str, Any], server_round: int) -> dict[str, int]:
    """Return how many more clients attacked than the round's rule bears, where both are known."""
    attackers, borne = metrics.get("clients/byzantine"), metrics.get("server/num_byzantine")
    if attackers is None or borne is None:
        return {}
    more = max(0, int(attackers) - int(borne))
    if more:
        _log.info(
            "round %d: %d clients attacked, and the rule bears %d", server_round, attackers, borne
        )
    return {"clients/byzantine_beyond_f": more}


def traffic(grid: Grid, prefix: str = "") -> dict[str, int]:
    """Return the bytes that went to clients and came back since this was last asked.

    Args:
        grid: The grid, with its wrappers; without one that counts nothing is known.
        prefix: What the names begin with, such as "evaluate_".
    """
    while isinstance(grid, GridWrapper):
        if isinstance(grid, ByteCountingGrid):
            down, up = grid.take()
            return {f"comm/{prefix}downlink_bytes": down, f"comm/{prefix}uplink_bytes": up}
        grid = grid.inner
    return {}
