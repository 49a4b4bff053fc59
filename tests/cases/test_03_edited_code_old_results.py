"""Results of code that is no longer there are never given for those of the code that is."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.import_paths import code_behind
from fedsim.basics.json_files import read_json
from fedsim.basics.project import enter
from fedsim.basics.sources import behind, changes
from fedsim.cli import app
from fedsim.studies.cells.cell import cells_of
from fedsim.studies.cells.code import said_of_code
from fedsim.studies.cells.given import of_runs
from fedsim.studies.cells.variants import of_scenarios
from tests.cases.own_projects import NET, project

LAYERS = NET.format(units=4)
LOADER = """
from fedsim.data import DataSet
import shapes

def load():
    return DataSet([[float(i % 7), 1.0] for i in range(shapes.SAMPLES)],
                   [i % 2 for i in range(shapes.SAMPLES)])
"""


@pytest.fixture(autouse=True)
def _closed():
    yield
    enter([])


def fedsim_(*arguments):
    """The command line, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def folders(file, study=Path("study")):
    """The run folders that a study would have of a scenario."""
    return [cell.folder for cell in cells_of(of_scenarios([str(file)], [], []), (1, 2), study)]


def edit(file):
    file.write_text(file.read_text() + "\n# edited\n")


def test_a_study_has_other_runs_once_the_module_was_edited_and_the_old_ones_when_it_is_back(
    tmp_path,
):
    file = project(tmp_path / "p")
    before = folders(file)
    model = tmp_path / "p" / "model.py"
    kept = model.read_text()
    edit(model)
    assert not set(before) & set(folders(file))
    model.write_text(kept)
    assert folders(file) == before


def test_an_edit_is_named_with_its_file_and_said_once(tmp_path):
    file = project(tmp_path / "p", model="from layers import net\n", layers=LAYERS)
    (tmp_path / "study").mkdir()

    def said():
        return said_of_code([fedsim.load_scenario(file)], tmp_path / "study")

    assert said() == []
    edit(tmp_path / "p" / "layers.py")
    (line,) = said()
    assert line.startswith("layers.py has changed since this study was run")
    assert said() == []


@pytest.mark.parametrize(
    ("modules", "edited"),
    [
        ({"model": "from layers import net\n", "layers": LAYERS}, "layers.py"),
        ({"model": "import layers as l\nnet = l.net\n", "layers": LAYERS}, "layers.py"),
        (
            {
                "model": "def net(feature_shape, num_classes):\n    from deep import layers\n"
                "    return layers.net(feature_shape, num_classes)\n",
                "deep/__init__": "from . import other\n",
                "deep/other": "",
                "deep/layers": LAYERS,
            },
            "deep/other.py",
        ),
        (
            {"model": "import importlib\nnet = importlib.import_module('late').net\n",
             "late": LAYERS},
            "late.py",
        ),
    ],
)  # fmt: skip
def test_what_a_module_imports_counts_too(tmp_path, modules, edited):
    file = project(tmp_path / "p", **modules)
    before = fedsim.load_scenario(file).code
    assert {"model.py", edited} <= set(before.files)
    edit(tmp_path / "p" / edited)
    after = fedsim.load_scenario(file).code
    assert changes(before.files, after.files) == f"{edited} has changed"
    assert before.sha256 != after.sha256


def test_every_kind_of_thing_that_is_named_counts(tmp_path):
    one = "from {} import {} as Base\n\nclass Mine(Base):\n    pass\n"
    named = {
        "task.kind": ("mytask", one.format("fedsim.tasks", "Classification")),
        "strategy.name": ("mystrategy", one.format("strategies.fedavg", "FedAvg")),
        "client.name": ("myclient", one.format("clients.local_sgd", "LocalSGD")),
    }
    modules = dict(named.values())
    file = project(tmp_path / "p", data="loader:load", loader=LOADER, shapes="SAMPLES = 30\n",
                   **modules)  # fmt: skip
    sets = [f"{key}={module}:Mine" for key, (module, _) in named.items()]
    code = fedsim.load_scenario(file, sets).code
    expected = {"model", "loader", "shapes", *modules}
    assert set(code.files) == {f"{name}.py" for name in expected}
    wrapped = (
        'strategy={name="flower:DifferentialPrivacyServerSideFixedClipping", noise_multiplier=0.1, '
        'clipping_norm=1.0, strategy={name="mystrategy:Mine"}}'
    )
    assert "mystrategy.py" in fedsim.load_scenario(file, [wrapped]).code.files


def test_what_is_installed_or_fedsims_own_does_not_count(tmp_path):
    model = "import numpy, torch, fedsim.tasks.models.named, strategies.fedavg, json\n" + LAYERS
    file = project(tmp_path / "p", model=model)
    assert set(fedsim.load_scenario(file).code.files) == {"model.py"}
    assert fedsim.load_scenario("quickstart").code.sha256 == ""


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("exec('x = 1')", "line 1: exec runs code that it makes"),
        ("import importlib; importlib.import_module('js' + 'on')", "line 1: import_module imports"),
        ("import runpy\ndef f(p): runpy.run_path(p)", "line 2: run_path runs a file"),
        (
            "from importlib import import_module as load\nload('js' + 'on')",
            "line 2: import_module imports",
        ),
        (
            "from importlib.machinery import SourceFileLoader as L\ndef f(p): L('x', p)",
            "line 2: SourceFileLoader imports a file",
        ),
        ("import pkgutil\npkgutil.resolve_name('json:' + 'dumps')", "line 2: resolve_name imports"),
        ("x = eval('1 + 1')", "line 1: eval runs code that it makes"),
        ("def f(p): return compile(open(p).read(), p, 'exec')", "line 1: compile makes code"),
    ],
)
def test_what_cannot_be_followed_is_said(tmp_path, line, why):
    file = project(tmp_path / "p", model=f"{line}\n{LAYERS}")
    (said,) = fedsim.load_scenario(file).code.unfollowed
    assert f"model.py, {why}" in said
    result = fedsim.start(fedsim.load_scenario(file), out=tmp_path / "run")
    assert f"cannot be followed: model.py, {why}" in (result.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "line",
    ["import re\nP = re.compile('a')", "from torch import nn\nnn.Identity().eval()",
     "from importlib import import_module as load\nload('json')"],
)  # fmt: skip
def test_nothing_is_said_of_what_only_looks_like_it(tmp_path, line):
    file = project(tmp_path / "p", model=f"{line}\n{LAYERS}")
    assert not fedsim.load_scenario(file).code.unfollowed


def test_a_module_that_is_imported_by_a_function_of_another_name_counts(tmp_path):
    load = "from importlib import import_module as load\nload('layers')\n"
    file = project(tmp_path / "p", model=f"{load}{LAYERS}", layers=LAYERS)
    assert "layers.py" in fedsim.load_scenario(file).code.files


def test_a_compiled_module_counts_by_its_bytes_and_is_said(tmp_path):
    place = tmp_path / "fast.so"
    place.write_bytes(b"one")
    before = behind(["fast"], [str(tmp_path)])
    place.write_bytes(b"two!")
    after = behind(["fast"], [str(tmp_path)])
    assert changes(before.files, after.files) == "fast.so has changed"
    assert after.unfollowed == ("fast.so is compiled: what it calls is not followed",)


@pytest.mark.parametrize("has_file", [True, False])
def test_a_script_counts_by_its_file_and_a_notebook_by_the_source_of_what_it_names(
    tmp_path, monkeypatch, has_file
):
    script = tmp_path / "script.py"
    script.write_text("import beside\n")
    (tmp_path / "beside.py").write_text("")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "net", edit, raising=False)
    monkeypatch.setattr(main, "__file__", str(script) if has_file else None, raising=False)
    found = code_behind(["__main__:net"], [str(tmp_path)])
    assert set(found.files) == ({"beside.py", "script.py"} if has_file else {"__main__.net"})
    assert ["the source alone is known" in each for each in found.unfollowed] == [True] * (
        not has_file
    )


def test_two_folders_with_equal_scenarios_are_two_variants_where_their_modules_differ(tmp_path):
    files = [str(project(tmp_path / name, units=n)) for name, n in (("a", 4), ("b", 5))]
    assert len(of_scenarios(files, [], [])) == 2
    project(tmp_path / "b", units=4)
    with pytest.raises(ScenarioError, match="are the same scenario"):
        of_scenarios(files, [], [])


def test_a_run_is_not_resumed_with_other_code_and_names_the_file(tmp_path):
    file = project(tmp_path / "p", model="from layers import net\n", layers=LAYERS)
    result = fedsim.start(fedsim.load_scenario(file), out=tmp_path / "run")
    assert set(read_json(result.folder / "code.json")["files"]) == {"model.py", "layers.py"}
    fedsim.resume(result.folder)
    (tmp_path / "p" / "layers.py").write_text("raise RuntimeError('not even imported')\n")
    said = fedsim_("resume", result.folder)
    assert said.exit_code == 2
    assert "layers.py has changed since the run began" in said.stderr
    (tmp_path / "p" / "layers.py").write_text(LAYERS)
    assert fedsim_("resume", result.folder).exit_code == 0


def test_a_run_from_before_code_was_remembered_is_resumed_as_ever(tmp_path):
    file = project(tmp_path / "p")
    result = fedsim.start(fedsim.load_scenario(file), out=tmp_path / "run")
    (result.folder / "code.json").unlink()
    edit(tmp_path / "p" / "model.py")
    again = fedsim.resume(result.folder).summary
    assert again["params_sha256"] == result.summary["params_sha256"]


def test_runs_of_other_code_are_no_seeds_of_one_variant(tmp_path):
    file = project(tmp_path / "p")
    runs = []
    for seed in (1, 2):
        scenario = fedsim.load_scenario(file, [f"seed={seed}"])
        runs.append(str(fedsim.start(scenario, out=tmp_path / f"run{seed}").folder))
    assert [sorted(variant.given) for variant in of_runs(runs)] == [[1, 2]]
    edit(tmp_path / "p" / "model.py")
    scenario = fedsim.load_scenario(file, ["seed=2"])
    runs[1] = str(fedsim.start(scenario, out=tmp_path / "edited").folder)
    assert [sorted(variant.given) for variant in of_runs(runs)] == [[1], [2]]


@pytest.mark.slow
def test_compare_runs_the_edited_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project(tmp_path, rounds=2)
    asked = ("compare", "scenario.toml", "--vary", "client.local_lr=0.01,0.1", "--seeds", "2")
    first = fedsim_(*asked, "--out", "study", "--json")
    assert first.exit_code == 0, first.output
    again = json.loads(fedsim_(*asked, "--out", "study", "--json").stdout)
    assert again["variants"] == json.loads(first.stdout)["variants"]
    assert len(list(Path("study/cells").iterdir())) == 4
    Path("model.py").write_text(NET.format(units=2))
    edited = fedsim_(*asked, "--out", "study")
    assert len(list(Path("study/cells").iterdir())) == 8
    assert "model.py has changed since this study was run" in edited.stdout


@pytest.mark.slow
def test_a_recording_names_the_edited_file_and_lets_an_edit_without_effect_pass(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    project(tmp_path, rounds=2)
    assert fedsim_("golden", "--update", "scenario.toml", "--why", "first").exit_code == 0
    assert set(read_json(Path("golden/scenario.json"))["code"]) == {"model.py"}
    edit(Path("model.py"))
    said = fedsim_("check", "scenario.toml")
    assert said.exit_code == 0, said.output
    assert "model.py has changed since it was recorded; results are the same" in said.stdout
    Path("model.py").write_text(NET.format(units=2))
    said = fedsim_("check", "scenario.toml")
    assert said.exit_code == 3
    assert "model.py has changed since it was recorded" in said.stdout
