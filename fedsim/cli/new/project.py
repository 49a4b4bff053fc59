"""`fedsim new`: a project with a model, data and a strategy of one's own, which runs at once."""

import importlib.machinery
import importlib.resources
import keyword
import os
import shlex
import string
import sys
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from fedsim.basics.errors import ScenarioError, printable

# Names that would clash with folders of the project or of fedsim itself.
_TAKEN = ("fedsim", "strategies", "clients", "tests")

_PROCEDURES = {
    False: 'name = "local_sgd" # `fedsim list clients local_sgd` explains its keys\n'
    "local_lr = 0.1\nlocal_epochs = 2\nbatch_size = 32\n",
    True: 'name = "$name.client:NormalisedSGD" # $name/client.py\n'
    "local_lr = 0.1\nlocal_epochs = 2\nbatch_size = 32\n",
}
_CLIENT_ROW = (
    '| `$name/client.py` | what a client does | `[client] name = "$name.client:NormalisedSGD"` |\n'
)


class NewProject(NamedTuple):
    """A project that has been written.

    Attributes:
        folder: Where it lies.
        files: What was written, relative to the folder.
        next_command: What to type into a shell next.
    """

    folder: Path
    files: list[str]
    next_command: str


def create(folder: str | Path, *, client: bool = False) -> NewProject:
    """Write a project.

    Args:
        folder: Where to; its last part is the project's name and that of its package.
        client: Whether it gets a client procedure of its own too.

    Raises:
        ScenarioError: If the name cannot be a package's, another one has it, the folder is in use
            or cannot be written.
    """
    folder = Path(folder)
    name = Path(os.path.abspath(folder)).name
    _check_name(name, folder)
    contents = _contents(name, client=client)
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise ScenarioError(
                f"{folder}: is a folder that holds something already; name another one, or empty it"
            )
        for file, text in contents.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"{folder}: cannot be written: {error.strerror}") from error
    go_there = f"cd {shlex.quote(str(folder))} && " if folder.resolve() != Path.cwd() else ""
    return NewProject(folder, list(contents), f"{go_there}fedsim run scenario.toml")


def _check_name(name: str, folder: Path) -> None:
    shown = printable(name)
    if not name.isidentifier() or keyword.iskeyword(name):
        proposal = _as_identifier(name)
        hint = f"; did you mean '{proposal}'?" if proposal else ""
        raise ScenarioError(
            f"'{shown}' cannot be the name of a project: it becomes a Python package's, so it must "
            f"be letters, digits and underscores, not begin with a digit and be no keyword{hint}"
        )
    if name in _TAKEN:
        raise ScenarioError(
            f"'{shown}' cannot be the name of a project: fedsim uses it; call it 'my_{name}'?"
        )
    if (place := _installed(name, folder)) is not None:
        raise ScenarioError(
            f"'{shown}' cannot be the name of a project: `import {name}` already finds {place}, "
            f"which comes first; call it 'my_{name}'?"
        )


def _as_identifier(name: str) -> str | None:
    """Return the nearest name that a package can have, or None when there is nothing to go by."""
    kept = "".join(c if c.isalnum() else "_" for c in name).strip("_")
    kept = f"my_{kept}" if kept[:1].isdigit() or keyword.iskeyword(kept) else kept
    return kept if kept.isidentifier() else None


def _installed(name: str, folder: Path) -> str | None:
    """Say where Python finds a module of that name, apart from beside the new project."""
    if name in sys.stdlib_module_names:
        return "a module of Python's own"
    beside = {Path.cwd(), Path(os.path.abspath(folder)).parent}
    path = [entry for entry in sys.path if Path(entry or ".").resolve() not in beside]
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None:
        return None
    return spec.origin or ", ".join(spec.submodule_search_locations or ["a package"])


def _contents(name: str, *, client: bool) -> dict[str, str]:
    """Return the text of each file of a project by its path, in the order of reading."""
    values = {
        "name": name,
        "client": string.Template(_PROCEDURES[client]).substitute(name=name),
        "client_row": string.Template(_CLIENT_ROW).substitute(name=name) if client else "",
    }
    found = {}
    for parts, file in _templates(
        importlib.resources.files("fedsim") / "cli" / "new" / "template", ()
    ):
        if parts == ("package", "client.py.txt") and not client:
            continue
        text = string.Template(file.read_text(encoding="utf-8")).substitute(values)
        found[_place(parts, name)] = text
    return dict(sorted(found.items(), key=lambda item: (item[0].count("/"), item[0])))


def _templates(
    folder: Traversable, inside: tuple[str, ...]
) -> "list[tuple[tuple[str, ...], Traversable]]":
    found = []
    for entry in folder.iterdir():
        parts = (*inside, entry.name)
        found += _templates(entry, parts) if entry.is_dir() else [(parts, entry)]
    return found


def _place(parts: tuple[str, ...], name: str) -> str:
    """Where in the project a template goes; sources end in .txt there, for they are none here."""
    named = [name if part == "package" else part for part in parts]
    return "/".join(named).removesuffix(".txt").replace("test_name.py", f"test_{name}.py")
