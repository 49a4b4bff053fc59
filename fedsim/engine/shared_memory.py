"""Shared memory between the driver and the workers of one machine.

An arena is an anonymous file in memory that workers open through the driver's process entry, so it
vanishes with the driver however that ends and nothing is left behind in a shared folder.
"""

import itertools
import mmap
import os
import secrets
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.messages.layout import Payload

_ALIGNMENT = 64
_NAME = "fedsim"
_SIGN = 16  # bytes
_numbers = itertools.count()


class ArenaName(NamedTuple):
    """Where another process of this machine finds an arena.

    The number is never given twice, whereas the path of an arena that is gone is soon another's.
    """

    path: str
    size: int
    number: int


class ArenaPlace(NamedTuple):
    """One tensor in an arena."""

    group: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Arena:
    """A piece of memory that this process owns and others may map.

    Args:
        size: Bytes, > 0.

    Raises:
        OSError: If the system gives no such memory.
    """

    def __init__(self, size: int) -> None:
        self._file = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, size)
        self.size = size
        self._number = next(_numbers)
        self._map = mmap.mmap(self._file, size)
        self._lent: weakref.ref[np.ndarray] | None = None

    @property
    def name(self) -> ArenaName:
        """The arena's address for other processes."""
        return ArenaName(f"/proc/{os.getpid()}/fd/{self._file}", self.size, self._number)

    @property
    def is_free(self) -> bool:
        """Whether no tensor handed out by `lend` is alive."""
        return self._lent is None or self._lent() is None

    def lend(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor over the arena's beginning; the arena is taken while anybody holds it."""
        raw = np.frombuffer(self._map, dtype=np.uint8)
        self._lent = weakref.ref(raw)
        return _tensor(raw, dtype, shape, 0)

    def write(self, payload: Payload) -> list[ArenaPlace]:
        """Copy a payload's tensors into the arena and say where they lie."""
        raw = np.frombuffer(self._map, dtype=np.uint8)
        places = []
        offset = 0
        for group, named in _groups(payload).items():
            for name, tensor in named.items():
                place = ArenaPlace(group, name, tensor.dtype, tuple(tensor.shape), offset)
                _tensor(raw, place.dtype, place.shape, offset).copy_(tensor)
                places.append(place)
                offset += _aligned(tensor.numel() * tensor.element_size())
        return places


class ArenaView:
    """Another process's arena, mapped."""

    def __init__(self, name: ArenaName) -> None:
        with open(name.path, "r+b") as file:
            self._raw = np.frombuffer(mmap.mmap(file.fileno(), name.size), dtype=np.uint8)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
        """Return a tensor over the arena."""
        return _tensor(self._raw, dtype, shape, offset)

    def read(self, places: list[ArenaPlace]) -> Payload:
        """Return a payload over the arena; nothing is copied."""
        groups: dict[str, dict[str, Tensor]] = {"params": {}, "buffers": {}, "extra": {}}
        for place in places:
            groups[place.group][place.name] = self.tensor(place.dtype, place.shape, place.offset)
        return Payload(groups["params"].get("params"), groups["buffers"], groups["extra"])


class Sign(NamedTuple):
    """A random number, and where in its owner's memory it is written."""

    arena: ArenaName
    number: bytes

    def is_seen(self) -> bool:
        """Whether this process can map that memory.

        On another machine the path is nobody's, or another process's, whose file stays untouched.
        """
        try:
            if not os.readlink(self.arena.path).startswith(f"/memfd:{_NAME}"):
                return False
            seen = ArenaView(self.arena).tensor(torch.uint8, (_SIGN,))
        except (OSError, ValueError):  # ValueError: it is smaller than that
            return False
        return seen.numpy().tobytes() == self.number


class Probe:
    """An arena by which other processes find out whether they share memory with this one.

    Raises:
        OSError: If the system gives no such memory.
    """

    def __init__(self) -> None:
        self._arena = Arena(_SIGN)
        number = secrets.token_bytes(_SIGN)
        written = self._arena.lend(torch.uint8, (_SIGN,))
        written.copy_(torch.frombuffer(bytearray(number), dtype=torch.uint8))
        self.sign = Sign(self._arena.name, number)


def payload_size(payload: Payload) -> int:
    """Return the bytes that `Arena.write` takes for a payload, at least 1."""
    return 1 + sum(
        _aligned(tensor.numel() * tensor.element_size())
        for named in _groups(payload).values()
        for tensor in named.values()
    )


def _groups(payload: Payload) -> dict[str, Mapping[str, Tensor]]:
    params = {} if payload.params is None else {"params": payload.params}
    return {"params": params, "buffers": payload.buffers, "extra": payload.extra}


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _tensor(raw: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    size = count * torch.empty((), dtype=dtype).element_size()
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(raw[offset : offset + size]).view(dtype).reshape(shape)
