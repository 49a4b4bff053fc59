import sys

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.basics.import_paths import folders_of, names_in_source, resolve
from fedsim.basics.project import enter, opened, plain_path


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module which can be imported during the test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_a_dotted_name_reaches_into_a_class(module):
    module("mine_nested", "class Outer:\n    @staticmethod\n    def make():\n        return 42\n")
    assert resolve("mine_nested:Outer.make", what="[task] model")() == 42


@pytest.mark.parametrize("path", ["", ":", "module:", ":name", "a b:c", "module:na me", "1:2"])
def test_a_malformed_path_is_refused_with_the_form_it_has(path):
    with pytest.raises(ScenarioError, match=r"an import path reads 'package\.module:name'"):
        resolve(path, what="[task] model")


def test_a_missing_module_is_named_with_advice():
    with pytest.raises(
        ScenarioError,
        match=r"\[task\] model = 'nowhere_at_all.deep:f': no module named 'nowhere_at_all'; "
        "is the folder that holds it on PYTHONPATH",
    ):
        resolve("nowhere_at_all.deep:f", what="[task] model")


def test_a_missing_module_that_the_users_module_needs_is_told_apart(module):
    module("mine_needy", "import not_installed_here\n")
    with pytest.raises(
        ScenarioError, match=r"'mine_needy' needs a missing one.*not_installed_here"
    ):
        resolve("mine_needy:f", what="[task] model")


def test_a_module_that_fails_on_import_is_named_with_its_error(module):
    module("mine_broken", "raise KeyError('who')\n")
    with pytest.raises(ScenarioError, match="importing 'mine_broken' failed with KeyError: 'who'"):
        resolve("mine_broken:f", what="[task] model")


def test_a_missing_name_is_refused_with_the_nearest_one(module):
    module("mine_typo", "def small_net():\n    pass\n")
    with pytest.raises(ScenarioError, match="has no 'smal_net'; did you mean 'small_net'"):
        resolve("mine_typo:smal_net", what="[task] model")


def test_a_module_beside_a_scenario_is_found_and_nothing_else_is_searched(tmp_path):
    here = str(tmp_path)
    for path in ("not_there:f", "../x:f", ":f", "x" * 300 + ":f"):
        assert folders_of({"[task] model": path}, "", tmp_path) == []
    assert opened() == ()
    (tmp_path / "mine_beside.py").write_text("f = 1\n")
    assert folders_of({"[task] model": "mine_beside:f"}, "", tmp_path) == [here]
    assert (opened(), sys.path[-1]) == ((here,), here)
    assert here not in plain_path()
    assert resolve("mine_beside:f", what="[task] model") == 1
    enter([])
    assert here not in sys.path
    assert "mine_beside" not in sys.modules


def test_names_are_read_from_a_source_without_running_it(tmp_path, monkeypatch):
    lines = [
        "raise RuntimeError('it ran')",
        "ONE = {'a': 1, 'b': 2}",
        "TWO: dict[str, int] = {'c': 1}",
        "THREE = ['d']",
        "FOUR = {name: 1 for name in ONE}",
        "FIVE = {**ONE, 'e': 1}",
    ]
    (tmp_path / "listing.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    read = {name: names_in_source("listing", name) for name in ("ONE", "TWO", "THREE")}
    assert read == {"ONE": ["a", "b"], "TWO": ["c"], "THREE": ["d"]}
    assert [names_in_source("listing", name) for name in ("FOUR", "FIVE", "SIX")] == [None] * 3
    assert names_in_source("no_such_module", "ONE") is None
