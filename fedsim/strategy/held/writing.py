"""An object and all that it refers to, as a graph of JSON nodes and tensors.

A value is itself (None, numbers, text) or `{"@": i}`, the i-th node: what two places refer to is
one node, and is one object again when it is read.
"""

import array
import collections
import concurrent.futures
import enum
import functools
import io
import itertools
import logging
import random
import re
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.strategy.base import FederatedStrategy, state_fields
from fedsim.strategy.held import values
from fedsim.strategy.held.kinds import (
    Unheld,
    address,
    classes_of,
    failed,
    has_own,
    is_empty,
    is_python,
    is_whole,
    joined,
    key,
    name_of,
    reason_of,
    root,
    says_what_to_keep,
    slots,
)
from fedsim.strategy.held.trust import Known, is_users, label_of
from fedsim.strategy.held.values import UnheldError

# what has no state that could decide a later round, or is given anew in every round
_STATELESS = (
    logging.Logger, logging.Handler, type(threading.Lock()), type(threading.RLock()), re.Pattern,
    weakref.ref, types.ModuleType, concurrent.futures.Executor, threading.Thread, Grid, np.ufunc,
    type(NotImplemented), type(Ellipsis), random.SystemRandom,
)  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodWrapperType, type)
_RECORDS = {cls: cls.__name__ for cls in (ArrayRecord, MetricRecord, ConfigRecord, RecordDict)}
_SPARE = 2**20  # bytes that are held with a view although it does not show them
_MOST = 1_000_000  # nodes; what holds more is no memory of a strategy


class Writer:
    """Writes values into one graph.

    Args:
        known: The classes and functions that a reader will find by name.
        fixed: What had no name but was there before round 1, by its path: it will be there again
            in a new object. None takes all for such.
        comparing: Whether attributes without state are left out: a new object may lack them.
    """

    def __init__(
        self, known: Known, fixed: Mapping[str, object] | None = None, *, comparing: bool = False
    ) -> None:
        self._known, self._before, self._comparing = known, fixed, comparing
        self.nodes: list[Any] = []
        self.tensors: list[Tensor] = []
        self.paths: dict[int, str] = {}  # of the nodes that `write` was called for
        self.unheld: list[Unheld] = []
        self.fixed: dict[str, object] = {}
        self.classes: set[type] = set()
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []  # no other object may get their ids meanwhile
        self._memories: dict[int, int] = {}  # where a tensor's memory begins, and its node
        self._arrays: set[int] = set()  # where an array's memory begins
        self._alone: dict[int, int] = {}  # views that are held without what they look at

    def write(self, value: Any, path: str) -> Any:
        """Return a value as JSON; what it refers to becomes nodes."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        place = self._seen.get(id(value))
        if place is None:
            place = self._place(value)
            self.paths[place] = path
            try:
                self.nodes[place] = self._node(value, path)
            except Exception as error:  # of the user's own code too, such as a property
                self.unheld.append(Unheld(path, reason_of(value, error)))
        return {"@": place}

    def code(self) -> list[Any]:
        """The functions, methods and classes among what was written."""
        return [each for each in self._alive if isinstance(each, (*_FUNCTIONS, types.MethodType))]

    def _place(self, value: object) -> int:
        if len(self.nodes) >= _MOST:
            raise UnheldError(f"more than {_MOST} objects")
        self.nodes.append(["nothing"])
        self._alive.append(value)
        self._seen[id(value)] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def _node(self, value: Any, path: str) -> list[Any]:
        kind = type(value)
        if kind in values.PLAIN:
            name, give, _ = values.PLAIN[kind]
            return ["plain", name, give(value)]
        for types_of, write in _WRITERS:
            if isinstance(value, types_of):
                return write(self, value, path)
        return self._object(value, path)

    # --- numbers --------------------------------------------------------------------------

    def _blob(self, content: Tensor) -> int:
        self.tensors.append(content.detach())
        return len(self.tensors) - 1

    def _array(self, value: np.ndarray, path: str) -> list[Any]:
        if type(value) is not np.ndarray:
            raise UnheldError(f"a {type(value).__name__}")
        if value.dtype == object and not value.dtype.names:
            items = self.write(value.ravel().tolist(), path)
            return ["objects", list(value.shape), items]
        whole = root(value)
        if whole is not value:
            if whole.nbytes <= _SPARE + 4 * value.nbytes and is_whole(whole):
                start = address(value) - address(whole)
                laid = [value.dtype.str, list(value.shape), list(value.strides), start]
                return ["view", self.write(whole, path), laid]
            if self._alone.setdefault(id(whole), id(value)) != id(value):
                raise UnheldError("a view of a much larger array (give it .copy())")
            self._alive.append(whole)
        if value.size and address(value) in self._memories:
            raise UnheldError("an array that shares its memory with a tensor (give it .copy())")
        about, content = values.pack_array(value)
        self._arrays.add(address(value))
        return ["array", about, self._blob(content)]

    def _scalar(self, value: np.generic, path: str) -> list[Any]:
        about, content = values.pack_array(np.asarray(value))
        return ["scalar", about, self._blob(content)]

    def _tensor(self, value: Tensor, path: str) -> list[Any]:
        values.check_tensor(value)
        storage = value.untyped_storage()
        first = storage.data_ptr()
        if first in self._arrays:
            raise UnheldError("a tensor that shares its memory with an array (give it .clone())")
        if storage.nbytes() > _SPARE + 4 * value.nbytes:
            if self._alone.setdefault(first, id(value)) != id(value):
                raise UnheldError("a view of a much larger tensor (give it .clone())")
            lone = value.detach().clone(memory_format=torch.contiguous_format)
            memory = self._memory(lone)
            laid = [list(lone.shape), list(lone.stride()), 0]
        else:
            if first not in self._memories:
                self._memories[first] = self._memory(value)
            memory = self._memories[first]
            laid = [list(value.shape), list(value.stride()), value.storage_offset()]
        parameter = isinstance(value, torch.nn.Parameter)
        grad = self.write(value.grad, f"{path}.grad") if value.is_leaf else None
        needs = value.requires_grad
        return ["tensor", {"@": memory}, str(value.dtype), laid, parameter, needs, grad]

    def _memory(self, tensor: Tensor) -> int:
        content = self._blob(values.storage_bytes(tensor))
        self.nodes.append(["memory", str(tensor.device), content])
        return len(self.nodes) - 1

    # --- generators -----------------------------------------------------------------------

    def _bits(self, value: Any, path: str) -> list[Any]:
        name, seeds, state = values.pack_bits(value)
        return ["bits", name, seeds, self.write(state, path)]

    def _generator(self, value: np.random.Generator, path: str) -> list[Any]:
        return ["generator", self.write(value.bit_generator, path)]

    def _random_state(self, value: np.random.RandomState, path: str) -> list[Any]:
        return ["random state", self.write(value.get_state(legacy=False), path)]

    def _python_random(self, value: random.Random, path: str) -> list[Any]:
        if type(value) is not random.Random:
            raise UnheldError(f"a {type(value).__name__}")
        return ["random", self.write(value.getstate(), path)]

    def _torch_generator(self, value: torch.Generator, path: str) -> list[Any]:
        return ["torch generator", str(value.device), self._blob(value.get_state().clone())]

    # --- containers -----------------------------------------------------------------------

    def _class(self, value: Any) -> str:
        self.classes.add(type(value))
        return label_of(type(value))

    def _list(self, value: list[Any], path: str) -> list[Any]:
        return ["list", [self.write(v, f"{path}[{i}]") for i, v in enumerate(value)]]

    def _sequence(self, value: list[Any], path: str) -> list[Any]:
        items = self._list(value, path)[1]
        return ["sequence", self._makeable(value, path), items, self._attributes(value, path)]

    def _tuple(self, value: tuple[Any, ...], path: str) -> list[Any]:
        items = [self.write(v, f"{path}[{i}]") for i, v in enumerate(value)]
        if type(value) is tuple:
            return ["tuple", items]
        if not hasattr(value, "_fields"):
            raise UnheldError(f"a {type(value).__name__}")
        return ["named tuple", self._makeable(value, path), items]

    def _mapping(self, value: dict[Any, Any], path: str) -> list[Any]:
        items = [
            [self.write(k, f"{path} (a key)"), self.write(v, f"{path}[{key(k)}]")]
            for k, v in value.items()
        ]
        if type(value) is dict:
            return ["dict", items]
        default = getattr(value, "default_factory", None)
        return ["mapping", self._makeable(value, path), items, self.write(default, path),
                self._attributes(value, path)]  # fmt: skip

    def _set(self, value: Any, path: str) -> list[Any]:
        items = sorted(value, key=lambda v: (type(v).__name__, repr(v)))
        name = "frozenset" if isinstance(value, frozenset) else "set"
        if type(value) not in (set, frozenset):
            raise UnheldError(f"a {type(value).__name__}")
        return [name, [self.write(v, f"{path} (a member)") for v in items]]

    def _deque(self, value: Any, path: str) -> list[Any]:
        if type(value) is not collections.deque:
            raise UnheldError(f"a {type(value).__name__}")
        items = [self.write(v, f"{path}[{i}]") for i, v in enumerate(value)]
        return ["deque", items, value.maxlen]

    def _record(self, value: Any, path: str) -> list[Any]:
        name = _RECORDS.get(type(value))
        if name is None:
            raise UnheldError(f"a {type(value).__name__}")
        items = [[k, self.write(v, f"{path}[{k!r}]")] for k, v in value.items()]
        return ["record", name, items]

    def _flower_array(self, value: Array, path: str) -> list[Any]:
        about, content = values.pack_flower_array(value)
        return ["flower array", about, self._blob(content)]

    # --- what has a name ------------------------------------------------------------------

    def _member(self, value: enum.Enum, path: str) -> list[Any]:
        return ["member", self._makeable(value, path), value.name]

    def _numpy_dtype(self, value: Any, path: str) -> list[Any]:
        return ["numpy dtype", value.str]

    def _stateless(self, value: Any, path: str) -> list[Any]:
        self.fixed[path] = value
        return ["fixed", type(value).__name__]

    def _file(self, value: Any, path: str) -> list[Any]:
        # where it writes, nobody reads: a log
        in_memory = isinstance(value, io.StringIO | io.BytesIO)
        if in_memory or value.closed or value.readable():
            raise UnheldError(f"an open file ({type(value).__name__})")
        return self._stateless(value, path)

    def _method(self, value: Any, path: str) -> list[Any]:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            return self._named(value, path)
        return ["method", self.write(owner, f"{path}.__self__"), value.__name__]

    def _named(self, value: Any, path: str) -> list[Any]:
        label = label_of(value)
        if self._known.find(label) is None:
            self._hold_fast(value, path, getattr(value, "__code__", value))
        return ["named", label]

    def _hold_fast(self, value: Any, path: str, identity: object) -> None:
        """Take something that cannot be made anew for what it was before round 1.

        Raises:
            UnheldError: If it was not there.
        """
        self.fixed[path] = identity
        if self._before is not None and self._before.get(path) is not identity:
            now = "has changed since round 0" if path in self._before else "came after round 0"
            raise UnheldError(f"{name_of(value)}, which {now}")

    def _function(self, value: types.FunctionType, path: str) -> list[Any]:
        named = self._named(value, path)
        if not is_users(value.__module__ or ""):
            return named
        self.classes.update(classes_of(value))
        pairs = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        cells = [
            None if is_empty(c) else [self.write(c.cell_contents, f"{path}.{n}")] for n, c in pairs
        ]
        defaults = self.write(value.__defaults__, f"{path} (defaults)")
        keywords = self.write(value.__kwdefaults__, f"{path} (defaults)")
        own = [[k, self.write(v, f"{path}.{k}")] for k, v in vars(value).items()]
        return ["function", named[1], cells, defaults, keywords, own]

    def _partial(self, value: Any, path: str) -> list[Any]:
        parts = [self.write(p, path) for p in (value.func, value.args, value.keywords)]
        return ["partial", *parts]

    # --- objects --------------------------------------------------------------------------

    def _makeable(self, value: Any, path: str) -> str:
        """The label of an object's class, which a reader must be able to make anew."""
        label = self._class(value)
        if self._known.find(label) is None:
            self._hold_fast(value, path, type(value))
        return label

    def _strategy(self, value: FederatedStrategy, path: str) -> list[Any]:
        label = self._makeable(value, path)
        fields = {k: self.write(v, f"{path}.state.{k}") for k, v in state_fields(value).items()}
        return ["strategy", label, list(fields.items())]

    def _object(self, value: Any, path: str) -> list[Any]:
        cls = type(value)
        if says_what_to_keep(cls):
            return ["said", self._makeable(value, path), self.asked(value, "state_dict", path)]
        if has_own(cls, "__getstate__") and hasattr(cls, "__setstate__"):
            state = self.asked(value, "__getstate__", path)
            return ["stated", self._makeable(value, path), state]
        if not all(map(is_python, cls.__mro__)) or not (hasattr(value, "__dict__") or slots(cls)):
            raise UnheldError(name_of(value))
        if has_own(cls, "__reduce__") and not is_users(cls.__module__):
            raise UnheldError(name_of(value))  # more than its attributes
        label = self._makeable(value, path)
        return ["object", label, self._attributes(value, path), self._in_slots(value, path)]

    def asked(self, value: Any, method: str, path: str) -> Any:
        """Write what a method of the object's own says is to be kept."""
        try:
            said = getattr(value, method)()
        except Exception as error:
            raise UnheldError(failed(value, method, error)) from error
        return self.write(said, path)

    def _attributes(self, value: Any, path: str) -> list[Any]:
        named = getattr(value, "__dict__", {})
        return [
            [k, self.write(v, joined(path, k))]
            for k, v in list(named.items())
            if not (self._comparing and isinstance(v, _STATELESS))
        ]

    def _in_slots(self, value: Any, path: str) -> list[Any]:
        return [
            [name, self.write(getattr(value, name), joined(path, name))]
            for name in slots(type(value))
            if hasattr(value, name)
        ]


_WRITERS: tuple[tuple[Any, Callable[[Writer, Any, str], list[Any]]], ...] = (
    (np.ndarray, Writer._array),
    (np.generic, Writer._scalar),
    (Tensor, Writer._tensor),
    (_STATELESS, Writer._stateless),
    (np.random.Generator, Writer._generator),
    (np.random.BitGenerator, Writer._bits),
    (np.random.RandomState, Writer._random_state),
    (itertools.count, lambda w, v, p: ["count", values.pack_count(v)]),
    (array.array, lambda w, v, p: ["numbers", v.typecode, v.tolist()]),
    (types.SimpleNamespace, lambda w, v, p: ["namespace", w._attributes(v, p)]),
    (np.random.SeedSequence, lambda w, v, p: ["seeds", values.pack_seeds(v)]),
    (random.Random, Writer._python_random),
    (torch.Generator, Writer._torch_generator),
    (np.dtype, Writer._numpy_dtype),
    (Array, Writer._flower_array),
    (tuple(_RECORDS), Writer._record),
    (enum.Enum, Writer._member),
    (list, lambda w, v, p: w._list(v, p) if type(v) is list else w._sequence(v, p)),
    (tuple, Writer._tuple),
    (dict, Writer._mapping),
    ((set, frozenset), Writer._set),
    (collections.deque, Writer._deque),
    (io.IOBase, Writer._file),
    (functools.partial, Writer._partial),
    (types.FunctionType, Writer._function),
    ((types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType), Writer._method),
    (_FUNCTIONS, Writer._named),
    (FederatedStrategy, Writer._strategy),
)  # fmt: skip
