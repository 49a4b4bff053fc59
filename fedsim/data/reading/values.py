"""The values of one column: Arrow arrays of `datasets`, batch by batch, as NumPy arrays.

A value that cannot be used is refused with its place and column.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError
from fedsim.data.reading.checks import Numbers, Unfit, as_numbers
from fedsim.data.reading.origins import Split, library

_BATCH = 10_000  # rows that are held at a time
MIXED = "values of several kinds, such as numbers in some rows and text in others"


class Column(NamedTuple):
    """One column of one split, and where its rows are."""

    split: Split
    name: str

    def arrow(self, batch: Any) -> Any:
        """Return the column of a batch as one Arrow array without missing values."""
        column = batch.column(self.name).combine_chunks()
        if column.null_count:
            why = ""
            if (
                self.split.text is not None
                and kind_of(self.split.rows.features[self.name]) == "text"
            ):
                why = " (empty, or a word that pandas takes for nothing, such as NA or None)"
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise Unfit(f"is missing{why}", row)
        return column

    def blocks(self, convert: Callable[[Any], npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Convert the column batch by batch; what is wrong is said with its place."""
        return list(self.converted(convert))

    def converted(self, convert: Callable[[Any], npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
        """Convert the column batch by batch, as far as it is asked for."""
        start = 0
        rows = self.split.rows.select_columns([self.name]).with_format("arrow")
        for batch in rows.iter(batch_size=_BATCH):
            try:
                yield convert(self.arrow(batch))
            except Unfit as unfit:
                row = None if unfit.row is None else start + unfit.row
                raise self.refused(Unfit(str(unfit), row)) from unfit
            start += len(batch)

    def refused(self, unfit: Unfit) -> ScenarioError:
        """Return the refusal of a value: where it is, and what is wrong."""
        place = "" if unfit.row is None else f"{self.split.place(unfit.row)}, "
        return ScenarioError(f"{place}column '{self.name}' {unfit}")


def read_numbers(split: Split, names: Sequence[str]) -> Numbers:
    """Return some columns of numbers side by side, `[n, columns]`.

    Raises:
        ScenarioError: Naming row and column of a value that is missing or no number.
    """
    # all columns of a batch at once: taking one out of many costs as much as taking all
    rows = split.rows.select_columns(list(names)).with_format("arrow")
    parts: list[Numbers] = []
    start = 0
    for batch in rows.iter(batch_size=max(_BATCH // len(names), 500)):
        block = np.empty((len(batch), len(names)), dtype=np.float32)
        for place, name in enumerate(names):
            column = Column(split, name)
            try:
                block[:, place] = to_numbers(column.arrow(batch))
            except Unfit as unfit:
                row = None if unfit.row is None else start + unfit.row
                raise column.refused(Unfit(str(unfit), row)) from unfit
        parts.append(block)
        start += len(batch)
    return np.concatenate(parts)


def kind_of(type_: Any) -> str:
    """Return "image", "text", "numbers", "list", or the name of a type that is of no use."""
    datasets = library()
    # encoded images that another tool than datasets wrote say less of themselves
    encoded = isinstance(type_, dict) and type_.keys() == {"bytes", "path"}
    if isinstance(type_, datasets.Image) or encoded:
        return "image"
    if isinstance(type_, datasets.Value):
        text = type_.dtype in ("string", "large_string")
        number = type_.dtype.startswith(("int", "uint", "float", "bool", "decimal"))
        images = type_.dtype in ("binary", "large_binary")
        return "text" if text else "numbers" if number else "image" if images else type_.dtype
    if isinstance(type_, datasets.ClassLabel):
        return "numbers"
    name = type(type_).__name__
    return "list" if name in ("List", "LargeList", "Sequence") or "Array" in name else name


def is_float(type_: Any) -> bool:
    """Tell whether a column holds fractional numbers."""
    return str(getattr(type_, "dtype", "")).startswith(("float", "decimal"))


def is_whole(type_: Any) -> bool:
    """Tell whether a column holds whole numbers."""
    return str(getattr(type_, "dtype", "")).startswith(("int", "uint"))


def read_lists(column: Column, shape: tuple[int, ...] | None) -> Numbers:
    """Return a column of (nested) lists of numbers as `[n, ...]`.

    Args:
        column: The column.
        shape: What every list's shape must be; None takes the first one's.

    Raises:
        ScenarioError: Naming the row of a list of another shape or with a missing value.
    """
    expected = [shape]

    def convert(values: Any) -> Numbers:
        dense = _dense(values)
        expected[0] = expected[0] or dense.shape[1:]
        if dense.shape[1:] != expected[0]:
            raise Unfit(f"holds a list of shape {dense.shape[1:]}, expected {expected[0]}", 0)
        return as_numbers(dense)

    return np.concatenate(column.blocks(convert))


def to_labels(values: Any, what: str = "classes") -> npt.NDArray[Any]:
    """Return whole numbers (of fractional type too), booleans or text.

    Args:
        values: An Arrow array.
        what: What they name.

    Raises:
        Unfit: If it holds something else.
    """
    import pyarrow as pa

    if _is_whole(values.type):
        whole: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
        return whole
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return np.asarray(values.to_pylist(), dtype=np.str_)
    if pa.types.is_floating(values.type):
        numbers = to_float64(values)
        broken = np.flatnonzero(numbers != np.floor(numbers))
        if broken.size:
            row = int(broken[0])
            raise Unfit(f"is {numbers[row]}, expected {what}: whole numbers, text or booleans", row)
        return numbers.astype(np.int64)
    held = MIXED if "arrow.json" in str(values.type) else values.type
    raise Unfit(f"holds {held}, expected {what}: whole numbers, text or booleans")


def _dense(values: Any) -> npt.NDArray[Any]:
    """Return nested lists of equal lengths as an array.

    Raises:
        Unfit: Naming the first list that is shorter or longer, or holds nothing.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    shape = [len(values)]
    while pa.types.is_nested(values.type):
        if pa.types.is_struct(values.type) or pa.types.is_map(values.type):
            raise Unfit(f"holds {values.type}, expected numbers")
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != lengths[0])
        if wrong.size:
            row = int(wrong[0]) * shape[0] // len(values)
            raise Unfit(f"holds a list of {lengths[wrong[0]]}, expected {lengths[0]}", row)
        if lengths[0] == 0:
            raise Unfit("holds an empty list", 0)
        shape.append(int(lengths[0]))
        values = values.flatten()
        if values.null_count:
            missing = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
            raise Unfit("holds a missing value", missing * shape[0] // len(values))
    return _flat(values).reshape(shape)


def _flat(values: Any) -> npt.NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_decimal(values.type):
        values = values.cast(pa.float64())
    if not (pa.types.is_floating(values.type) or _is_whole(values.type)):
        raise Unfit(f"holds {values.type}, expected numbers")
    array: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


def to_numbers(values: Any) -> Numbers:
    """Return finite float32 numbers.

    Raises:
        Unfit: If it holds something else.
    """
    return as_numbers(_flat(values))


def to_float64(values: Any) -> npt.NDArray[np.float64]:
    """Return numbers with all their digits.

    Raises:
        Unfit: If it holds something else.
    """
    return _flat(values).astype(np.float64)


def _is_whole(type_: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(type_) or pa.types.is_boolean(type_))


def to_texts(values: Any) -> list[str]:
    """Return text.

    Raises:
        Unfit: If it holds something else.
    """
    import pyarrow as pa

    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise Unfit(f"holds {values.type}, expected text")
    found: list[str] = values.to_pylist()
    return found
