"""The files behind a module of a user's project: its own, and those that it imports, by content.

Sources are read and never run. Imports inside of functions count, and so does
`importlib.import_module` of a literal. What is installed is not followed, nor what Python brings
along: a run folder has the versions of what decides bits.
"""

import ast
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES
from typing import NamedTuple

from fedsim.basics import project
from fedsim.basics.chance import left_to_chance, of_this_process

_AT_RUN_TIME = {
    "__import__": "imports what its arguments say",
    "import_module": "imports what its arguments say",
    "resolve_name": "imports what its arguments say",
    "run_module": "runs a module that its arguments name",
    "exec": "runs code that it makes",
    "eval": "runs code that it makes",
    "compile": "makes code",
    "spec_from_file_location": "imports a file by its path",
    "SourceFileLoader": "imports a file by its path",
    "SourcelessFileLoader": "imports a file by its path",
    "ExtensionFileLoader": "imports a file by its path",
    "load_source": "imports a file by its path",
    "zipimporter": "imports from an archive",
    "run_path": "runs a file by its path",
    "load_inline": "compiles code that it makes",
}
_BY_NAME = ("__import__", "import_module")
_BUILT_IN = ("exec", "eval", "compile")  # not `model.eval` or `re.compile`


class Code(NamedTuple):
    """What decides a result and is code of the user's own.

    Attributes:
        files: The hash of each file's content, by its path from the folder in which it is found.
        unfollowed: What could not be followed, and where, in words.
        chance: What is left to chance, and where, in words.
    """

    files: dict[str, str]
    unfollowed: tuple[str, ...] = ()
    chance: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """The hash of all files' names and contents; empty without any."""
        if not self.files:
            return ""
        text = "".join(f"{name}:{digest};" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()


NO_CODE = Code({})


class _Read(NamedTuple):
    """What a file holds.

    Attributes:
        sha256: The hash of its content.
        imports: Modules that it may import: (level, module, names), see `ast.ImportFrom`.
        unfollowed: What it imports in a way that cannot be read, by line.
        chance: What it leaves to chance, by line.
    """

    sha256: str
    imports: tuple[tuple[int, str, tuple[str, ...]], ...] = ()
    unfollowed: tuple[str, ...] = ()
    chance: tuple[tuple[int, str], ...] = ()


def behind(modules: Iterable[str], folders: Sequence[str], script: str | None = None) -> Code:
    """Return the files behind modules.

    Args:
        modules: Their dotted names.
        folders: Where they are looked for first; elsewhere on `sys.path` what is not installed
            counts too.
        script: The file of `__main__`, where one of them is that.
    """
    files: dict[str, str] = {}
    unfollowed: dict[str, None] = {}
    chance: dict[str, None] = {}
    named, waiting = set(modules), sorted(modules)
    done = set(waiting)
    while waiting:
        module = waiting.pop()
        found = [*_files(module, folders)]
        if module == "__main__" and script is not None:
            found = [("", script, os.path.basename(script))]
        if not found and module in named and project.installed(module.partition(".")[0]) is None:
            unfollowed[f"module '{module}' has no file that is known before it is imported"] = None
        for package, file, shown in found:
            read = _read(file, *_signature(file))
            if files.setdefault(shown, read.sha256) == read.sha256:
                unfollowed |= dict.fromkeys(f"{shown}{each}" for each in read.unfollowed)
                lines = [(line, words) for line, words in read.chance if of_this_process(words)]
                chance |= dict.fromkeys(f"{shown}, line {line}: {words}" for line, words in lines)
            fresh = set(_named_by(read, package)) - done
            done |= fresh
            waiting += sorted(fresh)
    return Code(dict(sorted(files.items())), tuple(unfollowed), tuple(chance))


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say what became of files, by their hashes; nothing when all are as they were.

    Example:
        >>> changes({"model.py": "1", "old.py": "2"}, {"model.py": "3", "new.py": "4"})
        'model.py has changed, new.py is new, old.py is gone'
    """
    found = []
    for name in sorted({*before, *now}):
        if name not in now:
            found.append(f"{name} is gone")
        elif name not in before:
            found.append(f"{name} is new")
        elif before[name] != now[name]:
            found.append(f"{name} has changed")
    return ", ".join(found)


def _files(module: str, folders: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The files that importing a module runs: (the package they are in, path, path to show)."""
    top, *inner = module.split(".")
    if project.installed(top) is not None:
        return
    root = next((each for each in folders if project.provides(each, top)), None)
    root = project.root_outside(top) if root is None else root
    if root is None:
        return
    place, package = root, ""
    for name in (top, *inner):
        here = os.path.join(place, name)
        initial = os.path.join(here, "__init__.py")
        package = f"{package}.{name}".lstrip(".")
        if os.path.isdir(here):
            if os.path.isfile(initial):
                yield package, initial, _shown(initial, root)
            place = here
            continue
        suffixes = (".py", *EXTENSION_SUFFIXES, *BYTECODE_SUFFIXES)
        file = next((here + each for each in suffixes if os.path.isfile(here + each)), None)
        if file is not None:
            yield package.rpartition(".")[0], file, _shown(file, root)
        return


def _shown(file: str, root: str) -> str:
    return os.path.relpath(file, root).replace(os.sep, "/")


def _signature(file: str) -> tuple[int, ...]:
    found = os.stat(file)
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


@functools.lru_cache(maxsize=4096)
def _read(file: str, *_: int) -> _Read:
    with open(file, "rb") as opened:
        content = opened.read()
    digest = hashlib.sha256(content).hexdigest()
    if not file.endswith(".py"):
        return _Read(digest, (), (" is compiled: what it calls is not followed",))
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # importing it says so
        return _Read(digest)
    imports: list[tuple[int, str, tuple[str, ...]]] = []
    unfollowed: list[str] = []
    nodes = list(ast.walk(tree))
    called_otherwise = {
        alias.asname: alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    for node in nodes:
        if isinstance(node, ast.Import):
            imports += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            imports.append((node.level, node.module or "", names))
        elif isinstance(node, ast.Call):
            said = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = called_otherwise.get(said, said)
            literal = _literal(node) if name in _BY_NAME else None
            if literal:
                level = len(literal) - len(literal.lstrip("."))
                imports.append((level, literal.lstrip("."), ()))
            elif name in _AT_RUN_TIME and (
                name not in _BUILT_IN or isinstance(node.func, ast.Name)
            ):
                unfollowed.append(f", line {node.lineno}: {name} {_AT_RUN_TIME[name]}")
    chance = tuple(left_to_chance(nodes))
    return _Read(digest, tuple(imports), tuple(sorted(unfollowed)), chance)


def _literal(call: ast.Call) -> str | None:
    """The name that a call imports, where it is written down."""
    value = getattr(call.args[0], "value", None) if call.args else None
    return value if isinstance(value, str) else None


def _named_by(read: _Read, package: str) -> Iterator[str]:
    """The modules that a file may import, whether they exist or not."""
    for level, module, names in read.imports:
        base = module
        if level:
            parts = package.split(".") if package else []
            above = parts[: len(parts) - (level - 1)]
            base = ".".join([*above, *([module] if module else [])])
        if not base:
            continue
        yield base
        yield from (f"{base}.{name}" for name in names if name != "*")
