"""What a user's code reaches: classes, functions and modules, and the values that lie in them.

From the classes and functions of a strategy on, code is followed as far as it is the user's own:
the global names that a function uses, the attributes of modules and whole classes among them, what
wraps a function and what it wraps, its defaults and the variables that it encloses.
"""

import dis
import enum
import functools
import io
import logging
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import torch

from fedsim.strategy.held.kinds import is_empty
from fedsim.strategy.held.trust import is_users, label_of

_MOST = 20_000  # classes, functions and values that are looked at
_FEW = 100  # entries of a container that is looked into for code
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_WRAPPERS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ((staticmethod, classmethod), ("__func__",)),
    (property, ("fget", "fset", "fdel")),
    (functools.cached_property, ("func",)),
    ((functools.partial, functools.partialmethod), ("func", "args", "keywords")),
    (functools.singledispatchmethod, ("func", "dispatcher")),
    (types.MethodType, ("__func__", "__self__")),
)
_CACHE = type(functools.lru_cache(lambda: None))
_BY_TEXT = {"getattr", "setattr", "hasattr", "vars", "globals", "__dict__"}
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodWrapperType, _CACHE)
_NO_DATA = (types.ModuleType, logging.Logger, type(os.environ), types.UnionType)
# libraries whose objects that may be called keep nothing between calls
_CALLABLES = {"builtins", "flwr", "functools", "numpy", "operator", "torch", "types"}


class Place(NamedTuple):
    """Where a value lies.

    Attributes:
        owner: A class, a module, or the function that is the value itself.
        name: The attribute's name; empty for a function.
        value: The value.
    """

    owner: Any
    name: str
    value: Any


class Reached(NamedTuple):
    """What code reaches.

    Attributes:
        places: Values by `class MODULE:NAME attribute`, `module MODULE name`, or
            `function MODULE:NAME`, the last for functions that keep something themselves.
        caches: Functions with an `lru_cache`, whose contents cannot be had, by their labels.
        imports: What functions import, loaded or not.
        whole: Whether all that is reached was looked at.
    """

    places: Mapping[str, Place]
    caches: Mapping[str, Any] = types.MappingProxyType({})
    imports: frozenset[str] = frozenset()
    whole: bool = True


def reached_from(classes: Iterable[type], functions: Iterable[Any] = ()) -> Reached:
    """Return what the code of classes and functions reaches."""
    walk = _Walk()
    whole = walk.follow([*sorted(classes, key=label_of), *functions])
    return Reached(walk.places, walk.caches, frozenset(walk.imports), whole)


class _Walk:
    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.caches: dict[str, Any] = {}
        self.imports: set[str] = set()
        self._seen: dict[int, object] = {}

    def follow(self, things: list[Any]) -> bool:
        """Look at things and all that they lead to; return whether none is left."""
        waiting, whole = things[::-1], True
        while waiting and len(self._seen) < _MOST:
            each = waiting.pop()
            if type(each) in _PLAIN or id(each) in self._seen:
                continue
            self._seen[id(each)] = each
            try:
                waiting += list(self._next(each))[::-1]
            except Exception:  # of the user's own code, such as a proxy for what is not there yet
                whole = False
        return whole and not waiting

    def _next(self, thing: Any) -> Iterable[Any]:
        """Note what lies in a thing, and return what it leads to."""
        if isinstance(thing, type):
            return self._of_class(thing)
        if isinstance(thing, types.FunctionType):
            return self._of_function(thing)
        if isinstance(thing, _CACHE):
            if is_users(thing.__module__ or ""):
                self.caches[label_of(thing)] = thing
            return [thing.__wrapped__]
        for kinds, names in _WRAPPERS:
            if isinstance(thing, kinds):
                return [getattr(thing, name) for name in names]
        if type(thing) in (list, tuple, set, frozenset) and len(thing) <= _FEW:
            return list(thing)
        if type(thing) is dict and len(thing) <= _FEW:
            return list(thing.values())
        own = vars(thing).values() if is_users(type(thing).__module__) and _has(thing) else ()
        return [type(thing), *own]

    def _of_class(self, cls: type) -> Iterator[Any]:
        if not is_users(cls.__module__) or issubclass(cls, enum.Enum):
            return
        for name, value in list(vars(cls).items()):
            own = not name.startswith("__") and name != "_abc_impl"
            if own and _is_data(value):
                self.places[f"class {label_of(cls)} {name}"] = Place(cls, name, value)
            if own or isinstance(value, (*_CODE, staticmethod, classmethod)):
                yield value
        yield from cls.__mro__[1:]
        yield type(cls)

    def _of_function(self, function: types.FunctionType) -> Iterator[Any]:
        module = function.__globals__.get("__name__") or ""
        kept = [*_enclosed(function), *_defaults(function)]
        if is_users(module):
            yield from self._of_names(function, module)
            if _keeps(function):
                self.places[self._free(f"function {label_of(function)}")] = Place(
                    function, "", function
                )
        elif not is_users(function.__module__ or ""):
            return
        else:  # what an installed library wraps a user's function in
            kept = [each for each in kept if isinstance(each, types.FunctionType)]
        yield from kept
        yield from vars(function).values()

    def _free(self, place: str) -> str:
        number = 1
        while (found := place if number == 1 else f"{place} {number}") in self.places:
            number += 1
        return found

    def _of_names(self, function: types.FunctionType, module: str) -> Iterator[Any]:
        names, imported = _names_in(function.__code__)
        yield from self._in_module(module, function.__globals__, names)
        inside = _packages(function.__globals__.get("__package__") or "")
        for name in [f"{package}{each}" for each in sorted(imported) for package in inside]:
            self.imports.add(name)
            found = sys.modules.get(name)
            if found is not None and is_users(name):
                yield from self._in_module(name, vars(found), names)

    def _in_module(self, module: str, scope: Mapping[str, Any], names: Set[str]) -> Iterator[Any]:
        """Note the named values of a module, and of the user's modules that it names."""
        waiting, looked = [(module, scope)], {module}
        while waiting:
            module, scope = waiting.pop()
            for name in sorted(names & scope.keys()):
                value = scope[name]
                if isinstance(value, types.ModuleType):
                    if value.__name__ not in looked and is_users(value.__name__):
                        looked.add(value.__name__)
                        waiting.append((value.__name__, vars(value)))
                    continue
                if _is_data(value) and not name.startswith("__"):
                    owner = sys.modules.get(module)
                    self.places[f"module {module} {name}"] = Place(owner, name, value)
                yield value


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names of globals and attributes that code uses, as text too where it may, and imports."""
    names: set[str] = set()
    texts: set[str] = set()
    imported: set[str] = set()
    codes = [code]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        texts |= {const for const in code.co_consts if isinstance(const, str)}
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        imported |= {
            each.argval
            for each in dis.get_instructions(code)
            if each.opname in ("IMPORT_NAME", "IMPORT_FROM") and each.argval
        }
    return frozenset(names | texts if names & _BY_TEXT else names), frozenset(imported)


def _packages(package: str) -> list[str]:
    """What may stand before a module's name in an import: nothing, and packages outwards."""
    parts = package.split(".") if package else []
    return ["", *(".".join(parts[:end]) + "." for end in range(len(parts), 0, -1))]


def _defaults(function: types.FunctionType) -> list[Any]:
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _enclosed(function: types.FunctionType) -> list[Any]:
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if not is_empty(cell)]


def _keeps(function: types.FunctionType) -> bool:
    """Whether a function keeps what calls may change: attributes, defaults, a closure."""
    return (
        any(name != "__wrapped__" and _is_data(v) for name, v in vars(function).items())
        or any(not isinstance(v, _PLAIN) and _is_data(v) for v in _defaults(function))
        or any(map(_is_data, _enclosed(function)))
    )


def _is_data(value: Any) -> bool:
    """Whether a value is no code: one with `__call__` or `__get__` is where it is a user's."""
    kind = type(value)
    if isinstance(value, (*_CODE, *_NO_DATA)) or kind.__module__ == "typing":
        return False
    if isinstance(value, types.MethodType):
        return is_users(type(value.__self__).__module__)
    if is_users(kind.__module__) or isinstance(value, functools.partial | torch.nn.Module):
        return True
    library = kind.__module__.partition(".")[0] in _CALLABLES
    return not (hasattr(kind, "__get__") or (callable(value) and library))


def _has(thing: object) -> bool:
    """Whether an object has attributes beside those of its class."""
    return isinstance(getattr(thing, "__dict__", None), dict)


def is_stream(value: Any) -> bool:
    """Whether a value is used up as it is read, so that what is left decides later rounds."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)
