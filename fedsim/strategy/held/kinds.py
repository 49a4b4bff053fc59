"""The kinds of objects, as far as they decide how an object is written."""

import types
from typing import Any, NamedTuple

import numpy as np

from fedsim.strategy.held.trust import is_users
from fedsim.strategy.held.values import UnheldError

_HEAP_TYPE = 1 << 9  # Python's flag of classes that are made by a `class` statement


class Unheld(NamedTuple):
    """Something that a checkpoint cannot hold.

    Attributes:
        path: Where it hangs, such as `helper.stream`.
        what: What it is.
        failed: Of a strategy whose `state_dict` failed, what it is and with which error.
    """

    path: str
    what: str
    failed: str = ""


def says_what_to_keep(cls: type) -> bool:
    """Whether a class of a user's has `state_dict` and `load_state_dict` of its own."""
    return all(
        any(name in vars(each) and is_users(each.__module__) for each in cls.__mro__)
        for name in ("state_dict", "load_state_dict")
    )


def failed(value: object, method: str, error: Exception) -> str:
    """What an object is whose own method failed when it was asked what to keep."""
    return f"{name_of(value)} whose {method}() failed with {type(error).__name__}: {error}"


def reason_of(value: object, error: Exception) -> str:
    """Why a value could not be written, by the error that came of it."""
    if isinstance(error, RecursionError):
        return "objects that refer to one another too deeply"
    return str(error) if isinstance(error, UnheldError) else f"{name_of(value)} ({error!r})"


def is_python(cls: type) -> bool:
    """Whether a class adds nothing to its instances that its attributes do not show."""
    return cls is object or bool(cls.__flags__ & _HEAP_TYPE)


def root(values: np.ndarray) -> np.ndarray:
    """The array whose memory an array looks at."""
    while isinstance(values.base, np.ndarray):
        values = values.base
    return values


def address(values: np.ndarray) -> int:
    """Where an array's memory begins."""
    return int(values.__array_interface__["data"][0])


def is_whole(values: np.ndarray) -> bool:
    """Whether an array's bytes, in order, are all of it."""
    return values.flags.c_contiguous and values.dtype.names is None


def key(key: Any) -> str:
    """A dictionary's key, for a path."""
    return repr(key) if type(key) in (int, str, float, bool) else "..."


def has_own(cls: type, name: str) -> bool:
    """Whether a class has a method in place of the one that all have."""
    return getattr(cls, name) is not getattr(object, name)


def joined(path: str, name: str) -> str:
    """The path of an attribute."""
    return f"{path}.{name}" if path else name


def slots(cls: type) -> list[str]:
    """The names of a class's slots."""
    found: list[str] = []
    for each in reversed(cls.__mro__):
        slots = each.__dict__.get("__slots__", ())
        names = [slots] if isinstance(slots, str) else list(slots)
        found += [_mangled(name, each) for name in names]
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _mangled(name: str, cls: type) -> str:
    """A slot's name as an attribute: Python puts the class before private names."""
    private = name.startswith("__") and not name.endswith("__")
    return f"_{cls.__name__.lstrip('_')}{name}" if private else name


def is_empty(cell: Any) -> bool:
    """Whether a closure's variable is not set yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def classes_of(function: types.FunctionType) -> list[type]:
    """The class in whose body a function was written, as far as it can be told."""
    found: Any = function.__globals__
    for part in function.__qualname__.split(".")[:-1]:
        found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    return [found] if isinstance(found, type) else []


def name_of(value: Any) -> str:
    """What an object is, in words."""
    if isinstance(value, type | types.FunctionType):
        return f"the function {value.__qualname__}"
    kind = type(value).__name__
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"
