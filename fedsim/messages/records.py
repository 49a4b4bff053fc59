"""Flower records from tensors and back: the one place where the wire's format is known.

An instruction holds the model under "arrays", settings under "config" and whatever an algorithm
sends besides under "extra"; a reply holds the trained model under "arrays", `num-examples` and
metrics under "metrics", and its extras under "extra". This is Flower's own convention, so Flower's
strategies and ClientApps read it too.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from fedsim.messages.layout import Layout

ARRAYS, CONFIG, EXTRA, METRICS = "arrays", "config", "extra", "metrics"
NUM_EXAMPLES, SERVER_ROUND = "num-examples", "server-round"
_NUMPY = "numpy.ndarray"  # what Flower calls bytes of `numpy.save`
_WIDEST, _HEADER = 16, 65536  # bytes of a complex number, and of a header that is longer than any
WORK = "work"  # the share of its local work that a client does, in (0, 1]; all when it is missing


class ArraysMismatchError(ValueError):
    """Arrays that are not what a layout expects.

    Attributes:
        cause: "names", "shape" or "dtype".
    """

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class _Packed(NamedTuple):
    """The model that this process packed last: unpacking that very record gives it back.

    A record is known by its arrays' bytes, the objects themselves, which nobody can alter. Tensors
    can be altered, by a strategy that is not pure: torch counts that, and they are not used then.
    """

    layout: Layout
    data: tuple[bytes, ...]
    params: Tensor
    buffers: dict[str, Tensor]

    def is_in(self, record: ArrayRecord) -> bool:
        """Whether the record holds this model, in whatever object."""
        if any(tensor._version for tensor in (self.params, *self.buffers.values())):
            return False
        arrays = [record.get(name) for name in self.layout.names]
        return len(record) == len(arrays) and all(
            array is not None and array.data is data
            for array, data in zip(arrays, self.data, strict=True)
        )


_packed: _Packed | None = None


def array_record(named: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record of these tensors, in their order and dtypes."""
    return ArrayRecord({name: _array(to_numpy(tensor)) for name, tensor in named.items()})


def _array(values: np.ndarray) -> Array:
    """Return what `Array(values)` returns, with one copy in place of three."""
    content = values.reshape(-1).view(np.uint8).data
    data = b"".join((_npy_header(values.dtype, values.shape), content))
    return Array(_name_of(values.dtype), values.shape, _NUMPY, data)


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[Any]) -> str:
    return str(dtype)


@lru_cache(maxsize=1024)
def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return what `numpy.save` writes before the numbers of an array in C order."""
    buffer = BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return the tensor as a C-contiguous array in host memory."""
    return np.asarray(tensor.detach().cpu().contiguous().numpy())


def named_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return a record's tensors; the record stays as it is.

    Raises:
        ArraysMismatchError: If an array cannot be read or is of a type that torch does not have.
    """
    return {name: _tensor(name, array) for name, array in record.items()}


def _tensor(name: str, array: Array) -> Tensor:
    try:
        values = array.numpy()
        if not isinstance(values, np.ndarray):
            raise TypeError(f"holds a {type(values).__name__}, not one array")
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    except Exception as error:  # bytes from elsewhere may be anything; their sender is named
        raise ArraysMismatchError("dtype", f"'{name}' cannot be read: {error}") from error


def model_record(layout: Layout, params: Tensor, buffers: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the model as a record, in the layout's order and dtypes."""
    named = {**layout.unflatten(params), **buffers}
    return array_record({name: named[name] for name in layout.names})


def kept_model_record(layout: Layout, params: Tensor, buffers: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the model as `model_record` does, and make unpacking it no work.

    Args:
        layout: The layout.
        params: Flat parameters `[dim]`.
        buffers: The buffers.
    """
    global _packed
    record = model_record(layout, params, buffers)
    # where unpacking would cast a tensor, or packing has rounded it, the record is read
    exact = {spec.dtype for spec in layout.trainable} == {params.dtype} and all(
        buffers[spec.name].dtype == spec.dtype for spec in layout.buffers
    )
    if exact and params.device.type == "cpu":
        copies = {spec.name: buffers[spec.name].detach().clone() for spec in layout.buffers}
        data = tuple(record[name].data for name in layout.names)
        _packed = _Packed(layout, data, params.detach().clone(), copies)
    return record


def first_not_finite(record: ArrayRecord) -> str | None:
    """Return the name of a record's first array of floats with NaN or infinity, if there is one."""
    if _packed is not None and _packed.is_in(record):
        floats = [t for t in _packed.buffers.values() if t.is_floating_point()]
        if all(math.isfinite(float(tensor.sum())) for tensor in (_packed.params, *floats)):
            return None  # a sum is finite only if all of it is
    for name, array in record.items():
        values = array.numpy()
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return name
    return None


def model_tensors(
    layout: Layout, record: ArrayRecord, *, strict: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (flat parameters `[dim]`, buffers) of a record.

    Args:
        layout: What is expected.
        record: The arrays.
        strict: Whether another dtype is refused; otherwise the layout's dtype is imposed (Flower's
            FedAdam turns a model into float64).

    Raises:
        ArraysMismatchError: If a name is missing or unknown, or a shape (strict: a dtype) differs.
    """
    if _packed is not None and _packed.layout == layout and _packed.is_in(record):
        return _packed.params, dict(_packed.buffers)
    if set(record) != set(layout.names):
        missing, more = set(layout.names) - set(record), set(record) - set(layout.names)
        raise ArraysMismatchError(
            "names", f"arrays are missing {sorted(missing)} and have unknown {sorted(more)}"
        )
    for spec in (*layout.trainable, *layout.buffers):
        # what cannot be this tensor is not read, for reading takes as much memory again
        held, limit = len(record[spec.name].data), _WIDEST * math.prod(spec.shape) + _HEADER
        if held > limit:
            text = f"'{spec.name}' has {held} bytes, expected shape {spec.shape} in at most {limit}"
            raise ArraysMismatchError("shape", text)
    named = named_tensors(record)
    for spec in (*layout.trainable, *layout.buffers):
        tensor = named[spec.name]
        if tuple(tensor.shape) != spec.shape:
            text = f"'{spec.name}' has shape {tuple(tensor.shape)}, expected {spec.shape}"
            raise ArraysMismatchError("shape", text)
        if tensor.dtype != spec.dtype:
            if strict:
                text = f"'{spec.name}' is {tensor.dtype}, expected {spec.dtype}"
                raise ArraysMismatchError("dtype", text)
            named[spec.name] = tensor.to(spec.dtype)
    return layout.flatten(named), {spec.name: named[spec.name] for spec in layout.buffers}


def only_arrays(content: RecordDict) -> ArrayRecord | None:
    """Return the model's record of a message: the one under "arrays", or the only one there is."""
    records = content.array_records
    if ARRAYS in records:
        return records[ARRAYS]
    return next(iter(records.values())) if len(records) == 1 else None


def only_metrics(content: RecordDict) -> MetricRecord | None:
    """Return the metrics of a reply: those under "metrics", or the only ones there are."""
    records = content.metric_records
    if METRICS in records:
        return records[METRICS]
    return next(iter(records.values())) if len(records) == 1 else None


CLIENT_STATE = "client-state"


PARTITION = "partition"


PARTITION_ID = "partition-id"


SOFTWARE = "software"


DATA = "data"  # what a site says of its data, as JSON


EXPERIMENT = "experiment"  # which run, however often it was gone on with: the record, and its key


KEEPS_STATE = "keeps-state"  # whether a node keeps client states where they outlive it


AGREED = "agreed"  # what all sites agreed on: the record of an instruction, and its key
