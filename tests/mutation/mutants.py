"""Small wrong changes of a source file, one at a time.

A mutant changes one place as a slip of the pen would: a sign, a bound, a number, a branch, a name
that is easily confused, a statement that is left out. What says nothing to the computer is left
alone: docstrings, annotations, messages, assertions, and what a class declares of itself.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"), ast.Mod: ("%", "*"), ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
CONFUSED = {
    "amax": "amin", "amin": "amax", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil",
    "max": "min", "min": "max", "mean": "sum", "sum": "mean", "sqrt": "square", "square": "sqrt",
    "rsqrt": "sqrt", "ones": "zeros", "zeros": "ones", "ones_like": "zeros_like",
    "zeros_like": "ones_like", "abs": "square",
}  # fmt: skip


class Mutant(NamedTuple):
    """One change.

    Attributes:
        line: Where, from 1 on.
        kind: What is changed: operator, number, condition, name, sign, arguments, left out.
        before: The line as it is, stripped; of several lines the first.
        after: The same line changed.
        start: The first changed byte of the source.
        end: The byte after the last.
        text: What stands there instead.
    """

    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int
    text: str

    def applied(self, source: str) -> str:
        """Return the source with the change."""
        whole = source.encode()
        return (whole[: self.start] + self.text.encode() + whole[self.end :]).decode()


def mutants(source: str) -> list[Mutant]:
    """Return all mutants of a source, from top to bottom."""
    whole = source.encode()
    starts = [0]
    for line in whole.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for node in _live(ast.parse(source)):
        for kind, start, end, text in _changes(node, whole, starts):
            if kind != "left out" and text == whole[start:end].decode():
                continue
            line = whole.count(b"\n", 0, start) + 1
            changed = whole[:start] + text.encode() + whole[end:]
            before, after = (_line_at(each, start) for each in (whole, changed))
            found[start, end, text] = Mutant(line, kind, before, after, start, end, text)
    return [found[key] for key in sorted(found)]


def _line_at(whole: bytes, place: int) -> str:
    first = whole.rfind(b"\n", 0, place) + 1
    return whole[first : whole.find(b"\n", place)].decode().strip()


def _live(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what is computed."""
    yield node
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.AnnAssign) and "ClassVar" in ast.unparse(node.annotation):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _live(child)


def _turned_elsewhere(test: ast.expr) -> bool:
    """Whether another change does the same as turning a condition round."""
    if isinstance(test, ast.UnaryOp):
        return True
    equalities = ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], equalities)


def spread(found: list[Mutant], at_most: int) -> list[Mutant]:
    """Return so many of a file's mutants, evenly from its top to its bottom."""
    if len(found) <= at_most:
        return found
    return [found[place * len(found) // at_most] for place in range(at_most)]


_Change = tuple[str, int, int, str]


def _changes(node: ast.AST, whole: bytes, starts: list[int]) -> Iterator[_Change]:
    def span(of: ast.AST) -> tuple[int, int]:
        return (
            starts[of.lineno - 1] + of.col_offset,
            starts[of.end_lineno - 1] + of.end_col_offset,
        )

    def text(of: ast.AST) -> str:
        return whole[slice(*span(of))].decode()

    def between(kind: ast.AST, left: ast.AST, right: ast.AST) -> Iterator[_Change]:
        """The operator of a kind that stands between two nodes, exchanged."""
        start, end = span(left)[1], span(right)[0]
        old, new = OPERATORS.get(type(kind), ("", ""))
        gap = whole[start:end].decode()
        if old:
            yield "operator", start, end, gap.replace(old, new, 1)

    match node:
        case ast.BinOp():
            yield from between(node.op, node.left, node.right)
        case ast.AugAssign():
            yield from between(node.op, node.target, node.value)
        case ast.BoolOp():
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(node.op, left, right)
        case ast.Compare():
            sides = [node.left, *node.comparators]
            for kind, left, right in zip(node.ops, sides, sides[1:], strict=False):
                yield from between(kind, left, right)
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            yield "sign", *span(node), f"({text(node.operand)})"
        case ast.Constant(value=bool()):
            yield "number", *span(node), str(not node.value)
        case ast.Constant(value=int() | float()):
            new = node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0
            yield "number", *span(node), repr(new)
        case ast.If(test=test) | ast.IfExp(test=test) if not _turned_elsewhere(test):
            yield "condition", *span(test), f"not ({text(test)})"
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, one, other]):
            start, end = span(one)[0], span(other)[1]
            gap = whole[span(one)[1] : span(other)[0]].decode()
            yield "arguments", start, end, f"{text(other)}{gap}{text(one)}"
        case ast.Call(func=ast.Attribute(attr=name) as called) if name in CONFUSED:
            end = span(called)[1]
            yield "name", end - len(name), end, CONFUSED[name]
        case ast.Call(func=ast.Name(id=name) as called) if name in CONFUSED:
            yield "name", *span(called), CONFUSED[name]
        case ast.keyword(arg="min" | "max" as name, value=value):
            start = span(value)[0] - len(name) - 1
            yield "name", start, start + len(name), CONFUSED[name]
    if isinstance(node, ast.Raise | ast.AugAssign | ast.Break | ast.Continue) or (
        isinstance(node, ast.Assign) and any(isinstance(t, ast.Subscript) for t in node.targets)
    ):
        yield "left out", *span(node), "pass"
