"""A package's face: names that it exports without importing the modules they lie in."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that imports what it exports at first use.

    Importing any module of a package imports the package first; an eager face would make the
    lightest of its modules as heavy as the heaviest.

    Args:
        package: The package's name.
        exports: Exported name to the module that defines it.

    Example:
        >>> find, names = lazy("fedsim.example", {"Fraction": "fractions"})
        >>> names(), find("Fraction")(1, 2)
        (['Fraction'], Fraction(1, 2))
        >>> find("Frction")
        Traceback (most recent call last):
        ...
        AttributeError: module 'fedsim.example' has no attribute 'Frction'
    """

    def find(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(exports[name]), name)

    return find, lambda: sorted(exports)
