"""The places where a user's objects and torch's layers keep something, see `KeptState`."""

import operator
import types
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from fedsim.basics.marks import ATOMS

# attributes of torch's own layers that are looked at: what else they keep is torch's affair
_PLAIN = (*ATOMS, tuple, list, dict, set, deque, np.ndarray)
INTERNAL = frozenset(nn.Module().__dict__) | {"_parameters", "_buffers", "_modules"}
DEFAULTS = ("__defaults__", "__kwdefaults__")
CELL = "cell_contents"
NOTHING = types.SimpleNamespace()


class KeptPlace(NamedTuple):
    """Something that may change: where it is kept, and what it is called.

    Attributes:
        owner: The object, class or module that keeps it.
        name: Its name there.
        shown: What to call it, such as "'steps' of Counter".
    """

    owner: Any
    name: str
    shown: str

    @property
    def key(self) -> tuple[int, str]:
        """What it is found by: an owner may have no hash."""
        return id(self.owner), self.name

    def get(self) -> Any:
        """What is there, or `NOTHING`."""
        if self.name in (*DEFAULTS, CELL):
            return getattr(self.owner, self.name, NOTHING)
        return vars(self.owner).get(self.name, NOTHING)

    def put(self, value: Any) -> None:
        """Put a value there, or take away what is there."""
        if self.name in (*DEFAULTS, CELL):
            setattr(self.owner, self.name, value)
            return
        into = vars(self.owner)
        if value is NOTHING:
            into.pop(self.name, None)
        elif isinstance(self.owner, type):
            setattr(self.owner, self.name, value)
        else:
            into[self.name] = value


class LayerWas(NamedTuple):
    """A layer of torch's as it was, for a quick look whether it still is.

    Attributes:
        attributes: How many attributes it had.
        names: Those that are looked at.
        values: What they were.
        keys: What their places are found by.
        quick: Whether none of the values can change itself.
    """

    attributes: int
    names: tuple[str, ...]
    values: tuple[Any, ...]
    keys: tuple[tuple[int, str], ...]
    quick: bool

    @classmethod
    def of(cls, path: str, layer: nn.Module) -> "LayerWas":
        """A layer as it is now."""
        places = list(of_layer(path, layer))
        values = tuple(place.get() for place in places)
        flat = (each for v in values for each in (v if isinstance(v, tuple) else (v,)))
        quick = all(isinstance(each, ATOMS) for each in flat)
        names, keys = tuple(p.name for p in places), tuple(p.key for p in places)
        return cls(len(vars(layer)), names, values, keys, quick)

    def still(self, layer: nn.Module) -> bool:
        """Whether it is certainly as it was."""
        now = vars(layer)
        if not self.quick or len(now) != self.attributes:
            return False
        return all(map(operator.is_, map(now.get, self.names), self.values))


def of_layer(path: str, layer: nn.Module) -> Iterator[KeptPlace]:
    """The attributes of a layer of torch's that are looked at."""
    for name, value in vars(layer).items():
        if name in INTERNAL or name.startswith("_flat_weight"):
            continue
        if isinstance(value, _PLAIN):
            yield KeptPlace(layer, name, f"'{name}' of {type(layer).__name__} '{path}'")
