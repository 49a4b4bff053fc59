"""Ties: numbers that differ by no more than their rounding error are equal, here and everywhere.

Who chooses by comparison says how far rounding may have moved each number (its slack), asks which
are equal (`ranks`), and lets equals share the places that they take (`shares`) or takes the first.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Key = tuple[npt.ArrayLike, npt.ArrayLike]

EPSILON = float(np.finfo(np.float64).eps)
ROUNDING = 1e-12  # of a number that a few operations in float64 made


class Jump(NamedTuple):
    """A discontinuity that a rule's definition has, so that a tie cannot but be decided somehow.

    Attributes:
        under: What its result jumps under: "rounding" of the input, another order of "clients" or
            of "columns", another "scale".
        on: The kinds of updates on which it does, as `tests/property/kinds.py` calls them.
        why: In one sentence.
    """

    under: tuple[Literal["rounding", "clients", "columns", "scale"], ...]
    on: tuple[str, ...]
    why: str


def exceeds(one: Any, other: Any, *, rounding: float = ROUNDING) -> Any:
    """Tell whether a number is larger than another by more than rounding.

    Args:
        one: A number, or many.
        other: A number, or many; infinity or nan exceeds nothing and is exceeded as usual.
        rounding: Of both, relative.

    Example:
        >>> exceeds(0.1 + 0.2, 0.3), exceeds(0.31, 0.3)
        (False, True)
    """
    size = np.nan_to_num(np.maximum(np.abs(one), np.abs(other)), nan=0, posinf=0)
    found = one > other + rounding * size
    return bool(found) if np.ndim(found) == 0 else found


def whole(exact: npt.ArrayLike) -> Ints:
    """Return the whole parts of numbers >= 0; what is below a whole number by rounding is it.

    Example:
        >>> whole([0.7 + 0.1 + 0.2, 10 * 0.7 + 10 * 0.1, 2.9]).tolist()
        [1, 8, 2]
    """
    numbers = np.asarray(exact, dtype=np.float64)
    found: Ints = np.floor(numbers + ROUNDING * np.maximum(1, numbers)).astype(np.int64)
    return found


def ranks(keys: Iterable[Key]) -> Ints:
    """Return the place of each in ascending order, from 0; equals have the same.

    Numbers next to each other in that order are equal when they are no further apart than both
    slacks together. Those that are equal by one key go by the next, which is not asked for unless
    there are any.

    Args:
        keys: Values `[..., n]`, each row ordered by itself, and their slacks.

    Returns:
        int64 `[..., n]`.

    Example:
        >>> ranks([([0.3, 0.1, 0.1 + 0.2, 0.1], 1e-15), ([5, 7, 4, 7], 0)]).tolist()
        [2, 0, 1, 0]
    """
    found: Ints | None = None
    for key, slacks in keys:
        values = np.asarray(key, dtype=np.float64)
        finite = np.nan_to_num(np.asarray(slacks, dtype=np.float64), nan=0, posinf=0)
        slack = np.broadcast_to(finite, values.shape)
        found = np.zeros(values.shape, dtype=np.int64) if found is None else found
        order = np.lexsort((values, found))
        inside, value, reach = (
            np.take_along_axis(each, order, axis=-1) for each in (found, values, slack)
        )
        with np.errstate(invalid="ignore"):  # infinity less infinity is no distance
            apart = np.diff(value) > reach[..., 1:] + reach[..., :-1]
        places = np.zeros_like(order)
        np.cumsum(apart | (np.diff(inside) > 0), axis=-1, out=places[..., 1:])
        found = np.empty_like(order)
        np.put_along_axis(found, order, places, axis=-1)
        if (places[..., -1:] == values.shape[-1] - 1).all():
            break
    assert found is not None
    return found


def shares(ranks: Ints, first: int, last: int) -> Floats:
    """Return how much of each lies in the places `first` to `last` - 1 when equals share theirs.

    Args:
        ranks: `[..., n]`, see `ranks`.
        first: The first place, from 0.
        last: The place after the last.

    Returns:
        float64 `[..., n]`, in [0, 1]; each row adds up to the number of places.

    Example:
        >>> shares(np.array([1, 0, 1, 1, 2]), 0, 2).round(2).tolist()
        [0.33, 1.0, 0.33, 0.33, 0.0]
    """
    rows = ranks.reshape(-1, ranks.shape[-1])
    several = np.arange(len(rows))[:, None] * rows.shape[1]
    counts = np.bincount((rows + several).ravel(), minlength=rows.size).reshape(rows.shape)
    end = counts.cumsum(axis=1)
    taken = (np.minimum(end, last) - np.maximum(end - counts, first)).clip(min=0)
    each = taken / np.maximum(counts, 1)
    found: Floats = np.take_along_axis(each, rows, axis=1).reshape(ranks.shape)
    return found
