"""State of a user's objects beside the tensors of a model, put back for every client.

One model, one procedure and one task serve all clients of a process. Anything they keep that is no
parameter and no buffer of the model's layout (attributes, buffers that are not saved, attributes of
their classes, variables of their modules) would go on from client to client. Here it is put back as
it was when they were made. Needs torch and numpy.
"""

import copy
import inspect
import sys
import types
import warnings
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.basics.generators import OWN
from fedsim.basics.project import installed

_LARGEST = 2**27  # bytes of an array that is copied to be put back
_ITEMS = 1000  # of a container that are looked at
_DEPTH = 8
_ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_INTERNAL = frozenset(nn.Module().__dict__) | {"_parameters", "_buffers", "_modules"}
_DEFAULTS = ("__defaults__", "__kwdefaults__")
_CELL = "cell_contents"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KNOWN = ("torch", "numpy", "fedsim", "clients", "strategies", "flwr", "builtins", "abc", "typing")


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
        """What is there, or `_NOTHING`."""
        if self.name in (*_DEFAULTS, _CELL):
            return getattr(self.owner, self.name, _NOTHING)
        return vars(self.owner).get(self.name, _NOTHING)

    def put(self, value: Any) -> None:
        """Put a value there, or take away what is there."""
        if self.name in (*_DEFAULTS, _CELL):
            setattr(self.owner, self.name, value)
            return
        into = vars(self.owner)
        if value is _NOTHING:
            into.pop(self.name, None)
        elif isinstance(self.owner, type):
            setattr(self.owner, self.name, value)
        else:
            into[self.name] = value


class KeptState:
    """What some objects keep beside the tensors of a model, as it was when this was made.

    Args:
        roots: The objects. Of a module all parts are looked at.
        saved: Names of the buffers that travel with the model, as the module among them has them.

    Attributes:
        generators: Generators among what is kept; they are for `seed_all`, and not put back.
    """

    def __init__(self, roots: Sequence[Any], saved: Collection[str] = ()) -> None:
        parts = [part for root in roots for part in _parts(root)]
        self._owners = [each for each in parts if _kinds(each)]
        kinds = dict.fromkeys(kind for each in self._owners for kind in _kinds(each))
        hooks = [hook for part in parts for hook in _hooks(part)]
        places = [*self._attributes(), *_of_classes(kinds), *_of_modules(kinds, hooks)]
        self._places = {place.key: place for place in places}
        first = {key: place.get() for key, place in self._places.items()}
        self.generators = _generators(first.values())
        self._shared = {id(each): each for each in (*_not_copied(parts), *self.generators)}
        memo = dict(self._shared)
        self._pristine = {key: _copy(value, memo) for key, value in first.items()}
        self._buffers = [
            (module, name, None if buffer is None else buffer.detach().clone())
            for root in roots
            for module, name, buffer in _unsaved(root, saved)
        ]
        mine = {(id(module), name) for module, name, _ in self._buffers}
        self._tables = [
            (owner, shown, table, {n: v for n, v in table.items() if (id(owner), n) not in mine})
            for owner in parts
            if isinstance(owner, nn.Module)
            for shown, table in _tables(owner)
        ]
        self._mark()

    def moved(self) -> list[str]:
        """Name what is not as it was."""
        places = self._places | {place.key: place for place in self._attributes()}
        found = [p.shown for key, p in places.items() if _mark(p.get()) != self._marks.get(key)]
        for (module, name, _), mark in zip(self._buffers, self._buffer_marks, strict=True):
            if _mark(module._buffers.get(name)) != mark:
                found.append(f"the unsaved buffer '{name}' of {type(module).__name__}")
        for owner, shown, table, before in self._tables:
            # what `functional_call` swaps is another tensor at times, and no matter
            odd = (table.keys() ^ before.keys()) - self._unsaved(owner)
            if shown == "layer":
                odd |= {n for n, layer in table.items() if layer is not before.get(n)}
            found += [f"the {shown} '{name}' of {type(owner).__name__}" for name in sorted(odd)]
        return found

    def put_back(self) -> None:
        """Put everything back; cheap where nothing has moved."""
        has_moved = bool(self.moved())
        for owner, _, table, before in self._tables:
            if any(table.get(name) is not value for name, value in before.items()):
                table.update(before)
            for name in table.keys() - before.keys() - self._unsaved(owner):
                del table[name]
        if not has_moved:
            return
        for place in [*self._attributes()]:
            if place.key not in self._places:
                place.put(_NOTHING)
        memo = dict(self._shared)
        for key, place in self._places.items():
            place.put(_copy(self._pristine[key], memo))
        for module, name, first in self._buffers:
            module._buffers[name] = None if first is None else first.clone()
        self._mark()

    def _unsaved(self, owner: nn.Module) -> set[str]:
        return {name for module, name, _ in self._buffers if module is owner}

    def _mark(self) -> None:
        self._marks = {key: _mark(place.get()) for key, place in self._places.items()}
        self._buffer_marks = [_mark(m._buffers.get(n)) for m, n, _ in self._buffers]

    def _attributes(self) -> Iterator[KeptPlace]:
        for owner in self._owners:
            internal = _INTERNAL if isinstance(owner, nn.Module) else ()
            for name in vars(owner):
                if name not in internal and not name.startswith("_flat_weight"):
                    yield KeptPlace(owner, name, f"'{name}' of {type(owner).__name__}")


_NOTHING = types.SimpleNamespace()


def _parts(root: Any) -> list[Any]:
    """An object and the modules that it holds."""
    if isinstance(root, nn.Module):
        return list(root.modules())
    held = [each for each in getattr(root, "__dict__", {}).values() if isinstance(each, nn.Module)]
    return [root, *(part for each in held for part in each.modules())]


def _kinds(owner: Any) -> list[type]:
    """The classes of an object that are the user's."""
    return [kind for kind in type(owner).__mro__ if not _is_known(kind.__module__)]


def _tables(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    tables: Any = (module._parameters, module._buffers, module._modules)
    return list(zip(("parameter", "buffer", "layer"), tables, strict=True))


def _unsaved(root: Any, saved: Collection[str]) -> Iterator[tuple[nn.Module, str, Tensor | None]]:
    """Buffers that do not travel with the model."""
    named = root.named_modules() if isinstance(root, nn.Module) else []
    paths = {id(module): path for path, module in named}
    for module in _parts(root):
        for name, buffer in module._buffers.items() if isinstance(module, nn.Module) else ():
            path = paths.get(id(module))
            if path is None or f"{path}.{name}".lstrip(".") not in saved:
                yield module, name, buffer


def _of_classes(kinds: Iterable[type]) -> Iterator[KeptPlace]:
    """Attributes of classes that are neither methods nor Python's own."""
    for kind in kinds:
        for name, value in vars(kind).items():
            if not name.startswith("__") and name != "_abc_impl" and _is_data(value):
                yield KeptPlace(kind, name, f"'{name}' of the class {kind.__name__}")


def _hooks(part: Any) -> list[Any]:
    tables = [vars(part).get(name) or {} for name in _HOOKS] if isinstance(part, nn.Module) else []
    return [hook for table in tables for hook in table.values()]


def _of_modules(kinds: Iterable[type], hooks: Iterable[Any]) -> Iterator[KeptPlace]:
    """Variables of modules that the methods of classes use, and what their functions use.

    Of each of these functions its own attributes and its defaults too.
    """
    values = [*(value for kind in kinds for value in vars(kind).values()), *hooks]
    functions = [_function(value) for value in values]
    for function in functions:
        if function is not None and not _is_known(function.__module__ or ""):
            yield from _of_function(function)
    codes = [(f.__code__, f.__globals__) for f in functions if f is not None]
    seen: set[types.CodeType] = set()
    named: set[tuple[str, str]] = set()
    while codes:
        code, variables = codes.pop()
        module = sys.modules.get(variables.get("__name__", ""))
        known = module is None or vars(module) is not variables or _is_known(module.__name__)
        if code in seen or module is None or known:
            continue
        seen.add(code)
        codes += [(c, variables) for c in code.co_consts if isinstance(c, types.CodeType)]
        for home, name, value in _used(code, module):
            function = _function(value)
            if function is not None:
                if function.__code__ not in seen and not _is_known(function.__module__ or ""):
                    yield from _of_function(function)
                codes.append((function.__code__, function.__globals__))
            elif _is_data(value) and (home.__name__, name) not in named:
                named.add((home.__name__, name))
                yield KeptPlace(home, name, f"the variable '{name}' of {home.__name__}")


def _used(
    code: types.CodeType, module: types.ModuleType
) -> Iterator[tuple[types.ModuleType, str, Any]]:
    """What a code may use of its module, and of modules of the user's that it names."""
    homes = [module]
    for name in code.co_names:
        value = vars(module).get(name)
        if isinstance(value, types.ModuleType) and not _is_known(value.__name__):
            homes.append(value)
    for home in homes:
        if home is module or installed(home.__name__.partition(".")[0]) is None:
            yield from ((home, n, vars(home)[n]) for n in code.co_names if n in vars(home))


def _of_function(function: types.FunctionType) -> Iterator[KeptPlace]:
    """What a function keeps from call to call."""
    called = function.__qualname__
    for name, value in vars(function).items():
        if not name.startswith("__") and _is_data(value):
            yield KeptPlace(function, name, f"'{name}' of the function {called}")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        place = KeptPlace(cell, _CELL, f"'{name}' around {called}")
        if place.get() is not _NOTHING and _is_data(place.get()):
            yield place
    for name in _DEFAULTS:
        values = getattr(function, name) or ()
        given = values.values() if isinstance(values, dict) else values
        if not all(isinstance(each, _ATOMS) or callable(each) for each in given):
            yield KeptPlace(function, name, f"a default argument of {called}")


def _generators(values: Iterable[Any]) -> list[Any]:
    """The generators in values, each once."""
    found: dict[int, Any] = {}

    def look(value: Any, depth: int) -> None:
        if isinstance(value, OWN):
            found[id(value)] = value
        elif depth == _DEPTH or isinstance(value, (*_ATOMS, nn.Module)):
            return
        elif isinstance(value, Mapping):
            for each in [*value.values()][:_ITEMS]:
                look(each, depth + 1)
        elif isinstance(value, list | tuple | deque):
            for each in [*value][:_ITEMS]:
                look(each, depth + 1)
        elif not isinstance(value, type | types.ModuleType) and hasattr(value, "__dict__"):
            look(vars(value), depth + 1)

    for value in values:
        look(value, 0)
    return list(found.values())


def _function(value: Any) -> types.FunctionType | None:
    value = getattr(value, "__func__", getattr(value, "fget", value))
    value = getattr(value, "__wrapped__", value)
    return value if isinstance(value, types.FunctionType) else None


def _is_data(value: Any) -> bool:
    code = (type, types.ModuleType, property, staticmethod, classmethod)
    return (
        not isinstance(value, code) and not callable(value) and not inspect.isdatadescriptor(value)
    )


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in _KNOWN


def _not_copied(modules: Iterable[Any]) -> list[Any]:
    """Objects that copies share with what they are copies of."""
    shared: list[Any] = []
    for each in modules:
        shared.append(each)
        if isinstance(each, nn.Module):
            tensors = (*each._parameters.values(), *each._buffers.values())
            shared += [tensor for tensor in tensors if tensor is not None]
    return shared


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """A copy that nothing which happens to the value changes; the value where there is none."""
    if isinstance(value, _ATOMS) or _size(value) > _LARGEST:
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a lock, an open file, a tensor with a history
        return value


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return value.nbytes if isinstance(value, np.ndarray) else 0


def _mark(value: Any, depth: int = 0) -> Any:
    """What tells whether a value was replaced or changed."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, _ATOMS):
        return type(value), value
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return id(value), value.tobytes()
        return id(value), zlib.crc32(np.ascontiguousarray(value).data)
    if depth == _DEPTH or isinstance(value, OWN):
        return id(value)
    if isinstance(value, Mapping):
        items = [(_mark(k, depth + 1), _mark(v, depth + 1)) for k, v in [*value.items()][:_ITEMS]]
        return id(value), len(value), items
    if isinstance(value, list | tuple | deque):
        return id(value), len(value), [_mark(v, depth + 1) for v in [*value][:_ITEMS]]
    if isinstance(value, set | frozenset):
        return id(value), sorted(map(repr, value))[:_ITEMS]
    if isinstance(value, nn.Module | type) or callable(value):
        return id(value)
    slots = _slots(value)
    if slots or hasattr(value, "__dict__"):
        return id(value), _mark({**slots, **getattr(value, "__dict__", {})}, depth + 1)
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
