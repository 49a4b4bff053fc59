"""Single values as JSON and bytes: arrays, tensors, generators, Flower's records, dates.

Every kind is a pair: `pack_...` gives what the reader's `unpack_...` of that kind takes.
"""

import base64
import datetime
import decimal
import fractions
import pathlib
import random
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class UnheldError(ValueError):
    """A value that no checkpoint can hold; the text says what it is."""


def raw(values: np.ndarray) -> Tensor:
    """Return an array's bytes in the order of its memory, uint8 `[n]`; a view where it can be."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat if flat.flags.writeable else flat.copy())


def pack_array(values: np.ndarray) -> tuple[list[Any], Tensor]:
    """Return (dtype, shape, memory order, whether it may be written) and the bytes.

    Raises:
        UnheldError: If it holds Python objects.
    """
    if values.dtype.hasobject:
        raise UnheldError("an array of Python objects")
    described = values.dtype.descr if values.dtype.names else values.dtype.str
    columns_first = values.flags.f_contiguous and not values.flags.c_contiguous
    laid = values.T if columns_first else values
    about = [described, list(values.shape), columns_first, bool(values.flags.writeable)]
    return about, raw(laid)


def unpack_array(about: list[Any], content: Tensor) -> np.ndarray:
    """Return the array of `pack_array`, in memory of its own."""
    described, shape, columns_first, writeable = about
    dtype = np.dtype(
        described if isinstance(described, str) else [_field(each) for each in described]
    )
    laid = tuple(reversed(shape)) if columns_first else tuple(shape)
    values = np.frombuffer(content.numpy().tobytes(), dtype=dtype).reshape(laid)
    values = values.T.copy(order="F") if columns_first else values.copy()
    values.flags.writeable = writeable
    return values


def _field(described: list[Any]) -> tuple[Any, ...]:
    """A field of a structured dtype as NumPy takes it: lists of JSON are tuples."""
    name, kind, *shape = described
    inner = kind if isinstance(kind, str) else [_field(each) for each in kind]
    return (name, inner, *(tuple(each) for each in shape))


def storage_bytes(tensor: Tensor) -> Tensor:
    """Return the whole memory behind a tensor, uint8 `[n]`."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def check_tensor(tensor: Tensor) -> None:
    """Refuse a tensor that is more than numbers in memory.

    Raises:
        UnheldError: Naming what it is.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise UnheldError(f"a {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnheldError("a sparse or quantised tensor")
    if tensor.grad_fn is not None:
        raise UnheldError("a tensor with the operations that made it (give it .detach())")


def pack_seeds(seeds: Any) -> list[Any]:
    """Return the numbers of a `SeedSequence`."""
    return [seeds.entropy, list(seeds.spawn_key), seeds.pool_size, seeds.n_children_spawned]


def unpack_seeds(packed: list[Any]) -> np.random.SeedSequence:
    """Return the `SeedSequence` of these numbers."""
    entropy, spawn_key, pool_size, spawned = packed
    return np.random.SeedSequence(
        entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=spawned
    )


def pack_bits(bits: Any) -> tuple[str, list[Any] | None, Any]:
    """Return (name, seed sequence, state) of a NumPy bit generator.

    Raises:
        UnheldError: If it is none of NumPy's own.
    """
    name, seeds = type(bits).__name__, bits.seed_seq
    if name not in _BIT_GENERATORS or getattr(np.random, name) is not type(bits):
        raise UnheldError(f"a bit generator {name}")
    known = isinstance(seeds, np.random.SeedSequence) and not isinstance(seeds.entropy, np.ndarray)
    return name, pack_seeds(seeds) if known else None, bits.state


def unpack_bits(name: str, seeds: list[Any] | None, state: Any) -> Any:
    """Return the bit generator of `pack_bits`."""
    if name not in _BIT_GENERATORS:
        raise UnheldError(f"a bit generator {name}")
    bits = getattr(np.random, name)(0 if seeds is None else unpack_seeds(seeds))
    bits.state = state
    return bits


def unpack_random(state: Any) -> random.Random:
    """Return Python's generator in a state."""
    made = random.Random()
    made.setstate(state)
    return made


def pack_count(counter: Any) -> list[Any]:
    """Return where an `itertools.count` is, and its step.

    Raises:
        UnheldError: If it counts something else than plain numbers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        (start, *step) = counter.__reduce__()[1]
    if any(type(v) not in (int, float) for v in (start, *step)):
        raise UnheldError("a count of something else than numbers")
    return [start, *step]


def pack_flower_array(array: Array) -> tuple[list[Any], Tensor]:
    """Return (dtype, shape, kind) and the bytes of an array of Flower's."""
    content = torch.frombuffer(bytearray(array.data), dtype=torch.uint8) if array.data else None
    empty = torch.zeros(0, dtype=torch.uint8)
    return [array.dtype, list(array.shape), array.stype], empty if content is None else content


def unpack_flower_array(about: list[Any], content: Tensor) -> Array:
    """Return the array of `pack_flower_array`."""
    dtype, shape, stype = about
    return Array(dtype, tuple(shape), stype, content.numpy().tobytes())


def _bytes_text(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


_PATHS = {
    cls.__name__: cls for cls in (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
}
_Pair = tuple[Callable[[Any], Any], Callable[[Any], Any]]
# exact types that a short JSON value says all of
PLAIN: dict[type, tuple[str, *_Pair]] = {
    bytes: ("bytes", _bytes_text, base64.b64decode),
    bytearray: ("bytearray", _bytes_text, lambda text: bytearray(base64.b64decode(text))),
    complex: ("complex", lambda z: [z.real, z.imag], lambda pair: complex(*pair)),
    slice: ("slice", lambda s: [s.start, s.stop, s.step], lambda three: slice(*three)),
    range: ("range", lambda r: [r.start, r.stop, r.step], lambda three: range(*three)),
    datetime.datetime: (
        "datetime", datetime.datetime.isoformat, datetime.datetime.fromisoformat,
    ),
    datetime.date: ("date", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.timedelta: (
        "timedelta",
        lambda d: [d.days, d.seconds, d.microseconds],
        lambda three: datetime.timedelta(*three),
    ),
    decimal.Decimal: ("decimal", str, decimal.Decimal),
    fractions.Fraction: (
        "fraction",
        lambda f: [f.numerator, f.denominator],
        lambda pair: fractions.Fraction(*pair),
    ),
    uuid.UUID: ("uuid", str, uuid.UUID),
    torch.dtype: ("torch dtype", str, lambda text: getattr(torch, text.partition(".")[2])),
    torch.device: ("torch device", str, torch.device),
    **{
        cls: (f"path {name}", str, cls) for name, cls in _PATHS.items()
    },
}  # fmt: skip
UNPACK = {name: back for name, _, back in PLAIN.values()}
