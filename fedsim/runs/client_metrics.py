"""What clients measure on their own data: each one's, and how it spreads over them."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import Message

from fedsim.messages import flower_internals as internals
from fedsim.messages.adapting import stacked
from fedsim.messages.records import NUM_EXAMPLES, only_metrics

_WORST = 0.1  # the share of clients whose mean stands for the worst off
_ERRORS = ("loss", "mse", "rmse", "mae", "perplexity")  # metrics of which less is better


def is_error(name: str) -> bool:
    """Return whether less of a metric is better.

    Example:
        >>> is_error("test/loss"), is_error("robust/loss@0.1"), is_error("test/accuracy")
        (True, True, False)
    """
    name = name.partition("@")[0]
    return name.rpartition("/")[2].rpartition("_")[2] in _ERRORS or name.endswith("loss")


def client_metrics(replies: Iterable[Message]) -> Iterator[dict[str, Any]]:
    """Yield one record per client that answered: `client`, `examples` and its metrics by name.

    Of a client without samples there are no metrics; a metric that its samples do not define is
    nan.
    """
    stack = stacked(replies)
    ids = None if stack is None else stack.client_ids.tolist()
    for place, message in enumerate(replies):
        metrics = only_metrics(message.content) if message.has_content() else None
        if metrics is None:
            continue
        node = message.metadata.src_node_id
        client = internals.client_of(node) if ids is None else ids[place]
        examples = metrics.get(NUM_EXAMPLES)
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if examples and name != NUM_EXAMPLES and isinstance(value, int | float)
        }
        yield {"client": client, "examples": examples, **numbers}


def spread(replies: Iterable[Message]) -> dict[str, float]:
    """Return per metric the clients' plain mean, the worst tenth's mean, and the variance.

    The worst tenth (at least one client) has the largest values of a loss or an error and the
    smallest of anything else. Clients without samples are left out, and so are clients whose
    samples leave the metric undefined; `local/NAME_undefined` counts those, if there are any.
    """
    columns: dict[str, list[float]] = {}
    for record in client_metrics(replies):
        for name, value in record.items() if record["examples"] else ():
            if name not in ("client", "examples"):
                columns.setdefault(name, []).append(value)
    found: dict[str, float] = {}
    for name, column in columns.items():
        values = [value for value in column if not math.isnan(value)]
        if missing := len(column) - len(values):
            found[f"local/{name}_undefined"] = missing
        if not values:
            continue
        ordered = np.sort(np.array(values))
        worst = max(1, int(len(ordered) * _WORST))
        tail = ordered[-worst:] if is_error(name) else ordered[:worst]
        found[f"local/{name}_mean"] = float(ordered.mean())
        found[f"local/{name}_worst_decile"] = float(tail.mean())
        found[f"local/{name}_variance"] = float(ordered.var())
    return found
