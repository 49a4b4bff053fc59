"""Arrays of unknown origin, held against what a federation needs of them.

Every refusal here is the end of a message: what was found and what must be. The caller says where.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.federated import Ints

_BLOCK = 1 << 22  # numbers that are looked at together
_WHOLE_BELOW = 1 << 24  # every float32 from here on is a whole number

Numbers = npt.NDArray[np.float32]


class Unfit(ValueError):
    """What is wrong with some values, and in which row if in one.

    Attributes:
        row: Its number, counted from 0; None when no single row is to blame.
    """

    def __init__(self, what: str, row: int | None = None) -> None:
        super().__init__(what)
        self.row = row


def as_array(value: Any) -> npt.NDArray[Any]:
    """Return a NumPy array, a torch tensor, nested lists or the like as an array.

    Raises:
        Unfit: If it is none, or has missing values.
    """
    if value is None:
        raise Unfit("is None, expected an array `[n, ...]`")
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise Unfit("is missing", int(np.argwhere(np.ma.getmaskarray(value))[0, 0]))
    if hasattr(value, "isna"):  # of pandas, where a hole makes floats of whole numbers
        if hasattr(value, "get_level_values") and getattr(value, "nlevels", 1) > 1:
            raise Unfit(
                f"is a {type(value).__name__} of {value.nlevels} levels, whose values are tuples; "
                "return one of them, as in index.get_level_values(0)"
            )
        holes = np.argwhere(np.asarray(value.isna()))
        if holes.size:
            raise Unfit("is missing", int(holes[0, 0]))
    try:
        if hasattr(value, "detach"):  # a torch tensor
            value = value.detach().cpu()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Unfit(f"cannot be made an array: {error}") from error
    if array.ndim == 0:
        raise Unfit(f"is a {type(value).__name__}, expected an array `[n, ...]`")
    if array.dtype.kind == "U" and isinstance(value, list | tuple):
        as_plain(np.asarray(value, dtype=np.object_))  # NumPy makes texts of numbers among them
    return array


def as_plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return text, truth values or numbers in an array of their own type, whatever held them.

    Raises:
        Unfit: Naming the row of a value that is missing, or of another kind than the first.
    """
    if array.dtype.kind == "S":
        try:
            return np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise Unfit(f"holds bytes that are no UTF-8 text: {error.object!r:.40}") from None
    if array.dtype.kind == "T":  # NumPy's text of any length
        array = array.astype(np.object_)
    if array.dtype.kind != "O" or not array.size:
        return array
    wide = array[:1].size
    kinds = [_kind_of_value(value, place // wide) for place, value in enumerate(array.flat)]
    order = ("truth values", "whole numbers", "floats")
    if set(kinds) <= {*order}:
        return array.astype((np.bool_, np.int64, np.float64)[max(map(order.index, kinds))])
    for place, kind in enumerate(kinds):
        if kind != kinds[0]:
            value = array.reshape(-1)[place]
            raise Unfit(f"is {value!r:.40}, and those before are {kinds[0]}", place // wide)
    return array.astype(np.str_) if kinds[0] == "text" else array


def _kind_of_value(value: Any, row: int) -> str:
    if value is None or type(value).__name__ in ("NAType", "NaTType") or value != value:
        raise Unfit("is missing", row)
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool | np.bool_):
        return "truth values"
    if isinstance(value, int | np.integer):
        return "whole numbers"
    return "floats" if isinstance(value, float | np.floating) else type(value).__name__


def as_numbers(array: npt.NDArray[Any]) -> Numbers:
    """Return float32 numbers, all finite; the same array where it holds them already.

    Raises:
        Unfit: If it holds something else.
    """
    if array.dtype.kind == "O":
        array = as_plain(array)  # such as columns of numbers beside one of truth values
    if array.dtype.kind not in "fiub":
        raise Unfit(f"holds {_kind(array)}, expected numbers")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(array, dtype=np.float32)
    rows = max(1, _BLOCK // max(1, numbers[:1].size))
    for start in range(0, len(numbers), rows):
        block = numbers[start : start + rows]
        if not np.isfinite(block).all():
            bad = np.argwhere(~np.isfinite(block))[0]
            place = (start + int(bad[0]), *map(int, bad[1:]))
            raise Unfit(f"is {array[place]}, expected a finite number in float32", place[0])
    return numbers


def as_tokens(array: npt.NDArray[Any], vocabulary: int) -> Ints:
    """Return int64 tokens from 0 to V-1.

    Raises:
        Unfit: If it holds something else.
    """
    return _whole_numbers(array, vocabulary, "tokens")


def as_classes(array: npt.NDArray[Any], num_classes: int) -> Ints:
    """Return int64 classes from 0 to C-1, `[n]`.

    Raises:
        Unfit: If it holds something else.
    """
    if array.ndim != 1:
        raise Unfit(f"has shape {array.shape}, expected one class per sample, `[n]`")
    return _whole_numbers(array, num_classes, "classes")


def count_classes(parts: Sequence[npt.NDArray[Any]]) -> int:
    """Return C of classes that should be 0 to C-1, each at least once.

    Args:
        parts: Arrays of integers or booleans, such as those of training and test samples.

    Raises:
        Unfit: If some class below the largest has no sample, or there is but one.
    """
    found = np.unique(np.concatenate([part.reshape(-1).astype(np.int64) for part in parts]))
    if found[0] < 0:
        raise Unfit(f"holds class {found[0]}, expected classes from 0")
    if len(found) < 2:
        raise Unfit(f"holds class {found[0]} alone, expected at least two classes")
    gaps = np.flatnonzero(found != np.arange(len(found)))
    if gaps.size:
        raise Unfit(
            f"has no sample of class {gaps[0]} but one of class {found[gaps[0]]}: classes must be "
            "0 to C-1"
        )
    return len(found)


def all_whole(parts: Sequence[npt.NDArray[Any]]) -> bool:
    """Tell whether all these floats are whole numbers, and small enough for it to say something."""
    return all(
        (np.abs(part) < _WHOLE_BELOW).all() and (part == np.floor(part)).all() for part in parts
    )


def as_groups(array: npt.NDArray[Any]) -> tuple[Ints, tuple[str, ...]]:
    """Return the number of each sample's owner and the owners' names in sorted order.

    Args:
        array: One integer or text per sample, `[n]`.

    Raises:
        Unfit: If it holds something else.
    """
    if array.ndim != 1:
        raise Unfit(f"has shape {array.shape}, expected one owner per sample, `[n]`")
    array = as_plain(array)
    if array.dtype.kind not in "iubU":
        raise Unfit(f"holds {_kind(array)}, expected text or whole numbers")
    names, numbers = np.unique(array, return_inverse=True)
    return numbers.astype(np.int64), tuple(map(str, names.tolist()))


def _whole_numbers(array: npt.NDArray[Any], count: int, what: str) -> Ints:
    if array.dtype.kind not in "iub":
        raise Unfit(f"holds {_kind(array)}, expected {what} as whole numbers")
    wrong = np.argwhere((array < 0) | (array >= count))
    if wrong.size:
        place = tuple(map(int, wrong[0]))
        raise Unfit(f"is {array[place]}, expected {what} from 0 to {count - 1}", place[0])
    return np.ascontiguousarray(array, dtype=np.int64)


def _kind(array: npt.NDArray[Any]) -> str:
    if array.dtype.kind == "O" and array.size:
        return f"Python objects such as {array.reshape(-1)[0]!r}"
    return "text" if array.dtype.kind in "US" else str(array.dtype)
