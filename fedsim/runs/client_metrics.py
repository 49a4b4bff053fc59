"""What clients measure on their own data: each one's, and how it spreads over them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Message

from fedsim.client.job import FINETUNED, OWN, PERSONALISED
from fedsim.messages import flower_internals as internals
from fedsim.messages.adapting import stacked
from fedsim.messages.records import NUM_EXAMPLES, only_metrics

_WORST = 0.1  # the share of clients whose mean stands for the worst off
_ERRORS = ("loss", "mse", "rmse", "mae", "perplexity")  # metrics of which less is better
_OVER_MODELS = ("_mean", "_worst_decile", "_min", "_max")  # of a metric over clients or nodes


def is_error(name: str) -> bool:
    """Return whether less of a metric is better.

    Example:
        >>> is_error("test/loss"), is_error("local/rmse_mean"), is_error("test/accuracy")
        (True, True, False)
        >>> is_error("robust/loss@0.1"), is_error("local/accuracy@0.1_mean")
        (True, False)
    """
    name = name.partition("@")[0]
    for ending in _OVER_MODELS:
        name = name.removesuffix(ending)
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


def recorded_as(name: str) -> str:
    """Return under which name a run records what clients measure.

    Example:
        >>> recorded_as("loss"), recorded_as("finetuned/loss")
        ('local/loss', 'finetuned/loss')
    """
    return name if name.startswith(FINETUNED) else f"local/{name}"


def spread(replies: Iterable[Message]) -> dict[str, float]:
    """Return per metric the clients' plain mean, the worst tenth's mean, and the variance.

    The worst tenth (at least one client) has the largest values of a loss or an error and the
    smallest of anything else. Clients without samples are left out, and so are clients whose
    samples leave the metric undefined; `local/NAME_undefined` counts those, if there are any.
    """
    found: dict[str, float] = {}
    for name, column in _columns(client_metrics(replies)).items():
        if name.startswith(OWN):
            continue
        values = [value for value in column if not math.isnan(value)]
        if missing := len(column) - len(values):
            found[f"{recorded_as(name)}_undefined"] = missing
        if not values:
            continue
        ordered = np.sort(np.array(values))
        found[f"{recorded_as(name)}_mean"] = float(ordered.mean())
        found[f"{recorded_as(name)}_worst_decile"] = _worst(name, ordered)
        found[f"{recorded_as(name)}_variance"] = float(ordered.var())
    return found


def personal_spread(replies: Iterable[Message]) -> dict[str, float]:
    """Return what clients with tensors of their own measure, apart from those without any yet.

    `personal/NAME` is the plain mean over the clients that have trained, `_worst_decile` that of
    their worst tenth, `_untrained` the mean over clients that have never trained and evaluate with
    the initial tensors; `personal/clients` and `personal/clients_untrained` count both. Clients
    without samples are left out. Nothing is returned where no tensor is personal and clients have
    no model of their own. Where they have one, NAME is measured on it.
    """
    records = [_of_own(r) for r in client_metrics(replies) if r["examples"] and PERSONALISED in r]
    if not records:
        return {}
    records = [{n: v for n, v in r.items() if not n.startswith(FINETUNED)} for r in records]
    trained = [record for record in records if record[PERSONALISED]]
    untrained = [record for record in records if not record[PERSONALISED]]
    found = {
        "personal/clients": float(len(trained)),
        "personal/clients_untrained": float(len(untrained)),
    }
    for name, column in _columns(trained).items():
        if values := [value for value in column if not math.isnan(value)]:
            ordered = np.sort(np.array(values))
            found[f"personal/{name}"] = float(ordered.mean())
            found[f"personal/{name}_worst_decile"] = _worst(name, ordered)
    for name, column in _columns(untrained).items():
        if values := [value for value in column if not math.isnan(value)]:
            found[f"personal/{name}_untrained"] = float(np.sort(np.array(values)).mean())
    return found


def _of_own(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the metrics of the client's own model alone, if it has one."""
    own = {name.removeprefix(OWN): v for name, v in record.items() if name.startswith(OWN)}
    kept = ("client", "examples", PERSONALISED)
    return {**{name: record[name] for name in kept}, **own} if own else dict(record)


def _columns(records: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The values of each metric, of clients that have samples."""
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items() if record["examples"] else ():
            if name not in ("client", "examples", PERSONALISED):
                columns.setdefault(name, []).append(value)
    return columns


def _worst(name: str, ordered: np.ndarray) -> float:
    """The mean of the worst tenth of ascending values, at least one."""
    worst = max(1, int(len(ordered) * _WORST))
    return float((ordered[-worst:] if is_error(name) else ordered[:worst]).mean())
