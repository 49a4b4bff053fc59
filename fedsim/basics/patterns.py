"""Tensors of a model, chosen by patterns of their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from fedsim.basics.errors import unknown


def is_meant(pattern: str, name: str) -> bool:
    """Tell whether a pattern means a tensor of that name.

    Args:
        pattern: A whole name, a leading part of names ("output" for "output.weight"), or a pattern
            with `*`, `?` and `[...]`.
        name: The tensor's name.

    Example:
        >>> [is_meant(each, "output.weight") for each in ("output", "*.weight", "out")]
        [True, True, False]
    """
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def chosen(patterns: Sequence[str], names: Sequence[str]) -> frozenset[str]:
    """Return the names that patterns mean.

    Args:
        patterns: See `is_meant`.
        names: All names.

    Raises:
        ValueError: If a pattern means none of them.

    Example:
        >>> sorted(chosen(["output"], ["hidden1.bias", "output.bias", "output.weight"]))
        ['output.bias', 'output.weight']
    """
    found: set[str] = set()
    for pattern in patterns:
        meant = [name for name in names if is_meant(pattern, name)]
        if not meant:
            layers = {name.rpartition(".")[0] for name in names} - {""}
            known = [*sorted(layers), *names]
            raise ValueError(unknown(pattern, "a trained tensor or layer of the model", known))
        found.update(meant)
    return frozenset(found)
