"""The folders whose modules a scenario names: those of one project are open at a time.

Two projects of a session may each have a `model.py`. So a scenario's folders are opened whenever it
is read or built: what other projects have imported is put aside, to be there again when theirs are
opened, and a module whose file has changed is imported anew. Modules of an open folder are compiled
from the bytes of their file, never taken from a store of compiled ones, which knows files by whole
seconds. What is installed and what Python brings along comes first, as everywhere.
"""

import functools
import hashlib
import importlib
import os
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

from fedsim.basics.reads import by_now, watching
from fedsim.basics.turns import others_run, real, require_free

OURS = frozenset({"fedsim", "strategies", "clients", "__main__"})  # never put aside

_lock = threading.RLock()
_open: tuple[str, ...] = ()
_managed: set[str] = set()  # every folder that was ever open
_added: list[str] = []  # what of them stands on sys.path
_aside: dict[str, dict[str, ModuleType]] = {}  # by folder
_paths_aside: dict[str, list[str]] = {}  # what a project's modules put on sys.path, by folder
_no_projects: dict[str, ModuleType] = {}  # thousands, which no scenario need look at again
_loaded: dict[str, str] = {}  # the hash of each file as it was imported
# what each module read while it was imported; two projects may each have one of a name
_read: "weakref.WeakKeyDictionary[ModuleType, dict[str, str]]" = weakref.WeakKeyDictionary()
_read_later: dict[tuple[str, ...], dict[str, str]] = {}  # by folders, what their code read later
_unchanged: dict[str, tuple[ModuleType, tuple[int, ...]]] = {}  # by module, what `_stamp` said
_SETTLED_NS = 2_000_000_000  # file systems keep times in steps of up to two seconds


def enter(folders: Sequence[str]) -> None:
    """Open a project's folders, and no others.

    Args:
        folders: Absolute paths, the first one first; none closes those that are open, unless
            another thread runs code in them.

    Raises:
        ScenarioError: If another thread runs code of another project.
    """
    global _open
    wanted = real(folders)
    if not wanted and others_run(wanted):
        return
    require_free(wanted)
    with _lock:
        if wanted != _open:
            _put_aside(wanted)
            _open = wanted
            if not _managed.issuperset(wanted):
                _managed.update(wanted)
                _no_projects.clear()
            _stand_on_path(wanted)
            if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder())
            importlib.invalidate_caches()
            for folder in wanted:
                for name, module in _aside.pop(folder, {}).items():
                    sys.modules.setdefault(name, module)
                sys.path[:0] = [e for e in _paths_aside.pop(folder, ()) if e not in sys.path]
        _forget_changed(wanted)


def opened() -> tuple[str, ...]:
    """Return the folders that are open."""
    return _open


def has_read(found: Mapping[str, str]) -> None:
    """Take down what the open folders' code has read: once that changes, modules are made anew."""
    _read_later.setdefault(_open, {}).update(found)


def read_by_modules(files: Collection[str]) -> dict[str, str]:
    """Return what modules have read while they were imported, see `Reads`.

    Args:
        files: The files of those that are asked for, from their folder, see `Code`.
    """
    found: dict[str, str] = {}
    for module, mine in _read.items():
        place = module.__name__.replace(".", "/")
        asked_for = not {f"{place}.py", f"{place}/__init__.py"}.isdisjoint(files)
        if asked_for and sys.modules.get(module.__name__) is module:
            found |= mine
    return found


def plain_path() -> list[str]:
    """Return `sys.path` as it is without open folders."""
    return [entry for entry in sys.path if entry not in _added]


def provides(folder: str, top: str) -> str | None:
    """Return the file or folder that makes a top-level module in a folder, or None.

    A folder without `__init__.py` is one only where Python finds nothing else.
    """
    inside = os.path.join(folder, top)
    for file in (os.path.join(inside, "__init__.py"), f"{inside}.py"):
        if os.path.isfile(file):
            return file
    spec = PathFinder.find_spec(top, [folder])
    if spec is None:
        return None
    return spec.origin or inside


def installed(top: str) -> str | None:
    """Return what comes before any project's module of that name, in words, or None."""
    if top in OURS:
        return "fedsim's own"
    if top in sys.stdlib_module_names:
        return "Python's own"
    return _in_packages(top)


def root_outside(top: str) -> str | None:
    """Return the folder on `sys.path` in which a module lies that is not installed, or None."""
    if not top.isidentifier() or installed(top) is not None:
        return None
    path = [entry for entry in plain_path() if not is_installed(entry)]
    spec = PathFinder.find_spec(top, path) or _installed_to_be_edited(top)
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        inside = next(iter(spec.submodule_search_locations), None)
        return None if inside is None else os.path.realpath(os.path.dirname(inside))
    if not spec.has_location or spec.origin is None:
        return None
    return os.path.realpath(os.path.dirname(spec.origin))


@functools.cache
def is_installed(folder: str) -> bool:
    """Return whether a folder of `sys.path` holds Python's own modules or installed packages."""
    real = os.path.realpath(folder or os.curdir)
    if {"site-packages", "dist-packages"} & set(real.split(os.sep)):
        return True
    own = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    return real in own or os.path.dirname(real) in own or real.endswith(".zip")


class _Loader(SourceFileLoader):
    """Compiles the file as it is now, and remembers its content."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        _loaded[os.path.realpath(path)] = hashlib.sha256(source).hexdigest()
        code: CodeType = self.source_to_code(source, path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        with watching(_open) as reads:
            super().exec_module(module)
        _read[module] = reads.found


class _Finder:
    """Finds modules of the open folders before those of other folders that are not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module in an open folder."""
        if not _open or name.partition(".")[0] in OURS:
            return None
        if path is None:
            below = [entry for entry in sys.path if entry not in _open and _inside_open(entry)]
            where = [] if installed(name) else [*_open, *below]
        else:
            where = [each for each in path if _inside_open(each)]
        spec = PathFinder.find_spec(name, where, target) if where else None
        if spec is None or spec.loader is None:
            return None
        if type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
            spec.cached = None
        return spec


def _inside_open(place: str) -> bool:
    real = os.path.realpath(place)
    inside = any(real == folder or real.startswith(folder + os.sep) for folder in _open)
    return inside and not is_installed(real)


def _put_aside(wanted: Sequence[str]) -> None:
    """Take out of `sys.modules` what a process that had opened these folders alone would lack."""
    plain = {os.path.realpath(entry or os.curdir) for entry in plain_path()}
    for name, _, root in list(_modules()):
        owner = _owner(root, {*_managed, *wanted})
        if owner in wanted:
            continue
        top = name.partition(".")[0]
        left = owner in _managed and owner not in plain
        if left or (not is_installed(root) and _shadowed(wanted, top)):
            _aside.setdefault(owner, {})[name] = sys.modules.pop(name)
    for entry in plain_path():  # a project's modules may have put folders below it there
        root = os.path.realpath(entry or os.curdir)
        owner = _owner(root, _managed)
        if owner != root and owner in _managed and owner not in plain and owner not in wanted:
            _paths_aside.setdefault(owner, []).append(entry)
            sys.path.remove(entry)


def _owner(root: str, folders: Collection[str]) -> str:
    """The project's folder in which a folder lies, the innermost; the folder itself if in none."""
    above = root
    while above not in folders:
        up = os.path.dirname(above)
        if up == above or is_installed(root):
            return root
        above = up
    return above


def _shadowed(folders: Sequence[str], top: str) -> bool:
    return top != "conftest" and any(
        os.path.isfile(os.path.join(folder, *tail))
        for folder in folders
        for tail in ((f"{top}.py",), (top, "__init__.py"))
    )


def _forget_changed(folders: Sequence[str]) -> None:
    """Import a project's modules anew, all of them, when the file of one is another by now."""
    if not folders:
        return
    mine = [(name, each) for name, each, root in _modules() if _owner(root, folders) in folders]
    changed = [name for name, module in mine if _differs_by_now(name, module)]  # looks at all
    read = _read_later.get(_open, {})
    if changed or by_now(read, folders) != read:
        _read_later.pop(_open, None)
        for name, _ in mine:
            del sys.modules[name]
        importlib.invalidate_caches()


def _differs_by_now(name: str, module: ModuleType) -> bool:
    """Whether a module's file has changed; read only if it may have since it was read last.

    Or what the module has read while it was imported.
    """
    if (read := _read.get(module)) and by_now(read, _open) != read:
        return True
    stamp = _stamp(module)
    found = _unchanged.get(name)
    if stamp is not None and found is not None and found[0] is module and found[1] == stamp:
        return False
    if _has_changed(module):
        return True
    if stamp is not None:
        _unchanged[name] = module, stamp
    return False


def _stamp(module: ModuleType) -> tuple[int, ...] | None:
    """What the system says of a module's file and no write leaves as it was; None if one might.

    A write so soon after another that both have one time would: only times past tell them apart.
    """
    try:
        found = os.stat(getattr(module, "__file__", None) or "")
    except (OSError, TypeError):
        return None
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED_NS:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _has_changed(module: ModuleType) -> bool:
    file = os.path.realpath(getattr(module, "__file__", None) or "")
    if not file.endswith(".py"):
        return False
    if not os.path.isfile(file):
        return True
    with open(file, "rb") as source:
        now = hashlib.sha256(source.read()).hexdigest()
    return _loaded.setdefault(file, now) != now or _older_than_file(module, file)


def _older_than_file(module: ModuleType, file: str) -> bool:
    """Whether somebody else's import may have seen another source than the file holds by now."""
    if isinstance(getattr(module, "__loader__", None), _Loader):
        return False
    found = os.stat(file)
    try:
        with open(getattr(module, "__cached__", None) or "", "rb") as compiled:
            header, written = compiled.read(16), os.fstat(compiled.fileno()).st_mtime
    except OSError:
        return found.st_mtime > _began()
    if len(header) < 16 or header[4:8] != bytes(4):  # torn, or compiled by hash
        return found.st_mtime > _began()
    then = (int.from_bytes(header[8:12], "little"), int.from_bytes(header[12:16], "little"))
    if then == (int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF):
        return False
    # a store left behind, where none is written, says nothing of what was imported
    return max(written, found.st_mtime, found.st_ctime) > _began()


@functools.cache
def _began() -> float:
    """When this process began, in seconds since 1970; where that is not known, 0."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        up = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return time.time() - up


def _modules() -> Iterator[tuple[str, ModuleType, str]]:
    """Every imported module that may be a project's, with the folder of its top."""
    known = _no_projects.get
    for name, module in [
        each for each in list(sys.modules.items()) if known(each[0]) is not each[1]
    ]:
        file = getattr(module, "__file__", None)
        in_file = isinstance(file, str)
        place = file if in_file else next(iter(getattr(module, "__path__", None) or ()), "")
        root = _root(name, place, in_file) if place else ""
        if root and (root in _managed or not is_installed(root)):
            yield name, module, root
        elif in_file:  # what lies in a folder alone is said to be elsewhere by and by
            _no_projects[name] = module


@functools.cache
def _root(name: str, place: str, in_file: bool) -> str:
    """The folder of the top of a module that lies in a file or folder; none for our own."""
    if name.partition(".")[0] in OURS:
        return ""
    up = name.count(".") + (not in_file or os.path.basename(place).startswith("__init__."))
    above = os.path.dirname(place) if in_file else place
    if not above:  # torch.ops says that it comes from "_ops.py"
        return ""
    for _ in range(up):
        above = os.path.dirname(above)
    return os.path.realpath(above)


def _stand_on_path(folders: Sequence[str]) -> None:
    """Let folders be searched last of all too: for packages that lie in several of them."""
    sys.path[:] = plain_path()
    _added[:] = [folder for folder in folders if folder not in sys.path]
    sys.path += _added


def _installed_to_be_edited(top: str) -> ModuleSpec | None:
    """Where a package lies that was installed as a pointer to its sources, if by a finder."""
    for finder in sys.meta_path:
        if str(getattr(finder, "__module__", "")).startswith("__editable__"):
            spec = finder.find_spec(top, None, None)
            if spec is not None:
                return spec
    return None


def _in_packages(top: str) -> str | None:
    where = tuple(entry for entry in sys.path if entry and is_installed(entry))
    return _found_in(top, where)


@functools.lru_cache(maxsize=1024)
def _found_in(top: str, where: tuple[str, ...]) -> str | None:
    spec = PathFinder.find_spec(top, where)
    if spec is None or spec.loader is None:  # a folder alone is no package that was installed
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), top)
