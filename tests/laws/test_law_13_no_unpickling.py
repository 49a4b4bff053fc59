"""Law 13: nothing that crosses a trust boundary is unpickled or evaluated.

What a reply may hold is `test_law_14_admission`'s; here the source is read.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    p for name in ("fedsim", "strategies", "clients") for p in (ROOT / name).rglob("*.py")
)

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.package", "numpy.load.allow_pickle",
    "pandas.read_pickle", "yaml.load", "os.system", "os.popen",
}  # fmt: skip

# The driver and the workers that it started itself hand each other the messages and contexts of
# foreign ClientApps, which are Flower's Python objects, and work and its results through pipes that
# only processes of the driver's user can open; both ends are processes of one user's run.
ALLOWED = {
    ("fedsim/engine/pipe.py", "pickle.loads"): 1,
    ("fedsim/engine/pipe.py", "import pickle"): 1,
    ("fedsim/engine/work.py", "pickle.loads"): 2,
    ("fedsim/engine/work.py", "pickle.dumps"): 1,
    ("fedsim/engine/work.py", "import pickle"): 1,
}


def full_name(node, aliases):
    """The dotted name of an expression, with imports resolved; None for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := full_name(node.value, aliases)):
        return f"{owner}.{node.attr}"
    return None


def findings(source):
    """What a file does that could run somebody else's code."""
    tree = ast.parse(source)
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {(a.asname or a.name): a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            )
            for module in modules:
                if module and module.partition(".")[0] in FORBIDDEN_MODULES:
                    yield f"import {module}"
        if isinstance(node, ast.Call):
            name = full_name(node.func, aliases)
            if name is None:
                continue
            keywords = {k.arg: k.value for k in node.keywords}
            pickles = keywords.get("allow_pickle")
            if pickles is not None and not (
                isinstance(pickles, ast.Constant) and pickles.value is False
            ):
                yield f"{name}(allow_pickle)"
            if name in FORBIDDEN_CALLS or name in FORBIDDEN_ATTRIBUTES:
                yield name
            if name.partition(".")[0] in FORBIDDEN_MODULES:
                yield name


def count(file):
    found = {}
    for finding in findings(file.read_text(encoding="utf-8")):
        key = (file.relative_to(ROOT).as_posix(), finding)
        found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_file_unpickles_and_evaluates_nothing(file):
    place = file.relative_to(ROOT).as_posix()
    assert count(file) == {key: n for key, n in ALLOWED.items() if key[0] == place}


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("import pickle\npickle.loads(b'')", "pickle.loads"),
        ("from pickle import loads as read\nread(b'')", "pickle.loads"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("from torch import load\nload('x')", "torch.load"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "numpy.load(allow_pickle)"),
        ("import numpy as np\nnp.load('x', allow_pickle=maybe)", "numpy.load(allow_pickle)"),
        ("eval('1')", "eval"),
        ("import numpy as np\nnp.load('x', allow_pickle=False)", None),
        ("model.eval()", None),
        ("json.loads('1')", None),
    ],
)
def test_the_search_finds_what_it_is_for(source, finding):
    found = set(findings(source))
    assert (finding in found) if finding else not found
