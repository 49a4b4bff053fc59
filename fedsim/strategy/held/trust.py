"""Which classes and functions a checkpoint may name, and whose code is a user's own."""

import sys
import sysconfig
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

_OURS = ("flwr", "fedsim", "strategies", "clients", "torch", "numpy")
# instances of classes in these may be made anew; of `torch` and `numpy` no others
_MAKEABLE = ("flwr.", "fedsim.", "strategies.", "clients.", "torch.optim.", "torch.nn.")
_PLAIN = {
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter"),
    *(("builtins", name) for name in (
        "bool", "int", "float", "str", "list", "dict", "set", "tuple", "frozenset", "max", "min",
        "sum", "abs", "len", "sorted", "any", "all", "round",
    )),
}  # fmt: skip


_adopted: set[str] = set()  # packages that are installed and hold a strategy of the user's


def adopt(cls: type) -> None:
    """Take the package of a strategy for the user's own, wherever it is installed."""
    for each in cls.__mro__:
        top = each.__module__.partition(".")[0]
        if top not in _OURS and top not in sys.stdlib_module_names and top not in _adopted:
            _adopted.add(top)
            is_users.cache_clear()


def label_of(thing: Any) -> str:
    """Return `module:qualname` of a class or function."""
    return f"{getattr(thing, '__module__', '')}:{getattr(thing, '__qualname__', '')}"


@lru_cache(maxsize=1024)
def is_users(module: str) -> bool:
    """Whether a module is a user's own: no part of Python, of fedsim, or of what is installed."""
    top = module.partition(".")[0]
    if not top or top in _OURS or (top in sys.stdlib_module_names and top != "__main__"):
        return False
    if top in _adopted:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return top == "__main__"
    places = {Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib", "stdlib")}
    return not any(Path(file).is_relative_to(place) for place in places)


class Known:
    """The names that may be looked up for one strategy.

    Args:
        classes: Classes of the strategy and of what it holds when it is new.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        self._tops = {
            each.__module__.partition(".")[0]
            for cls in classes
            for each in cls.__mro__
            if is_users(each.__module__)
        }
        for top in list(self._tops):  # and the user's modules that those import
            for name, module in list(sys.modules.items()):
                if name.partition(".")[0] == top and module is not None:
                    self._tops |= _imported_by(module)

    def find(self, label: str) -> Any | None:
        """Return the class or function of a label, or None when it cannot be had by its name."""
        module, _, name = label.partition(":")
        if not name or "<" in name or not self._may(module, name):
            return None
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None and label_of(found) == label:
            return found
        return _moved(module, name)

    def _may(self, module: str, name: str) -> bool:
        inside = f"{module}."
        return (
            module.partition(".")[0] in self._tops
            or inside.startswith(_MAKEABLE)
            or (module, name) in _PLAIN
        )


def _moved(module: str, name: str) -> Any | None:
    """A class that lay elsewhere in fedsim when a checkpoint was written, if one has its name.

    A class name stands once in the house (a law), so that a class is found wherever it moves to.
    """
    if module.partition(".")[0] != "fedsim":
        return None
    first, *rest = name.split(".")
    found = [
        vars(loaded)[first]
        for at, loaded in list(sys.modules.items())
        if at.startswith("fedsim.") and getattr(vars(loaded).get(first), "__module__", None) == at
    ]
    if len(found) != 1:
        return None
    moved = found[0]
    for part in rest:
        moved = getattr(moved, part, None)
    return moved


def _imported_by(module: Any) -> set[str]:
    """The packages of users that a module's names come from."""
    homes = [_home(value) for value in list(vars(module).values())]
    return {home.partition(".")[0] for home in homes if isinstance(home, str) and is_users(home)}


def _home(value: object) -> object:
    """The module that a module's value is, or that its class or function comes from."""
    try:
        if type(value) is type(sys):
            return value.__name__
        return getattr(value, "__module__", None) if callable(value) else None
    except Exception:  # of a user's object, such as a proxy for what is not there yet
        return None
