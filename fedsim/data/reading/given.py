"""Targets that a loader returns, as classes or amounts: read as those of a file are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.data.reading.checks import Unfit, as_array, as_plain, count_classes

Values = npt.NDArray[Any]


class Given(NamedTuple):
    """What stands in a field for targets.

    Attributes:
        values: `[n, ...]` floats, whole numbers, truth values or text; with `names` their numbers.
        names: The classes' names in the order of a Categorical; None of anything else.
    """

    values: Values
    names: tuple[str, ...] | None = None


class Numbered(NamedTuple):
    """Targets whose classes are numbers.

    Attributes:
        train: `[n, ...]`.
        test: Those held out, or None.
        num_classes: C; 0 where they are amounts.
        names: The classes' names, if they have any.
    """

    train: Values
    test: Values | None
    num_classes: int
    names: tuple[str, ...] = ()


def given(value: Any) -> Given:
    """Return what a loader gives as targets: an array, a tensor, a list, a column of pandas.

    Raises:
        Unfit: If a value is missing, or there are no values to be had.
    """
    categories = getattr(getattr(value, "dtype", None), "categories", None)
    codes = getattr(getattr(value, "cat", value), "codes", None)
    if categories is not None and codes is not None:
        numbers = np.asarray(codes).astype(np.int64)
        if (numbers < 0).any():
            raise Unfit("is missing", int(np.argmax(numbers < 0)))
        return Given(numbers, tuple(map(str, categories)))
    array = as_array(value)
    if isinstance(value, list | tuple) and array.dtype.kind in "US" and array.ndim == 1:
        array = np.asarray(value, dtype=object)  # or numbers among texts would be texts by now
    return Given(as_plain(array))


def numbered(train: Given, test: Given | None, num_classes: int) -> Numbered:
    """Number the classes of text (in sorted order), of truth values and of a Categorical.

    Args:
        train: Targets to train on.
        test: Those held out, if they are given.
        num_classes: C as the loader says it; 0 finds it.

    Raises:
        Unfit: If they are neither classes nor amounts.
    """
    parts = [part.values for part in (train, test) if part is not None]
    kind = train.values.dtype.kind
    if train.names is not None:
        return _named(train.values, test, train.names, num_classes)
    if kind in "Ub":
        _require_flat(train.values)
        alike = [part for part in parts if part.dtype.kind == kind]
        found = np.unique(np.concatenate([part.reshape(-1) for part in alike]))
        names = tuple(str(value).lower() if kind == "b" else str(value) for value in found.tolist())
        return _named(np.searchsorted(found, train.values), test, names, num_classes)
    values = None if test is None else test.values
    if kind in "iu":
        known = [part for part in parts if part.dtype.kind in "iu"]
        return Numbered(train.values, values, num_classes or count_classes(known))
    if kind != "f":
        raise Unfit(
            f"holds {train.values.dtype}, expected classes (whole numbers, text or truth values) "
            "or amounts (floats)"
        )
    if num_classes:
        raise Unfit("holds floats, which are amounts, yet num_classes is given")
    return Numbered(train.values, values, 0)


def _named(train: Values, test: Given | None, names: tuple[str, ...], num_classes: int) -> Numbered:
    if len(names) < 2:
        raise Unfit(f"holds '{''.join(names)}' alone, expected at least two classes")
    if num_classes not in (0, len(names)):
        raise Unfit(
            f"names {len(names)} classes, and num_classes is {num_classes}; leave it out (a "
            "Categorical of pandas may have classes without samples)"
        )
    values = None if test is None else _by_name(test, names)
    return Numbered(train.astype(np.int64), values, len(names), names)


def _by_name(test: Given, names: Sequence[str]) -> Values:
    """Return held-out classes by the numbers that training gave their names.

    What is no class there stays as it is, to be refused in the name of its own field.
    """
    kind = test.values.dtype.kind
    texts: list[str] | None = None
    if test.names is not None:
        texts = [test.names[number] for number in test.values.tolist()]
    elif kind in "Ub" and test.values.ndim == 1:
        texts = [str(v).lower() if kind == "b" else str(v) for v in test.values.tolist()]
    if texts is None:
        return test.values
    place = {name: number for number, name in enumerate(names)}
    return np.array([place.get(text, len(names)) for text in texts], dtype=np.int64)


def require_same_kind(test: Given, train: Given) -> None:
    """Refuse held-out targets of another kind than those to train on.

    Raises:
        Unfit: Saying what both are; or naming the row of a class that training does not have.
    """
    here, there = _kind(test), _kind(train)
    if here != there:
        raise Unfit(f"holds {here}, and the targets to train on are {there}")
    if train.names is None or (test.names is None and test.values.ndim != 1):
        return
    texts = test.values if test.names is None else np.asarray(test.names)[test.values]
    for row, text in enumerate(texts.tolist()):
        if text not in train.names:
            raise Unfit(f"is '{text}', which is no class of the targets to train on", row)


def _kind(part: Given) -> str:
    if part.names is not None:
        return "text"
    kinds = {"U": "text", "b": "truth values", "i": "whole numbers", "u": "whole numbers"}
    return kinds.get(part.values.dtype.kind, "floats")


def _require_flat(array: Values) -> None:
    if array.ndim != 1:
        raise Unfit(f"has shape {array.shape}, expected one class per sample, `[n]`")
