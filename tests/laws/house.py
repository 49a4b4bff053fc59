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
# kinds of object that the code asks for where it could be handed one kind alone
ASKED_FOR = ("Cohort", "Replies", "FederatedStrategy")


class Piece(NamedTuple):
    """A function or class.

    Attributes:
        file: Where it stands, from the root.
        name: Its name, with the class that it stands in.
        lines: From its first line, decorators not counted, to its last.
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
    return {file: ast.parse(text) for file, text in sources().items()}


def module_of(file: str) -> str:
    """The name under which a file is imported.

    Example:
        >>> module_of("fedsim/data/__init__.py"), module_of("fedsim/runs/start.py")
        ('fedsim.data', 'fedsim.runs.start')
    """
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports() -> dict[str, set[str]]:
    """The modules of the product that each of its modules imports, lazily or for types too."""
    modules = {module_of(file) for file in trees()}
    found: dict[str, set[str]] = {}
    for file, tree in trees().items():
        here = found.setdefault(module_of(file), set())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                here |= {alias.name for alias in node.names} & modules
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    here |= {inner if inner in modules else node.module} & modules
        here.discard(module_of(file))
    return found


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
    found: list[Piece] = []

    def look(file: str, node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = inside
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{inside}.{child.name}".lstrip(".")
                if isinstance(child, kinds):
                    lines = (child.end_lineno or child.lineno) - child.lineno + 1
                    found.append(Piece(file, name, lines))
            look(file, child, name)

    for file, tree in trees().items():
        look(file, tree, "")
    return sorted(found, key=lambda piece: -piece.lines)


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
    """Where the code asks whether something is a Cohort, Replies or a strategy of ours."""
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"):
                continue
            names = {getattr(part, "id", "") for part in ast.walk(node.args[1])}
            for name in sorted(names & set(ASKED_FOR)):
                yield file, node.lineno, name


def long_files(above: int) -> dict[str, int]:
    """Files of more than so many lines, the longest first."""
    lines = {file: text.count("\n") for file, text in sources().items()}
    return {f: n for f, n in sorted(lines.items(), key=lambda each: -each[1]) if n > above}


def loose() -> list[str]:
    """Modules that lie in no room, beside each other."""
    outside = {f"{HOUSE}/__init__.py", f"{HOUSE}/__main__.py"}
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
