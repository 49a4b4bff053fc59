"""Imports point one way, and what others call their internals is in one file each."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.basics.processes import QUICKLY

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedsim", "strategies", "clients")
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
FLOWERS_PUBLIC_MODULES = {
    "flwr", "flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy",
    "flwr.simulation",
}  # fmt: skip
TORCH_ALONE = "fedsim/client/"


def imports(source, package=""):
    """The modules that a source imports, `importlib.import_module` of a literal included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found.add(node.module)
            if node.module in PACKAGES or node.module == "flwr":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            first = node.args[0]
            if name == "import_module" and isinstance(first, ast.Constant):
                found.add(first.value)
            if name == "import_module" and isinstance(first, ast.JoinedStr):
                found.add(str(getattr(first.values[0], "value", "")).rstrip("."))
    return found


@functools.cache  # not while tests are collected: each process does that
def all_imports():
    return {name: imports(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def importers(package):
    return {
        name
        for name, modules in all_imports().items()
        if any(m == package or m.startswith(f"{package}.") for m in modules)
    }


@pytest.mark.parametrize("package", ["strategies", "clients"])
def test_the_core_knows_strategies_and_procedures_by_name_only(package):
    inside = {name for name in FILES if name.startswith(f"{package}/")}
    assert importers(package) - inside <= {"fedsim/scenario/discovery.py"}


def test_no_strategy_or_procedure_is_named_in_the_machinery():
    from fedsim.scenario import discovery

    known = {*discovery.names("strategies"), *discovery.names("clients")}
    # says what a scenario means that leaves the name out
    defaults = {"fedsim/scenario/factory_tables.py"}
    rules = "fedsim/aggregators/"  # a rule is called as the strategy that is nothing else
    # a strategy's name that is also a key of [evaluation] and the first part of metrics' names
    places = ("expectations", "identity", "recorded_metrics")
    metrics = {f"fedsim/scenario/{each}.py": {"robust"} for each in places}
    for name, path in FILES.items():
        if name.startswith("fedsim/") and name not in defaults and not name.startswith(rules):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            literals = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
            named = known & {value for value in literals if isinstance(value, str)}
            assert named <= metrics.get(name, set()), name


def test_strategies_and_procedures_do_not_lean_on_each_other_or_on_the_engine():
    for name, modules in all_imports().items():
        if name.startswith(("strategies/", "clients/")):
            outside = {m for m in modules if m.partition(".")[0] in (*PACKAGES, "ray")}
            assert not {m for m in outside if m.startswith("fedsim.engine")}, name
            assert not {m for m in outside if not m.startswith("fedsim.")}, name


def test_ray_is_imported_in_one_room():
    found = importers("ray")
    assert found
    assert {name for name in found if not name.startswith("fedsim/engine/ray/")} == set()


def test_flowers_internals_are_imported_in_one_file():
    inside = {
        name
        for name, modules in all_imports().items()
        for m in modules
        if m.partition(".")[0] == "flwr"
        and m not in FLOWERS_PUBLIC_MODULES
        and m.rpartition(".")[0] not in ("flwr",)
    }
    assert inside == {"fedsim/messages/flower_internals.py"}


def test_flowers_private_names_are_used_in_one_file():
    private = ("_message_id", "_src_node_id", "_run_id", "TaskIdentity", "make_message")
    users = set()
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            word = getattr(node, "attr", getattr(node, "id", getattr(node, "value", None)))
            if isinstance(word, str) and word in private:
                users.add(name)
    assert users == {"fedsim/messages/flower_internals.py"}


def test_what_trains_clients_and_all_that_it_stands_on_need_neither_flower_nor_ray():
    seen, waiting = set(), {name for name in FILES if name.startswith(TORCH_ALONE)}
    assert waiting
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for m in all_imports()[name]:
            assert m.partition(".")[0] not in ("flwr", "ray"), f"{name} imports {m}"
            place = m.replace(".", "/")
            waiting |= {f"{place}.py", f"{place}/__init__.py"} & FILES.keys() - seen


WITHOUT_FLOWER = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flwr", "ray", "threadpoolctl", "pydantic", "safetensors"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refusing())

from typing import NamedTuple
import numpy as np
import torch
from fedsim.client.executor import ChunkJob, CohortExecutor
from fedsim.messages.layout import Layout, Payload
from clients.local_sgd import LocalSGD

class Rows(NamedTuple):
    features: np.ndarray
    targets: np.ndarray
    rows: list

class Data:
    num_clients = 3
    def clients(self, client_ids, *, split="train"):
        features = np.arange(12, dtype=np.float32).reshape(6, 2)
        rows = [np.arange(2 * c, 2 * c + 2) for c in client_ids]
        return Rows(features, np.array([0, 1] * 3), rows)

class Task:
    dtype = torch.float32
    def build_model(self, seed):
        model = torch.nn.Linear(2, 2)
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        return model
    def sample_losses(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    def statistics(self, outputs, targets, weights):
        return {"examples": weights.double().sum()}
    def metrics(self, sums):
        return dict(sums)

executor = CohortExecutor(Task(), LocalSGD(local_lr=0.1), Data(), seed=1)
job = ChunkJob(
    "train", 1, (0, 2), (False, False), executor.layout.fingerprint,
    Payload(torch.zeros(6)), has_state=(False, False),
)
result = executor.train(job)
assert result.num_examples.tolist() == [2, 2]
assert result.params.abs().sum() > 0
print("trained without", sorted({"flwr", "ray"} - set(sys.modules)))
"""


def test_a_chunk_trains_where_neither_flower_nor_ray_is_installed():
    done = subprocess.run(
        [sys.executable, "-c", QUICKLY + WITHOUT_FLOWER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "trained without ['flwr', 'ray']", done.stderr


def test_no_file_of_the_product_is_ignored_by_git():
    # what is ignored is in no clone, and nothing here would notice
    asked = ["git", "check-ignore", "--stdin"]
    names = "\n".join(FILES)
    done = subprocess.run(asked, cwd=ROOT, input=names, capture_output=True, text=True, check=False)
    if done.returncode == 128:
        pytest.skip("no git repository here")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import ray.exceptions", "ray.exceptions"),
        ("from flwr.proto import x", "flwr.proto"),
        ("from fedsim import strategy", "fedsim.strategy"),
        ("import importlib\nimportlib.import_module('flwr.proto')", "flwr.proto"),
        ("def f(n):\n    import_module(f'strategies.{n}')", "strategies"),
    ],
)
def test_the_search_finds_what_it_is_for(source, module):
    assert module in imports(source)


@pytest.mark.parametrize(
    "modules",
    [
        "fedsim.scenario.load",  # pins the kernels of NumPy and torch before they are imported
        "fedsim.cli",
        "fedsim.strategy, fedsim.client, fedsim.data, fedsim.tasks, fedsim.deployment",
    ],
)
def test_what_is_imported_first_imports_neither_numpy_nor_what_stands_on_it(modules):
    heavy = {"numpy", "torch", "flwr", "ray", "networkx", "pandas", "sklearn", "matplotlib"}
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr
