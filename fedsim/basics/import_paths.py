"""Objects of the user's own, named in a scenario by import path: `package.module:name`."""

import ast
import contextlib
import contextvars
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.basics import project
from fedsim.basics.errors import ScenarioError, nearest
from fedsim.basics.home import expanded
from fedsim.basics.sources import Code, behind

_WHERE = "is the folder that holds it on PYTHONPATH? `--set modules=FOLDER` says where it is"
_NAME = r"[^\W\d]\w*"
# says why what a module defines may not be used, or nothing; None belongs to no module
WhyNot = Callable[[str | None], str | None]
_why_not: contextvars.ContextVar[WhyNot | None] = contextvars.ContextVar("_why_not", default=None)
_DOTTED = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}(\.{_NAME})*")


def is_import_path(name: str) -> bool:
    """Tell an import path from a name that fedsim knows itself.

    Example:
        >>> is_import_path("my_models.vision:small_cnn"), is_import_path("mlp")
        (True, False)
    """
    return ":" in name


def import_paths(tables: Mapping[str, Any]) -> dict[str, str]:
    """Return what tables name by import path, by where they say so, tables within them too.

    Example:
        >>> import_paths({"task": {"model": "mine:net"}, "data": {"name": "digits"}})
        {'[task] model': 'mine:net'}
    """
    found: dict[str, str] = {}

    def look(name: str, table: Mapping[str, Any]) -> None:
        for key, value in table.items():
            for inside in value if isinstance(value, list) else [value]:
                if isinstance(inside, Mapping):
                    look(f"{name}.{key}", inside)
            if isinstance(value, str) and _DOTTED.fullmatch(value) and _names_one(value):
                found[f"[{name}] {key}"] = value

    for name, table in tables.items():
        if isinstance(table, Mapping):
            look(name, table)
    return found


def _names_one(path: str) -> bool:
    return not path.startswith("flower:")  # Flower's own


def folders_of(paths: Mapping[str, str], given: str, beside: Path | None) -> list[str]:
    """Return the folders in which what is named by import path lies, and open them.

    Args:
        paths: Import paths, by where they are named.
        given: The folders as they were given, like PYTHONPATH's; empty to look for them.
        beside: The scenario's folder; None where it has no file.

    Returns:
        Absolute folders. Of what is installed there is none.

    Raises:
        ScenarioError: If a folder that was given is not there, or a module beside the scenario has
            the name of one that is installed, which would come first.
    """
    if given:
        found = [_there(each, beside) for each in given.split(os.pathsep) if each]
        project.enter(found)
        return found
    found = []
    importlib.invalidate_caches()  # a file may be there that was not a moment ago
    for where, path in paths.items():
        top = path.partition(":")[0].partition(".")[0]
        near = None
        if beside is not None and top.isidentifier():
            near = project.provides(str(beside.resolve()), top)
        if near is not None:
            _refuse_hidden(f"{where} = '{path}'", top, near)
        if near is not None and project.installed(top) is None:
            root: str | None = str(beside.resolve()) if beside is not None else None
        else:
            root = project.root_outside(top)
        if root is not None and root not in found:
            found.append(root)
    project.enter(found)
    return found


def _there(folder: str, beside: Path | None) -> str:
    path = expanded(folder)
    if beside is not None and (beside / path).is_dir():
        path = beside / path
    if not path.is_dir():
        raise ScenarioError(
            f"modules = '{folder}': there is no such folder; where the modules that are named by "
            "import path lie is said by `--set modules=FOLDER`"
        )
    return str(path.resolve())


def _refuse_hidden(where: str, top: str, near: str) -> None:
    """Refuse a module beside a scenario that `import` does not find, for another comes first."""
    first = project.installed(top)
    if first is None or top == "__main__" or os.path.isdir(near):
        return
    found = importlib.util.find_spec(top)
    other = first if not os.path.isabs(first) else f"the installed {first}"
    if found is None or os.path.realpath(found.origin or "") != os.path.realpath(near):
        raise ScenarioError(
            f"{where}: {near} lies beside the scenario, but a module '{top}' comes first that is "
            f"{other}; give the one beside another name"
        )


def code_behind(paths: Iterable[str], folders: Sequence[str]) -> Code:
    """Return the files behind import paths, as they are now.

    Args:
        paths: Import paths.
        folders: Where modules are looked for first.
    """
    modules = {path.partition(":")[0] for path in paths}
    if "__main__" not in modules:
        return behind(modules, folders)
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and os.path.isfile(script):
        return behind(modules, folders, script)
    found = behind(modules - {"__main__"}, folders)
    mine = [path.partition(":")[2] for path in paths if path.startswith("__main__:")]
    sources = {f"__main__.{name}": _source_sha256(name) for name in mine}
    known = {name: digest for name, digest in sources.items() if digest is not None}
    why = f"__main__: of {', '.join(mine)} the source alone is known, not what it uses"
    return Code({**found.files, **known}, (*found.unfollowed, why), found.chance)


def _source_sha256(name: str) -> str | None:
    """The hash of the source of what a notebook defines."""
    try:
        source = inspect.getsource(getattr(sys.modules["__main__"], name.partition(".")[0]))
    except (OSError, TypeError, AttributeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def of_main(paths: Iterable[str]) -> dict[str, object]:
    """Return what import paths name of `__main__`, by name: a worker's `__main__` is another."""
    names = {p.partition(":")[2].partition(".")[0] for p in paths if p.startswith("__main__:")}
    main = vars(sys.modules["__main__"])
    return {name: main[name] for name in sorted(names) if name in main}


def names_in_source(module: str, variable: str) -> list[str] | None:
    """Read the names that a module lists, without importing it: some take seconds.

    Args:
        module: The module, as it is imported.
        variable: A dictionary whose keys are names, or a list of names.

    Returns:
        The names in their order; None where they are not written down as strings.

    Example:
        >>> names_in_source("fedsim.federation.attacks.named", "ATTACKS")[:2]
        ['uniform', 'sign_flip']
    """
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin)
    if inner:
        place = source.parent.joinpath(*inner)
        source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not source.is_file():
        return None
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            value = getattr(node, "value", None)
            listed = getattr(value, "keys", None) or getattr(value, "elts", None) or [None]
            found = [getattr(each, "value", None) for each in listed]
            names = [name for name in found if isinstance(name, str)]
            return names if len(names) == len(found) else None
    return None


@contextlib.contextmanager
def permitting(why_not: WhyNot) -> Iterator[None]:
    """Let `resolve` give only what is allowed, in this context, for a while.

    Args:
        why_not: Asked about the module that a path names before it is imported, and about the one
            that defines what is found: a module shows what it has imported itself too.
    """
    token = _why_not.set(why_not)
    try:
        yield
    finally:
        _why_not.reset(token)


def resolve(path: str, *, what: str) -> object:
    """Import the object that `path` names.

    Args:
        path: `package.module:name`; the name may have dots (`module:Class.method`).
        what: The place that asks, as the message shall begin ("[task] model").

    Raises:
        ScenarioError: If the path is malformed, the module cannot be imported or lacks the name,
            or may not be used here (`permitting`).

    Example:
        >>> resolve("collections:OrderedDict", what="[task] model").__name__
        'OrderedDict'
    """
    where = f"{what} = '{path}'"
    module_name, _, name = path.partition(":")
    parts = name.split(".")
    if not all(part.isidentifier() for part in (*module_name.split("."), *parts)):
        raise ScenarioError(f"{where}: an import path reads 'package.module:name'")
    _require_permitted(where, module_name)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        asked = f"{module_name}.".startswith(f"{error.name}.")
        needs = "" if asked else f"module '{module_name}' needs a missing one: "
        advice = "; " + _WHERE if asked else ""
        raise ScenarioError(f"{where}: {needs}no module named '{error.name}'{advice}") from error
    except Exception as error:
        kind = type(error).__name__
        raise ScenarioError(
            f"{where}: importing '{module_name}' failed with {kind}: {error}"
        ) from error
    for part in parts:
        if not hasattr(found, part):
            guess = nearest(part, (n for n in dir(found) if not n.startswith("_")))
            hint = f"; did you mean '{guess}'?" if guess else ""
            raise ScenarioError(f"{where}: '{module_name}' has no '{part}'{hint}")
        found = getattr(found, part)
    _require_permitted(where, getattr(found, "__module__", None))
    return found


def _require_permitted(where: str, module: str | None) -> None:
    why_not = _why_not.get()
    if why_not is not None and (why := why_not(module)):
        raise ScenarioError(f"{where}: {why}")
