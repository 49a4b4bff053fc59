"""Flower records from tensors and back: the one place where the wire's format is known.

An instruction holds the model under "arrays", settings under "config" and whatever an algorithm
sends besides under "extra"; a reply holds the trained model under "arrays", `num-examples` and
metrics under "metrics", and its extras under "extra". This is Flower's own convention, so Flower's
strategies and ClientApps read it too.
"""

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.layout import Layout

ARRAYS, CONFIG, EXTRA, METRICS = "arrays", "config", "extra", "metrics"
NUM_EXAMPLES, SERVER_ROUND = "num-examples", "server-round"
WORK = "work"  # the share of its local work that a client does, in (0, 1]; all when it is missing


class ArraysMismatchError(ValueError):
    """Arrays that are not what a layout expects.

    Attributes:
        cause: "names", "shape" or "dtype".
    """

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


def array_record(named: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record of these tensors, in their order and dtypes."""
    return ArrayRecord({name: Array(to_numpy(tensor)) for name, tensor in named.items()})


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
    except Exception as error:  # bytes from elsewhere may be anything; whoever sent them is named
        raise ArraysMismatchError("dtype", f"'{name}' cannot be read: {error}") from error


def model_record(layout: Layout, params: Tensor, buffers: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the model as a record, in the layout's order and dtypes."""
    named = {**layout.unflatten(params), **buffers}
    return array_record({name: named[name] for name in layout.names})


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
    if set(record) != set(layout.names):
        missing, more = set(layout.names) - set(record), set(record) - set(layout.names)
        raise ArraysMismatchError(
            "names", f"arrays are missing {sorted(missing)} and have unknown {sorted(more)}"
        )
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
