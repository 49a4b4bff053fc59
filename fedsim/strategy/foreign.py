"""State of strategies for checkpoints: fedsim's State, or what a foreign strategy remembers.

A strategy inside another one is part of the outer one's state. How it is held is said in
`fedsim.strategy.held`; older checkpoints are read too.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsim.basics.errors import CheckpointError
from fedsim.messages.records import array_record
from fedsim.strategy.adapter import is_ours
from fedsim.strategy.held.kinds import Unheld
from fedsim.strategy.held.strategies import GRAPH, Held, StrategyMemory

_ARRAYS, _RECORD, _TENSORS, _JSON = "arrays:", "record:", "tensors:", "json:"
_LONG = 100  # characters of a path that are shown
_INNER = "inner:"  # inner:NAME:KEY is the value KEY of the strategy in the attribute NAME


_LOOKED_INTO = 100  # entries: what is longer holds numbers or clients, and no strategies


def nested(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy and then those inside it, each once, from the outside in.

    Those are found in its attributes, and in small dictionaries, lists and tuples there.
    """
    waiting: deque[Any] = deque([strategy])
    seen: set[int] = set()
    while waiting:
        each = waiting.popleft()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Strategy):
            yield each
            if not is_ours(each):
                waiting += vars(each).values()
        elif isinstance(each, Mapping | list | tuple) and len(each) <= _LOOKED_INTO:
            waiting += each.values() if isinstance(each, Mapping) else each


def dump_attributes(strategy: Strategy) -> dict[str, Any]:
    """Return what a checkpoint holds of a strategy.

    Raises:
        CheckpointError: If something of it cannot be held, naming the attribute.
    """
    held: Held = StrategyMemory(strategy).hold()
    for each in held.unheld:
        raise CheckpointError(why_unheld(strategy, each))
    return held.state


def load_attributes(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Give a strategy what a checkpoint holds of it.

    Raises:
        CheckpointError: If something of it cannot be made here.
    """
    if GRAPH in state or is_ours(strategy):
        StrategyMemory(strategy).restore(state)
    else:
        _load_attributes(strategy, state)


def why_unheld(strategy: Strategy, unheld: Unheld) -> str:
    """Say what a checkpoint cannot hold, and the way out."""
    name = type(strategy).__name__
    if unheld.failed:
        return f"{unheld.failed}, so that a checkpoint cannot hold what {name} remembers"
    path = unheld.path if len(unheld.path) < _LONG else f"{unheld.path[:_LONG]}..."
    where = f" in '{path}'" if path else ""
    return (
        f"{name} remembers {unheld.what}{where}, which a checkpoint cannot hold; to say what is to "
        f"be kept, give {name} the methods state_dict() and load_state_dict(state)"
    )


def _load_attributes(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Read attributes as checkpoints of fedsim 0.1 hold them, one by one."""
    inner: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        if name.startswith(_INNER):
            attribute, _, key = name.removeprefix(_INNER).partition(":")
            inner.setdefault(attribute, {})[key] = value
        elif name.startswith(_RECORD):
            setattr(strategy, name.removeprefix(_RECORD), array_record(value))
        elif name.startswith(_ARRAYS):
            setattr(strategy, name.removeprefix(_ARRAYS), _arrays(value))
        elif name.startswith(_TENSORS):
            setattr(strategy, name.removeprefix(_TENSORS), value)
        elif name.startswith(_JSON):
            setattr(strategy, name.removeprefix(_JSON), json.loads(value))
        else:
            setattr(strategy, name, value)
    for attribute, values in inner.items():
        load_attributes(getattr(strategy, attribute), values)


def _arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: tensor.numpy() for key, tensor in value.items()}
    if isinstance(value, list):
        return [tensor.numpy() for tensor in value]
    return value.numpy()
