"""A content-addressed folder per machine, where arrays are written once and mapped by everybody.

An entry's name is the hash of what it was made from. It is made in a temporary folder and renamed,
so that it exists whole or not at all; a lock file lets one process make it while the others wait.
Nothing is ever changed in place, and the whole folder may be deleted at any time.
"""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import RunError
from fedsim.basics.locks import one_at_a_time
from fedsim.data.federated import json_sha256

_INDEX = "index.json"
_DRAWN_WITH = ("basics/rng.py", "basics/ties.py")  # by code in this folder
_MAPPED_FROM = 64 * 1024  # bytes; mapping less saves nothing, and an empty array cannot be mapped


class Content(NamedTuple):
    """What an entry holds: arrays by name, and one JSON object."""

    arrays: dict[str, npt.NDArray[Any]]
    info: dict[str, Any]


def holds(root: Path, kind: str, key: Mapping[str, Any]) -> bool:
    """Return whether there is an entry of that key; it may be torn."""
    return (_folder(root, kind, key) / _INDEX).is_file()


def entry(root: Path, kind: str, key: Mapping[str, Any], make: Callable[[], Content]) -> Content:
    """Return the entry of that key, making it if it is missing or torn.

    Args:
        root: The cache folder.
        kind: Subfolder, for people who clean up.
        key: Everything that decides the content, as JSON.
        make: Called without arguments when the content must be made.

    Returns:
        The content read back, its arrays read-only, large ones as memory maps.

    Raises:
        RunError: If the folder cannot be written.
    """
    folder = _folder(root, kind, key)
    found = _read(folder)
    if found is not None:
        return found
    with _writing_to(root):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder.with_suffix(".lock"), making=_writing_to(root)):
        found = _read(folder)  # another process may have made it meanwhile
        if found is not None:
            return found
        content = make()
        with _writing_to(root):
            _write(folder, content)
    written = _read(folder)
    if written is None:
        raise RunError(f"the cache entry {folder} is torn right after writing: is the disk sound?")
    return written


@contextlib.contextmanager
def _writing_to(root: Path) -> Iterator[None]:
    """Say that the cache cannot be written when what is written inside is not taken."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the data cache {root} cannot be written ({error}): free some space, or set "
            "FEDSIM_CACHE to a writable folder"
        ) from error


def _write(folder: Path, content: Content) -> None:
    # under the lock nobody else makes this entry: what is left of it is torn, or from a killed run
    making = folder.parent / f".{folder.name}"
    for leftover in (making, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    making.mkdir()
    try:
        for name, array in content.arrays.items():
            np.save(making / f"{name}.npy", array)
        files = {path.name: path.stat().st_size for path in making.iterdir()}
        index = {"files": files, "info": content.info}
        (making / _INDEX).write_text(json.dumps(index, allow_nan=False))
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _read(folder: Path) -> Content | None:
    """Return what the folder holds, or None when it is missing or torn."""
    try:
        index = json.loads((folder / _INDEX).read_text())
        if any((folder / name).stat().st_size != size for name, size in index["files"].items()):
            return None
        arrays = {Path(name).stem: _open(folder / name) for name in index["files"]}
        return Content(arrays, index["info"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _open(path: Path) -> npt.NDArray[Any]:
    mapped = path.stat().st_size >= _MAPPED_FROM
    array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    array.flags.writeable = False
    # a plain view of the map: indexing a np.memmap drags its subclass along
    return np.asarray(array)


def _folder(root: Path, kind: str, key: Mapping[str, Any]) -> Path:
    return root / kind / json_sha256({"made_by": _code(), **key})[:32]


@functools.cache
def _code(package: Path = Path(__file__).parents[1]) -> str:
    """The hash of what loads, draws and stores, so that no entry outlives a change of it."""
    digest = hashlib.sha256(np.__version__.encode())
    for file in [*sorted((package / "data").rglob("*.py")), *(package / n for n in _DRAWN_WITH)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
