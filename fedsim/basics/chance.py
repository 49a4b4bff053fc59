"""What a source leaves to chance: it may do otherwise in the next process, whatever the seed."""

import ast
import os
from collections.abc import Iterable, Iterator

_UNSEEDED = {"default_rng", "RandomState", "Random", "SeedSequence", "PCG64", "PCG64DXSM",
             "Philox", "MT19937", "SFC64"}  # fmt: skip
_MODULES = {"random", "torch", "np", "numpy"}  # whose `seed()` asks the operating system
_FROM_SYSTEM = {"SystemRandom", "urandom", "getrandom", "uuid1", "uuid4", "randbits", "randbelow",
                "token_bytes", "token_hex", "token_urlsafe"}  # fmt: skip
_CLOCKS = {"time", "time_ns", "now", "utcnow", "perf_counter", "monotonic", "getpid"}
_SEEDING = {"seed", "manual_seed", "seed_everything", "seed_all", *_UNSEEDED}
_FOLDERS = {"listdir", "scandir", "iterdir", "glob", "rglob", "iglob"}
_IN_ORDER = {"list", "tuple", "enumerate", "array", "asarray", "tensor", "as_tensor", "zip", "map",
             "join", "fromkeys"}  # fmt: skip
_ANY_ORDER = {"sorted", "len", "set", "frozenset", "sum", "min", "max", "any", "all", "Counter"}
_LOOPS = ast.For, ast.comprehension
_HASHES = "hash", "the order of a set"  # what PYTHONHASHSEED settles


def left_to_chance(nodes: Iterable[ast.AST]) -> list[tuple[int, str]]:
    """Return what a source leaves to chance, by line.

    Args:
        nodes: All nodes of its tree.

    Example:
        >>> left_to_chance(ast.walk(ast.parse("r = np.random.default_rng()")))
        [(1, 'default_rng has no seed')]
    """
    nodes = list(nodes)
    settled = _settled(nodes)
    found: set[tuple[int, str]] = set()
    for node in nodes:
        if isinstance(node, ast.Call):
            found |= {(node.lineno, words) for words in _call(node, settled)}
        elif isinstance(node, _LOOPS) and id(node) not in settled and _is_set(node.iter):
            found.add((node.iter.lineno, "the order of a set of text decides"))
    return sorted(found)


def of_this_process(words: str) -> bool:
    """Return whether what was found can be otherwise: hashes cannot, with PYTHONHASHSEED set."""
    return not (words.startswith(_HASHES) and os.environ.get("PYTHONHASHSEED", "").isdigit())


def _call(node: ast.Call, settled: set[int]) -> Iterator[str]:
    name = _name(node.func)
    bare = not node.keywords and all(_is_none(each) for each in node.args)
    if name in _UNSEEDED and bare:
        yield f"{name} has no seed"
    reseeds = name == "seed" and bare and _name(getattr(node.func, "value", node)) in _MODULES
    if name in _FROM_SYSTEM or reseeds:
        yield f"{name} asks the operating system"
    if name in _SEEDING:
        given = [*node.args, *(each.value for each in node.keywords)]
        calls = (each for part in given for each in ast.walk(part) if isinstance(each, ast.Call))
        yield from (
            f"{name} is seeded by the clock" for each in calls if _name(each.func) in _CLOCKS
        )
    if isinstance(node.func, ast.Name) and name == "hash" and id(node) not in settled:
        yield "hash of text is another in each process"
    if name in _IN_ORDER and id(node) not in settled and any(map(_is_set, node.args)):
        yield "the order of a set of text decides"
    if name in _FOLDERS and id(node) not in settled:
        yield f"{name} has the file system's order: sort it"


def _settled(nodes: Iterable[ast.AST]) -> set[int]:
    """The nodes whose order does not matter: inside of `sorted`, or sorted by their name later."""
    inside: set[int] = set()
    sorted_names: set[str] = set()
    nodes = list(nodes)
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        if _name(node.func) in _ANY_ORDER:
            below = [each for argument in node.args for each in ast.walk(argument)]
            inside |= {id(each) for each in below}
            sorted_names |= {each.id for each in node.args if isinstance(each, ast.Name)}
        elif _name(node.func) == "sort":  # a list's own
            sorted_names.add(_name(getattr(node.func, "value", node)))
    for node in nodes:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id in sorted_names for target in node.targets
        ):
            inside |= {id(each) for each in ast.walk(node.value)}
        elif isinstance(node, ast.SetComp | ast.DictComp):
            inside |= {id(each) for each in node.generators}
        elif isinstance(node, ast.FunctionDef) and node.name == "__hash__":
            inside |= {id(each) for each in ast.walk(node)}  # what a dictionary asks for
    return inside


def _is_set(node: ast.AST) -> bool:
    """Whether an expression is a set that may hold text."""
    if isinstance(node, ast.Set):
        return not all(isinstance(each, ast.Constant) and _no_text(each) for each in node.elts)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("set", "frozenset")
    return isinstance(node, ast.SetComp)


def _no_text(node: ast.Constant) -> bool:
    return not isinstance(node.value, str | bytes)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _name(node: ast.AST) -> str:
    return str(getattr(node, "attr", getattr(node, "id", "")))
