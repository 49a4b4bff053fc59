"""What tells whether a value was replaced or changed, and copies that nothing changes."""

import copy
import warnings
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.basics.generators import OWN

LARGEST = 2**27  # bytes of an array that is copied to be put back
ITEMS = 1000  # of a container that are looked at
DEPTH = 8
ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy that nothing which happens to the value changes; the value where there is none."""
    if isinstance(value, ATOMS) or _size(value) > LARGEST:
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a lock, an open file, a tensor with a history
        return value


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return value.nbytes if isinstance(value, np.ndarray) else 0


def mark_of(value: Any, depth: int = 0) -> Any:
    """What tells whether a value was replaced or changed."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, ATOMS):
        return type(value), value
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return id(value), value.tobytes()
        return id(value), zlib.crc32(np.ascontiguousarray(value).data)
    if depth == DEPTH or isinstance(value, OWN):
        return id(value)
    if isinstance(value, Mapping):
        items = [
            (mark_of(k, depth + 1), mark_of(v, depth + 1)) for k, v in [*value.items()][:ITEMS]
        ]
        return id(value), len(value), items
    if isinstance(value, list | tuple | deque):
        return id(value), len(value), [mark_of(v, depth + 1) for v in [*value][:ITEMS]]
    if isinstance(value, set | frozenset):
        return id(value), sorted(map(repr, value))[:ITEMS]
    if isinstance(value, nn.Module | type) or callable(value):
        return id(value)
    slots = _slots(value)
    if slots or hasattr(value, "__dict__"):
        return id(value), mark_of({**slots, **getattr(value, "__dict__", {})}, depth + 1)
    return id(value), _where_it_stands(value)


def _slots(value: Any) -> dict[str, Any]:
    """What an object keeps under names that its class lists."""
    names: list[str] = []
    for kind in type(value).__mro__:
        listed = vars(kind).get("__slots__", ())
        names += [listed] if isinstance(listed, str) else [*listed]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _where_it_stands(value: Any) -> str | None:
    """What tells how far an iterator of Python's has come."""
    if type(value).__module__ not in ("builtins", "itertools") or not hasattr(value, "__next__"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a later Python copies no iterators of itertools
            return repr(value.__reduce__()[1:])
    except Exception:  # a generator
        return repr(value)
