"""What a user's own code reads besides modules while it runs: files, and environment variables.

A configuration beside a model decides a result as the model's source does. Which files are read is
seen while they are opened: of a user's code itself, and of libraries that it calls. What fedsim
reads, and what an import reads, are not among them; nor is what a library opens without Python's
knowledge (HDF5, Arrow).
"""

import contextlib
import functools
import hashlib
import linecache
import os
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

_SHOWS_SOURCES = linecache.__file__  # of warnings and errors
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_NO_FILES = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/share/")  # the system's
_MANY = 8  # variables that one line reads: it copies the environment
# where is computed, not what
_MACHINE = ("HOME", "USER", "LOGNAME", "PATH", "PWD", "TMPDIR", "HOSTNAME", "LANG", "DISPLAY")
_MACHINE_LIKE = ("CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "RAY_", "FEDSIM_", "SLURM_",
                 "XDG_", "LC_", "PYTHON")  # fmt: skip
ENVIRONMENT = "$"  # begins the names of variables among those of files


class _Seen:
    """What one watch has seen so far.

    Attributes:
        files: Paths that were opened to be read, in order.
        written: Paths that were opened to be written too: what a program makes itself.
        variables: The line that read each variable.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = tuple(os.path.realpath(each) + os.sep for each in folders)
        self.files: dict[str, None] = {}
        self.written: set[str] = set()
        self.variables: dict[str, tuple[str, int]] = {}


class _Watch(threading.local):
    """The watches of this thread that have not ended."""

    def __init__(self) -> None:
        self.open: list[_Seen] = []


class Reads(NamedTuple):
    """Hashes of what was read.

    Attributes:
        found: The hash of each file's content, by its path, from the project's folder where it lies
            in it; and of each environment variable's value, by its name behind a "$".
    """

    found: dict[str, str]


_watch = _Watch()
_lock = threading.Lock()
_hooked = False


@contextlib.contextmanager
def watching(folders: Sequence[str]) -> Iterator[Reads]:
    """Watch what code in some folders, or in `__main__`, reads in this thread.

    Args:
        folders: Those of a project.

    Yields:
        What was read, filled in at the end.
    """
    seen, reads = _Seen(folders), Reads({})
    _hook()
    _watch.open.append(seen)
    try:
        yield reads
    finally:
        _watch.open.remove(seen)
        lines = list(seen.variables.values())
        for name in [n for n, line in seen.variables.items() if lines.count(line) <= _MANY]:
            reads.found[ENVIRONMENT + name] = _of_variable(name)
        for path in seen.files.keys() - seen.written:
            if (digest := _of_file(path)) is not None:
                reads.found[_shown(path, folders)] = digest


def by_now(
    before: Mapping[str, str], folders: Sequence[str], moves: Sequence[tuple[str, str]] = ()
) -> dict[str, str]:
    """Return the hashes, as they are now, of what was read.

    Args:
        before: What was read, see `Reads`. A file outside of the project that is no longer there
            counts as it was: what reads it finds it elsewhere, or says so.
        folders: Those of the project.
        moves: Where files and folders lay that have been moved, and where they lie now.
    """
    now = {}
    for name, digest in before.items():
        if name.startswith(ENVIRONMENT):
            now[name] = _of_variable(name.removeprefix(ENVIRONMENT))
            continue
        path = os.path.expanduser(name)
        places = [path] if os.path.isabs(path) else [os.path.join(each, name) for each in folders]
        there = [moved for place in places if (moved := _moved(place, moves))] or places
        found = next((each for each in map(_of_file, there) if each is not None), None)
        if found is not None or os.path.isabs(path):
            now[name] = found or digest
    return now


def _moved(path: str, moves: Sequence[tuple[str, str]]) -> str | None:
    """Where a file lies now that has been moved, or None."""
    for old, new in moves:
        if path == old or path.startswith(old + os.sep):
            return new + path[len(old) :]
    return None


def _hook() -> None:
    """Learn of opened files; once per process, for a hook can not be taken away."""
    global _hooked
    with _lock:
        if not _hooked:
            _hooked = True
            sys.addaudithook(_heard)
            environment: Any = type(os.environ)
            environment.__getitem__ = _told(environment.__getitem__)


def _heard(event: str, arguments: tuple[Any, ...], watch: _Watch = _watch) -> None:
    # Python calls it to the end, when variables of modules are gone
    if event != "open" or not watch.open:
        return
    watches, watch.open = watch.open, []  # what this itself opens is nobody's
    try:
        path, mode, flags = arguments
        if isinstance(path, str | bytes):
            _take_down(watches, os.path.realpath(os.fsdecode(path)), mode, flags)
    finally:
        watch.open = watches


def _take_down(watches: Sequence[_Seen], path: str, mode: str | None, flags: int) -> None:
    if path.startswith((_OURS, *_NO_FILES)) or _is_installed(os.path.dirname(path)):
        return
    writes = bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))
    for seen in watches:
        if not _users(sys._getframe(2), seen.folders):
            continue
        if writes:
            seen.written.add(path)
        elif path not in seen.written:
            seen.files[path] = None


def _users(frame: FrameType | None, folders: Sequence[str]) -> bool:
    """Whether a user's code has asked for what is done, itself or through a library."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith((_OURS, _SHOWS_SOURCES, "<frozen importlib")):
            return False
        if _is_users(frame, file, folders):
            return True
        frame = frame.f_back
    return False


def _is_users(frame: FrameType, file: str, folders: Sequence[str]) -> bool:
    if frame.f_globals.get("__name__") == "__main__":  # a script, or a notebook's cell
        return True
    return _real(file).startswith(tuple(folders)) and not _is_installed(os.path.dirname(file))


def _told(get: Any, watch: _Watch = _watch) -> Any:
    @functools.wraps(get)
    def told(self: MutableMapping[str, str], key: str) -> Any:
        if watch.open and self is os.environ:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename in _PASSED_ON:
                frame = frame.f_back
            if frame is not None and isinstance(key, str) and not _of_machine(key):
                for seen in watch.open:
                    if _is_users(frame, frame.f_code.co_filename, seen.folders):
                        seen.variables[key] = frame.f_code.co_filename, frame.f_lineno
        return get(self, key)

    return told


_PASSED_ON = {os.getenv.__code__.co_filename, Mapping.get.__code__.co_filename}


def _of_machine(variable: str) -> bool:
    return variable in _MACHINE or variable.startswith(_MACHINE_LIKE)


def _of_variable(name: str) -> str:
    value = os.environ.get(name)
    return "" if value is None else hashlib.sha256(f"{name}={value}".encode()).hexdigest()


def _of_file(path: str) -> str | None:
    try:
        found = os.stat(path)
        return _digest(path, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
    except OSError:
        return None


@functools.lru_cache(maxsize=1024)
def _digest(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=4096)
def _real(file: str) -> str:
    return os.path.realpath(file)


def _shown(path: str, folders: Sequence[str]) -> str:
    for folder in folders:
        root = os.path.realpath(folder) + os.sep
        if path.startswith(root):
            return path.removeprefix(root).replace(os.sep, "/")
    return path


@functools.lru_cache(maxsize=4096)
def _is_installed(folder: str) -> bool:
    if {"site-packages", "dist-packages"} & set(folder.split(os.sep)):
        return True
    return _real(folder).startswith(os.path.realpath(os.path.dirname(os.__file__)))
