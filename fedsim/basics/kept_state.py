"""State of a user's objects beside the tensors of a model, put back for every client.

One model, one procedure and one task serve all clients of a process. Anything they keep that is no
parameter and no buffer of the model's layout (attributes, buffers that are not saved, attributes of
their classes, variables of their modules) would go on from client to client. Here it is put back as
it was when they were made. Needs torch and numpy.
"""

import functools
import inspect
import sys
import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fedsim.basics.generators import OWN
from fedsim.basics.kept_place import (
    CELL,
    DEFAULTS,
    INTERNAL,
    NOTHING,
    KeptPlace,
    LayerWas,
    of_layer,
)
from fedsim.basics.marks import ATOMS, DEPTH, ITEMS, copied, mark_of
from fedsim.basics.project import installed

_CACHE = type(functools.lru_cache(lambda: None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KNOWN = ("torch", "numpy", "fedsim", "clients", "strategies", "flwr", "builtins", "abc", "typing")


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
        self._layers = list(_layers_of_torch(roots))
        kinds = dict.fromkeys(kind for each in self._owners for kind in _kinds(each))
        hooks = [hook for part in parts for hook in _hooks(part)]
        self._caches: dict[str, Any] = {}
        around = _of_modules(kinds, hooks, self._caches)
        places = [*self._of_owners(), *_of_classes(kinds), *around]
        self._others = {place.key: place for place in places}
        layers = (place for path, layer in self._layers for place in of_layer(path, layer))
        self._places = self._others | {place.key: place for place in layers}
        first = {key: place.get() for key, place in self._places.items()}
        self.generators = _generators(first.values())
        self._shared = {id(each): each for each in (*_not_copied(parts), *self.generators)}
        memo = dict(self._shared)
        self._pristine = {key: copied(value, memo) for key, value in first.items()}
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
        places = self._others | {place.key: place for place in self._of_owners()}
        for (path, layer), was in zip(self._layers, self._layers_were, strict=True):
            if not was.still(layer):
                now = {place.key: place for place in of_layer(path, layer)}
                places |= {key: self._places[key] for key in was.keys} | now
        found = [p.shown for key, p in places.items() if mark_of(p.get()) != self._marks.get(key)]
        for (module, name, _), mark in zip(self._buffers, self._buffer_marks, strict=True):
            if mark_of(module._buffers.get(name)) != mark:
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
        layers = (place for path, layer in self._layers for place in of_layer(path, layer))
        for place in [*self._of_owners(), *layers]:
            if place.key not in self._places:
                place.put(NOTHING)
        memo = dict(self._shared)
        for key, place in self._places.items():
            place.put(copied(self._pristine[key], memo))
        for module, name, first in self._buffers:
            module._buffers[name] = None if first is None else first.clone()
        self._mark()

    def _unsaved(self, owner: nn.Module) -> set[str]:
        return {name for module, name, _ in self._buffers if module is owner}

    def _mark(self) -> None:
        self._marks = {key: mark_of(place.get()) for key, place in self._places.items()}
        self._layers_were = [LayerWas.of(path, layer) for path, layer in self._layers]
        self._buffer_marks = [mark_of(m._buffers.get(n)) for m, n, _ in self._buffers]

    def _of_owners(self) -> Iterator[KeptPlace]:
        for owner in self._owners:
            internal = INTERNAL if isinstance(owner, nn.Module) else ()
            for name in vars(owner):
                if name not in internal and not name.startswith("_flat_weight"):
                    yield KeptPlace(owner, name, f"'{name}' of {type(owner).__name__}")

    def caches(self) -> list[str]:
        """Name functions whose results are kept by an `lru_cache`: those that were called."""
        return [label for label, cache in self._caches.items() if sum(cache.cache_info()[:2])]


def _parts(root: Any) -> list[Any]:
    """An object and the modules that it holds."""
    if isinstance(root, nn.Module):
        return list(root.modules())
    held = [each for each in getattr(root, "__dict__", {}).values() if isinstance(each, nn.Module)]
    return [root, *(part for each in held for part in each.modules())]


def _kinds(owner: Any) -> list[type]:
    """The classes of an object that are the user's."""
    return [kind for kind in type(owner).__mro__ if not _is_known(kind.__module__)]


def _layers_of_torch(roots: Iterable[Any]) -> Iterator[tuple[str, nn.Module]]:
    """Layers of torch's own classes, with their names; of those in other objects their classes'."""
    paths = {
        id(layer): path
        for root in roots
        if isinstance(root, nn.Module)
        for path, layer in root.named_modules()
    }
    for part in {id(part): part for root in roots for part in _parts(root)}.values():
        home = type(part).__module__.partition(".")[0]
        # a layer without shapes finds them in its first pass, and is another class by then
        if (
            isinstance(part, nn.Module)
            and home == "torch"
            and not isinstance(part, LazyModuleMixin)
        ):
            yield paths.get(id(part), type(part).__name__), part


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


def _of_modules(
    kinds: Iterable[type], hooks: Iterable[Any], caches: dict[str, Any]
) -> Iterator[KeptPlace]:
    """Variables of modules that the methods of classes use, and what their functions use.

    Of each of these functions its own attributes and its defaults too. Functions with an
    `lru_cache` are noted in `caches` by their names.
    """
    values = [*(value for kind in kinds for value in vars(kind).values()), *hooks]
    caches |= _cached(values)
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
            caches |= _cached([value])
            function = _function(value)
            if function is not None:
                if function.__code__ not in seen and not _is_known(function.__module__ or ""):
                    yield from _of_function(function)
                codes.append((function.__code__, function.__globals__))
            elif _is_data(value) and (home.__name__, name) not in named:
                named.add((home.__name__, name))
                yield KeptPlace(home, name, f"the variable '{name}' of {home.__name__}")


def _cached(values: Iterable[Any]) -> dict[str, Any]:
    inner = [getattr(value, "__func__", value) for value in values]
    return {
        f"{each.__module__}.{each.__qualname__}": each
        for each in inner
        if isinstance(each, _CACHE) and not _is_known(each.__module__ or "")
    }


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
        place = KeptPlace(cell, CELL, f"'{name}' around {called}")
        if place.get() is not NOTHING and _is_data(place.get()):
            yield place
    for name in DEFAULTS:
        values = getattr(function, name) or ()
        given = values.values() if isinstance(values, dict) else values
        if not all(isinstance(each, ATOMS) or callable(each) for each in given):
            yield KeptPlace(function, name, f"a default argument of {called}")


def _generators(values: Iterable[Any]) -> list[Any]:
    """The generators in values, each once."""
    found: dict[int, Any] = {}

    def look(value: Any, depth: int) -> None:
        if isinstance(value, OWN):
            found[id(value)] = value
        elif depth == DEPTH or isinstance(value, (*ATOMS, nn.Module)):
            return
        elif isinstance(value, Mapping):
            for each in [*value.values()][:ITEMS]:
                look(each, depth + 1)
        elif isinstance(value, list | tuple | deque):
            for each in [*value][:ITEMS]:
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
