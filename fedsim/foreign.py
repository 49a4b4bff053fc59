"""State of strategies that are not fedsim's: their attributes, as plain values, never pickled.

A strategy inside another one is part of the outer one's state, whoever made it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.errors import CheckpointError
from fedsim.records import array_record, named_tensors
from fedsim.strategy import FederatedStrategy

_ARRAYS, _RECORD, _TENSORS, _JSON = "arrays:", "record:", "tensors:", "json:"
_INNER = "inner:"  # inner:NAME:KEY is the value KEY of the strategy in the attribute NAME


def nested(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy and then those inside it, from the outside in."""
    yield strategy
    if not isinstance(strategy, FederatedStrategy):
        for value in vars(strategy).values():
            if isinstance(value, Strategy):
                yield from nested(value)


def dump_state(strategy: Strategy) -> dict[str, Any]:
    """Return what a checkpoint holds of a strategy: fedsim's State, or a foreign one's attributes.

    Raises:
        CheckpointError: If an attribute is of a kind that cannot be kept although it may change.
    """
    if isinstance(strategy, FederatedStrategy):
        return {} if strategy.state is None else dict(strategy.state._asdict())
    return dump_attributes(strategy)


def load_state(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Give a strategy what `dump_state` saved."""
    if isinstance(strategy, FederatedStrategy):
        strategy.restore(state)
    else:
        load_attributes(strategy, state)


def dump_attributes(strategy: Strategy) -> dict[str, Any]:
    """Return the attributes that a checkpoint can hold: numbers, text, arrays and array records.

    What is configuration (functions, other objects) is left out: it comes from the scenario.

    Raises:
        CheckpointError: If an attribute is of a kind that cannot be kept although it may change.
    """
    state: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if value is None or isinstance(value, bool | int | float | str):
            state[name] = value
        elif isinstance(value, ArrayRecord):
            state[_RECORD + name] = named_tensors(value)
        elif _is_array(value):
            state[_ARRAYS + name] = torch.from_numpy(np.array(value))
        elif isinstance(value, Tensor) or _holds_only(value, Tensor):
            state[_TENSORS + name] = value
        elif isinstance(value, list | tuple) and value and all(_is_array(v) for v in value):
            state[_ARRAYS + name] = [torch.from_numpy(np.array(v)) for v in value]
        elif isinstance(value, Mapping) and value and all(_is_array(v) for v in value.values()):
            state[_ARRAYS + name] = {k: torch.from_numpy(np.array(v)) for k, v in value.items()}
        elif isinstance(value, Strategy):
            mine = dump_state(value).items()
            state.update({f"{_INNER}{name}:{key}": item for key, item in mine})
        elif isinstance(value, list | dict) and _is_json(value):
            state[_JSON + name] = json.dumps(value)
        elif isinstance(value, list | dict | set | bytes | bytearray):
            raise CheckpointError(
                f"{type(strategy).__name__} remembers a {type(value).__name__} in '{name}' that a "
                "checkpoint cannot hold: it holds numbers, text, arrays and lists of them"
            )
    return state


def load_attributes(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Give a strategy the attributes that `dump_attributes` saved."""
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
        load_state(getattr(strategy, attribute), values)


def _holds_only(value: Any, kind: type) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return (
        isinstance(value, dict | list) and bool(value) and all(isinstance(v, kind) for v in items)
    )


def _is_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it went, types included."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic)  # arithmetic on 0-d arrays gives scalars


def _arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: tensor.numpy() for key, tensor in value.items()}
    if isinstance(value, list):
        return [tensor.numpy() for tensor in value]
    return value.numpy()
