"""The states of virtual clients; only clients that have trained take space.

A client's state is a row of bytes, as long for every client. Rows lie in main memory, in the order
in which clients first trained, up to a limit; those beyond it lie in a file without a name, which
vanishes with the process. Where a row lies changes no bit of it. Rows in memory lie in blocks, so
that none is moved when there are more of them.
"""

import contextlib
import io
import math
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import RunError

_BLOCK = 1 << 27  # bytes that are asked of the system together; they count once written
_LONG = 4096  # bytes of a row
_MOVED = 1 << 24  # bytes that are moved together between disk and memory


class _Field(NamedTuple):
    """One tensor of every client's state, and where its bytes lie in a row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: slice


class ClientStore:
    """Fixed-shape named tensors per client.

    Args:
        limit_mb: Megabytes (2^20 bytes) of client states held in main memory; None holds all.
    """

    def __init__(self, limit_mb: float | None = None) -> None:
        self._limit = None if limit_mb is None else int(limit_mb * 2**20)
        self._file: io.FileIO | None = None
        self._forget()

    def _forget(self) -> None:
        self._slots: dict[int, int] = {}
        self._fields: tuple[_Field, ...] = ()
        self._size = 0  # of a row, bytes
        self._blocks: list[np.ndarray] = []
        if self._file is not None:
            self._file.close()
        self._file = None

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def spilled(self) -> int:
        """How many clients' states lie on the disk."""
        return max(0, len(self._slots) - self._room)

    @property
    def held_bytes(self) -> int:
        """Bytes of main memory that rows have been given."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def _room(self) -> int:
        """Rows that main memory may hold."""
        if self._limit is None or not self._size:
            return len(self._slots)
        return self._limit // self._size

    def rows(self, client_ids: Sequence[int]) -> tuple[dict[str, Tensor], tuple[bool, ...]]:
        """Return (stacked states `[K, ...]`, who has one); nothing is stacked when nobody has.

        They are copies, and may be views of one array. Rows of clients without a state are zero
        and to be replaced by their initial state.
        """
        has = tuple(client in self._slots for client in client_ids)
        if not any(has):
            return {}, has
        known = [client for client in client_ids if client in self._slots]
        rows = self._read(known)
        if len(known) < len(client_ids):
            full = np.zeros(len(client_ids), dtype=self._dtype)
            full[np.array(has)] = rows
            rows = full
        return self._unpacked(rows), has

    def commit(self, client_ids: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Replace the states of these clients by the rows of `state`.

        Raises:
            RunError: If the disk does not take them.
            ValueError: If `state` holds other tensors than the states of other clients.
        """
        if not state or not len(client_ids):
            return
        fields, size = _layout(state)
        if not self._fields:
            self._fields, self._size = fields, size
        elif fields != self._fields:
            raise ValueError(f"a client's state holds {fields}, those of others {self._fields}")
        for client in client_ids:
            self._slots.setdefault(client, len(self._slots))
        self._write(client_ids, self._parts(state, len(client_ids)))

    def export(self) -> tuple[list[int], dict[str, Tensor]]:
        """Return (clients in order, stacked states) for a checkpoint: copies.

        What main memory may not hold lies in a file of its own, mapped.

        Raises:
            RunError: If the disk has no room for that.
        """
        clients = sorted(self._slots)
        if not clients:
            return [], {}
        of = _mapped if self.spilled else _empty
        with _named():
            stacked = {f.name: of((len(clients), *f.shape), f.dtype) for f in self._fields}
        for span in _spans(len(clients), self._size):
            part = self._unpacked(self._read(clients[span]))
            for name, tensor in part.items():
                stacked[name][span] = tensor
        return clients, stacked

    def restore(self, client_ids: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Hold exactly these states."""
        self._forget()
        size = _layout(state)[1] if state else 1
        for span in _spans(len(client_ids), size):
            self.commit(client_ids[span], {name: stack[span] for name, stack in state.items()})

    # --- rows of bytes --------------------------------------------------------------------

    @property
    def _dtype(self) -> np.dtype[np.void]:
        """A row, which NumPy moves as one thing."""
        return np.dtype((np.void, self._size))

    @property
    def _per_block(self) -> int:
        return max(1, _BLOCK // self._size)

    def _parts(self, state: Mapping[str, Tensor], count: int) -> list[np.ndarray]:
        """Return the bytes of each field, `[count, size of the field]`."""
        parts = [state[field.name].detach().cpu().contiguous() for field in self._fields]
        flat = [part.reshape(count, math.prod(part.shape[1:])) for part in parts]
        return [part.view(torch.uint8).numpy() for part in flat]

    def _packed(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return whole rows made of their fields' bytes."""
        rows = parts[0]
        if len(parts) > 1 or rows.shape[1] != self._size:
            rows = np.zeros((len(rows), self._size), dtype=np.uint8)
            for field, part in zip(self._fields, parts, strict=True):
                rows[:, field.place] = part
        return rows.view(self._dtype)[:, 0]

    def _unpacked(self, rows: np.ndarray) -> dict[str, Tensor]:
        numbers = torch.from_numpy(_bytes(rows))
        return {
            name: self._field_of(numbers, place, dtype).reshape(len(rows), *shape)
            for name, shape, dtype, place in self._fields
        }

    def _field_of(self, numbers: Tensor, place: slice, dtype: torch.dtype) -> Tensor:
        """Return the numbers of a field of rows of bytes: a view where they lie even."""
        even = torch.empty((), dtype=dtype).element_size()
        if place.start % even or self._size % even or place.start == place.stop:
            apart = numbers[:, place].clone(memory_format=torch.contiguous_format)
            return apart.reshape(-1).view(dtype)
        return numbers[:, place].view(dtype)

    def _read(self, clients: Sequence[int]) -> np.ndarray:
        slots = self._slots_of(clients)
        if len(self._blocks) == 1 and not self._file:
            return np.take(self._blocks[0], slots)
        rows = np.empty(len(slots), dtype=self._dtype)
        for block, mine, places in self._in_memory(slots):
            _copy(block, places, rows, mine)
        for row, offset in self._on_disk(slots, rows):
            assert self._file is not None
            read = os.preadv(self._file.fileno(), [row], offset)
            assert read == self._size
        return rows

    def _write(self, clients: Sequence[int], parts: Sequence[np.ndarray]) -> None:
        slots = self._slots_of(clients)
        self._grow()
        if self._size >= _LONG and int(slots.max()) < self._room:
            for block, mine, places in self._in_memory(slots):
                for field, part in zip(self._fields, parts, strict=True):
                    _copy_long(part, mine, _bytes(block)[:, field.place], places)
            return
        rows = self._packed(parts)
        for block, mine, places in self._in_memory(slots):
            _copy(rows, mine, block, places)
        with _named():
            for row, offset in self._on_disk(slots, rows):
                if self._file is None:
                    self._file = tempfile.TemporaryFile(prefix="fedsim", buffering=0)  # noqa: SIM115
                    weakref.finalize(self, self._file.close)
                if os.pwrite(self._file.fileno(), row, offset) != self._size:
                    raise OSError("the disk took only a part of a client's state")

    def _slots_of(self, clients: Sequence[int]) -> np.ndarray:
        return np.array([self._slots[client] for client in clients], dtype=np.int64)

    def _in_memory(self, slots: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (block, which of the slots lie in it, where)."""
        held = np.flatnonzero(slots < self._room)
        numbers, places = np.divmod(slots[held], self._per_block)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            yield self._blocks[number], held[mine], places[mine]

    def _on_disk(self, slots: np.ndarray, rows: np.ndarray) -> Iterator[tuple[memoryview, int]]:
        """Yield (a row's bytes, where they lie in the file)."""
        room = self._room
        beyond = np.flatnonzero(slots >= room).tolist()
        numbers = _bytes(rows) if beyond else rows
        for row in beyond:
            yield numbers[row].data, (int(slots[row]) - room) * self._size

    def _grow(self) -> None:
        """Get blocks for the rows that main memory holds."""
        most = None if self._limit is None else self._room
        held = sum(map(len, self._blocks))
        while held < min(len(self._slots), self._room):
            rows = self._per_block if most is None else min(self._per_block, most - held)
            self._blocks.append(np.empty(rows, dtype=self._dtype))
            held += rows


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Say what the disk did not take, and what helps."""
    try:
        yield
    except OSError as error:
        raise RunError(
            "[engine] state_limit_mb: client states beyond it cannot be written to "
            f"{tempfile.gettempdir()}: {error.strerror or error}; make room there, set TMPDIR to a "
            "folder with room, or raise the limit"
        ) from error


def _copy(rows: np.ndarray, places: np.ndarray, to: np.ndarray, at: np.ndarray) -> None:
    """Copy some rows: short ones at once, long ones without another copy in between."""
    if rows.itemsize < _LONG:
        to[at] = rows[places]
        return
    _copy_long(_bytes(rows), places, _bytes(to), at)


def _copy_long(read: np.ndarray, places: np.ndarray, to: np.ndarray, at: np.ndarray) -> None:
    """Copy some rows of bytes `[K, size]`, one after another."""
    for place, target in zip(places.tolist(), at.tolist(), strict=True):
        to[target] = read[place]


def _bytes(rows: np.ndarray) -> np.ndarray:
    """The bytes of rows, `[K, size]`."""
    return rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)


def _layout(state: Mapping[str, Tensor]) -> tuple[tuple[_Field, ...], int]:
    """Return where the tensors of one client lie in its row, and the row's size in bytes."""
    fields, end = [], 0
    for name in sorted(state):
        tensor = state[name]
        size = tensor[0].numel() * tensor.element_size()
        fields.append(_Field(name, tuple(tensor.shape[1:]), tensor.dtype, slice(end, end + size)))
        end += size
    return tuple(fields), max(1, end)


def _spans(count: int, size: int) -> Iterator[slice]:
    """Cut so many rows of a size into blocks."""
    rows = max(1, _MOVED // size)
    for first in range(0, count, rows):
        yield slice(first, min(first + rows, count))


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor in main memory, whatever it holds."""
    return torch.empty(shape, dtype=dtype)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that lies in a file without a name.

    Raises:
        OSError: If the disk has no room for it.
    """
    count = int(np.prod(shape, dtype=np.int64))
    size = max(1, count * torch.empty((), dtype=dtype).element_size())
    with tempfile.TemporaryFile(prefix="fedsim") as file:
        # no hole: where the disk is full, writing into one ends the process
        os.posix_fallocate(file.fileno(), 0, size)
        raw = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(raw).view(dtype).reshape(shape)
