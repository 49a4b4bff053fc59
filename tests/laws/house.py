"""Figures of the house: `python -m tests.laws.house` prints how the code is laid out.

Sources are read, nothing is imported. A line counts whether code, comment or blank; imports inside
of functions and those for types alone count as imports.
"""

import ast
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HOUSE = "fedsim"
PACKAGES = (HOUSE, "strategies", "clients")
LONG_FILE, LARGE_FILE = 250, 400
LONG_FUNCTION, LONG_CLASS = 60, 300
LAYERS = (
    {"basics"},
    {"messages", "data", "tasks"},
    {"aggregators", "client"},
    {"federation", "engine"},
    {"strategy"},
    {"scenario", "strategies", "clients"},
    {"runs"},
    {"studies", "deployment"},
    {"cli"},
)
# what the modules of a room import, of other rooms; `fedsim` itself may be imported by all
MAY_IMPORT = {
    "basics": set(),
    "messages": {"basics"},
    "data": {"basics"},
    "tasks": {"basics"},
    "aggregators": {"basics", "messages"},
    "client": {"basics", "messages.codecs", "messages.layout"},
    "federation": {"basics", "messages", "aggregators", "client"},
    "engine": {"basics", "messages", "client"},
    "strategy": {"basics", "messages", "aggregators", "federation.topology"},
    "scenario": {
        "basics", "messages", "data", "tasks", "aggregators.server_optimizers", "client",
        "federation", "strategy",
    },
    "runs": {
        "basics", "messages", "data", "tasks", "client", "federation", "engine", "strategy",
        "scenario",
    },
    "studies": {"basics", "tasks", "federation", "engine", "scenario", "runs"},
    "deployment": {"basics", "messages", "federation", "engine", "scenario", "runs"},
    "cli": {
        "basics", "data", "deployment.client_state", "deployment.monitoring",
        "deployment.own_data", "deployment.site", "engine.ray.place", "scenario", "runs", "studies",
    },
    "strategies": {
        "basics", "messages", "aggregators", "client", "federation.topology", "strategy",
    },
    "clients": {"basics", "client", "messages.codecs"},
}  # fmt: skip
FACES = {
    "aggregators",
    "data",
    "tasks",
    "client",
    "strategy",
    "deployment",
}  # re-export, define not
BESIDE = (
    "__init__",
    "__main__",
    "procedure",
)  # modules in no room; the last names the former place
# who makes one kind of object of several, so that nobody else asks which of them one is
ADAPTERS = {"fedsim/messages/adapting.py", "fedsim/strategy/adapter.py"}
# kinds of object that the code asks for where it could be handed one kind alone
ASKED_FOR = ("Cohort", "Replies", "FederatedStrategy")


class Piece(NamedTuple):
    """A function or class.

    Attributes:
        file: Where it stands, from the root.
        name: Its name, with the class that it stands in.
        lines: From its first line to its last; without decorators, and without its docstring.
    """

    file: str
    name: str
    lines: int


@functools.cache
def sources() -> dict[str, str]:
    """The text of every file of the product, by its path from the root."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@functools.cache
def trees() -> dict[str, ast.Module]:
    """What Python makes of every file."""
    return {file: _parsed(text) for file, text in sources().items()}


@functools.cache  # the text, not the file: a planted file costs no more than itself
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


@functools.cache
def _imported(text: str) -> list[tuple[str, str]]:
    """What a source imports: a module and a name of it, or a module and nothing."""
    found = []
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def module_of(file: str) -> str:
    """The name under which a file is imported.

    Example:
        >>> module_of("fedsim/data/__init__.py"), module_of("fedsim/runs/start.py")
        ('fedsim.data', 'fedsim.runs.start')
    """
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def imports() -> dict[str, set[str]]:
    """The modules of the product that each of its modules imports, lazily or for types too."""
    modules = {module_of(file) for file in sources()}
    found: dict[str, set[str]] = {}
    for file, text in sources().items():
        here = found.setdefault(module_of(file), set())
        for module, name in _imported(text):
            inner = f"{module}.{name}"
            here |= {inner if inner in modules else module} & modules
        here.discard(module_of(file))
    return found


def room_of(module: str) -> str:
    """The room that a module lies in.

    Example:
        >>> room_of("fedsim.data.cache"), room_of("strategies.fedavg"), room_of("fedsim")
        ('data', 'strategies', '')
    """
    top, _, inside = module.partition(".")
    return inside.partition(".")[0] if top == HOUSE else top


def against_the_layers() -> list[str]:
    """Imports that no room of the importer's kind may have, or that do not point down."""
    height = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
    found = []
    for module, others in sorted(imports().items()):
        room = room_of(module)
        if room in ("", "__main__", "procedure"):
            continue
        for other in sorted(others):
            there = room_of(other)
            if there in ("", room):
                continue
            allowed = MAY_IMPORT.get(room, set())
            inside = other.removeprefix(f"{HOUSE}.")
            may = any(inside == each or inside.startswith(f"{each}.") for each in allowed)
            down = height.get(there, len(LAYERS)) < height.get(room, -1)
            if not (may and down):
                found.append(f"{module} imports {other}")
    return found


def unused_permissions() -> list[str]:
    """Permissions to import that no module of a room makes use of."""
    used = {
        (room_of(m), other.removeprefix(f"{HOUSE}.")) for m in imports() for other in imports()[m]
    }
    return [
        f"{room}: {each}"
        for room, allowed in MAY_IMPORT.items()
        for each in sorted(allowed)
        if not any(
            here == room and (there == each or there.startswith(f"{each}.")) for here, there in used
        )
    ]


def defining_faces() -> list[str]:
    """Packages whose `__init__` defines something, and is neither a face nor the command's."""
    found = []
    for file, tree in trees().items():
        if not file.endswith("__init__.py") or file in (
            "fedsim/__init__.py",
            "fedsim/cli/__init__.py",
        ):
            continue
        if not file.startswith(f"{HOUSE}/"):
            continue
        defines = any(
            isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for n in tree.body
        )
        named = file.split("/")[1] in FACES and file.count("/") == 2
        if defines or (len(tree.body) > 1 and not named):
            found.append(file)
    return found


def forget() -> None:
    """Read the sources anew."""
    sources.cache_clear()
    trees.cache_clear()
    imports.cache_clear()


def circles() -> list[list[str]]:
    """Sets of modules each of which imports, over some steps, all others of its set (Tarjan)."""
    arrows, index, low = imports(), dict[str, int](), dict[str, int]()
    stack, on_stack, found = list[str](), set[str](), list[list[str]]()

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        on_stack.add(module)
        for other in sorted(arrows.get(module, ())):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in on_stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            circle = []
            while not circle or circle[-1] != module:
                circle.append(stack.pop())
                on_stack.discard(circle[-1])
            if len(circle) > 1:
                found.append(sorted(circle))

    for module in sorted(arrows):
        if module not in index:
            visit(module)
    return found


def pieces(kinds: tuple[type[ast.AST], ...]) -> list[Piece]:
    """All functions or classes, the longest first."""
    found = [
        Piece(file, name, lines)
        for file, text in sources().items()
        for name, lines in _pieces(text, kinds)
    ]
    return sorted(found, key=lambda piece: -piece.lines)


@functools.cache
def _pieces(text: str, kinds: tuple[type[ast.AST], ...]) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []

    def look(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = inside
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{inside}.{child.name}".lstrip(".")
                if isinstance(child, kinds):
                    found.append((name, _span(child) - _docstring(child)))
            look(child, name)

    look(_parsed(text), "")
    return found


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return 0 if ast.get_docstring(node) is None else _span(node.body[0])


def functions() -> list[Piece]:
    """All functions and methods, the longest first."""
    return pieces((ast.FunctionDef, ast.AsyncFunctionDef))


def classes() -> list[Piece]:
    """All classes, the longest first."""
    return pieces((ast.ClassDef,))


def twice() -> dict[str, list[str]]:
    """Names of classes that stand in more than one place, with their files."""
    places: dict[str, list[str]] = defaultdict(list)
    for each in classes():
        if each.file.startswith(f"{HOUSE}/"):
            places[each.name.rpartition(".")[2]].append(each.file)
    return {name: sorted(files) for name, files in sorted(places.items()) if len(files) > 1}


def asked_for() -> Iterator[tuple[str, int, str]]:
    """Where code other than an adapter asks whether something is a Cohort, Replies or ours."""
    for file, text in sources().items():
        if file not in ADAPTERS:
            yield from ((file, line, name) for line, name in _asked_for(text))


@functools.cache
def _asked_for(text: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            names = {getattr(part, "id", "") for part in ast.walk(node.args[1])}
            found += [(node.lineno, name) for name in sorted(names & set(ASKED_FOR))]
    return found


def long_files(above: int) -> dict[str, int]:
    """Files of more than so many lines, the longest first."""
    lines = {file: text.count("\n") for file, text in sources().items()}
    return {f: n for f, n in sorted(lines.items(), key=lambda each: -each[1]) if n > above}


def loose() -> list[str]:
    """Modules that lie in no room, beside each other."""
    outside = {f"{HOUSE}/{name}.py" for name in BESIDE}
    return [f for f in sources() if f.count("/") == 1 and f.startswith(HOUSE) and f not in outside]


def report() -> str:
    """All figures, for people."""
    house = [file for file in sources() if file.startswith(f"{HOUSE}/")]
    rooms = Counter(file.split("/")[1] for file in house if file.count("/") > 1)
    long_functions = [each for each in functions() if each.lines > LONG_FUNCTION]
    long_classes = [each for each in classes() if each.lines > LONG_CLASS]
    asked = Counter(name for _, _, name in asked_for())
    lines = [
        f"modules                     {len(house)}, loose beside each other {len(loose())}",
        f"rooms                       {len(rooms)}: "
        + ", ".join(f"{room} {count}" for room, count in sorted(rooms.items())),
        f"layers                      {len(LAYERS)}",
        f"imports against the layers  {len(against_the_layers())}",
        *(f"    {each}" for each in against_the_layers()),
        f"circles of modules          {len(circles())}",
        *(f"    {', '.join(circle)}" for circle in circles()),
        f"files above {LONG_FILE} lines       {len(long_files(LONG_FILE))}",
        f"files above {LARGE_FILE} lines       {len(long_files(LARGE_FILE))}",
        *(f"    {count:4d} {file}" for file, count in long_files(LARGE_FILE).items()),
        f"functions above {LONG_FUNCTION} lines    {len(long_functions)}",
        *(f"    {each.lines:4d} {each.file}: {each.name}" for each in long_functions),
        f"classes above {LONG_CLASS} lines     {len(long_classes)}",
        *(f"    {each.lines:4d} {each.file}: {each.name}" for each in long_classes),
        f"class names that stand twice {len(twice())}",
        *(f"    {name}: {', '.join(files)}" for name, files in twice().items()),
        "isinstance of               " + ", ".join(f"{name} {asked[name]}" for name in ASKED_FOR),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
