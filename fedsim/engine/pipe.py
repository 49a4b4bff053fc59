"""A line between the driver and one worker of its machine: two pipes, without Ray between them.

A worker opens the driver's pipes through the driver's process entry, as it maps the driver's
arenas: that takes the same user on the same machine, nothing has a name in the file system, and a
line ends with either process however that ends. What is said are pickled values, as between the
processes of a run that Ray connects.
"""

import contextlib
import errno
import fcntl
import io
import os
import pickle
import select
import stat
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_CAPACITY = 1 << 20  # bytes that a pipe holds, where the system allows it
_NUMPY_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8)


class UnspeakableError(ValueError):
    """A value that cannot be pickled or unpickled, and why."""


class LineName(NamedTuple):
    """Where a worker finds its ends of the driver's pipes, and which pipes these are.

    A path does not tell: as soon as a pipe is closed its number is another file's.
    """

    reads: str
    writes: str
    pipes: tuple[int, int]  # inodes


class Line:
    """The driver's end; nothing here waits but `wait`.

    Raises:
        OSError: If the system gives no pipes.
    """

    def __init__(self) -> None:
        self._worker_reads, self._writes = os.pipe()
        self._reads, self._worker_writes = os.pipe()
        for end in (self._writes, self._reads):
            os.set_blocking(end, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _CAPACITY)
        self._leaving = memoryview(b"")
        self._arrived = bytearray()

    @property
    def name(self) -> LineName:
        """The worker's ends."""
        place, ends = f"/proc/{os.getpid()}/fd", (self._worker_reads, self._worker_writes)
        reads, writes = (os.fstat(end).st_ino for end in ends)
        return LineName(f"{place}/{ends[0]}", f"{place}/{ends[1]}", (reads, writes))

    def joined(self) -> None:
        """Leave the worker's ends to the worker, so that the line ends when it does."""
        for end in (self._worker_reads, self._worker_writes):
            if end >= 0:
                os.close(end)
        self._worker_reads = self._worker_writes = -1

    def close(self) -> None:
        """End the line."""
        self.joined()
        for end in (self._reads, self._writes):
            if end >= 0:
                os.close(end)
        self._reads = self._writes = -1

    def send(self, value: object) -> None:
        """Begin to say something; `wait` goes on with what the pipe did not take at once.

        Raises:
            UnspeakableError: If it cannot be pickled; nothing is said.
        """
        self._leaving = memoryview(_framed(value))
        self._arrived = bytearray()  # else what is left of an earlier answer was taken for this one
        self._push()

    def receive(self) -> Any:
        """Return what the worker said, after `wait` has named this line.

        Raises:
            EOFError: If the worker has ended.
            UnspeakableError: If it cannot be unpickled here.
        """
        if not self._is_whole:
            raise EOFError
        said, self._arrived = self._arrived, bytearray()
        return _read(memoryview(said)[_LENGTH.size :])

    @property
    def _is_whole(self) -> bool:
        if len(self._arrived) < _LENGTH.size:
            return False
        (length,) = _LENGTH.unpack_from(self._arrived)
        return len(self._arrived) >= _LENGTH.size + int(length)

    def _push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._leaving:
                try:
                    count = os.write(self._writes, self._leaving)
                except BrokenPipeError:  # the reader is told by the end of what it says
                    count = len(self._leaving)
                self._leaving = self._leaving[count:]

    def _pull(self) -> bool:
        """Take what has arrived; return whether all of it, or the line's end, is there."""
        with contextlib.suppress(BlockingIOError):
            while not self._is_whole:
                piece = os.read(self._reads, _CAPACITY)
                if not piece:
                    return True
                self._arrived += piece
        return self._is_whole


def wait(lines: Sequence[Line], timeout_s: float) -> list[Line]:
    """Return the lines on which a worker has said something whole, or which have ended.

    Args:
        lines: Lines on which something was sent.
        timeout_s: Seconds after which nothing is waited for.
    """
    poll = select.poll()
    by_end = {}
    for line in lines:
        by_end[line._reads] = line
        poll.register(line._reads, select.POLLIN)
        if line._leaving:
            by_end[line._writes] = line
            poll.register(line._writes, select.POLLOUT)
    done: dict[int, Line] = {}
    for end, _ in poll.poll(max(0.0, timeout_s) * 1000):
        line = by_end[end]
        if end == line._writes:
            line._push()
        elif line._pull():
            done[id(line)] = line
    return list(done.values())


class WorkerLine:
    """A worker's end.

    Raises:
        OSError: If the driver's pipes cannot be opened from here, or are gone.
    """

    def __init__(self, name: LineName) -> None:
        self._reads = _opened(name.reads, "rb", os.O_RDONLY, name.pipes[0])
        try:
            self._writes = _opened(name.writes, "wb", os.O_WRONLY, name.pipes[1])
        except OSError:
            self._reads.close()
            raise

    def receive(self) -> Any:
        """Wait for what the driver says next.

        Raises:
            EOFError: If the driver has ended, or the line.
            UnspeakableError: If it cannot be unpickled here.
        """
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        return _read(self._take(length))

    def send(self, value: object) -> None:
        """Say something.

        Raises:
            UnspeakableError: If it cannot be pickled; nothing is said.
        """
        left = memoryview(_framed(value))
        while left:
            left = left[self._writes.write(left) :]

    def _take(self, length: int) -> bytearray:
        whole = bytearray(length)
        view = memoryview(whole)
        while view:
            count = self._reads.readinto(view)
            if not count:
                raise EOFError
            view = view[count:]
        return whole


def _opened(path: str, mode: str, flags: int, pipe: int) -> io.FileIO:
    """Open an end of a pipe, and of nothing else; whatever else has its number stays as it is."""
    end = os.open(path, flags | os.O_NONBLOCK)  # which waits for nobody at the other end
    found = os.fstat(end)
    if not stat.S_ISFIFO(found.st_mode) or found.st_ino != pipe:
        os.close(end)
        raise OSError(errno.ENOENT, "the pipe is gone", path)
    os.set_blocking(end, True)
    return io.FileIO(end, mode)


def _read(said: bytearray | memoryview) -> Any:
    try:
        return pickle.loads(said)
    except Exception as error:  # whatever a class of somebody's does when it is made again
        raise UnspeakableError(f"{type(error).__name__}: {error}") from error


def _framed(value: object) -> bytes:
    buffer = io.BytesIO()
    buffer.write(bytes(_LENGTH.size))
    try:
        _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:  # whatever a class of somebody's does when it is taken apart
        raise UnspeakableError(f"{type(error).__name__}: {error}") from error
    length = buffer.tell() - _LENGTH.size
    buffer.seek(0)
    buffer.write(_LENGTH.pack(length))
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, ten times as fast as torch does."""

    def reducer_override(self, value: Any) -> Any:
        """Say how a tensor is pickled; everything else as always."""
        if type(value) is Tensor and value.device.type == "cpu" and value.dtype in _NUMPY_DTYPES:
            array = np.array(value.detach().numpy(), order="C")
            return torch.from_numpy, (array,)
        return NotImplemented
