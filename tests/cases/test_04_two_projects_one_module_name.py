"""Two projects of one session, each with a `model.py`: each trains its own, in any order."""

import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.project import enter
from fedsim.cli import app
from fedsim.runs.execute import execute
from fedsim.runs.folder import create
from fedsim.runs.manifest import write_plan
from fedsim.runs.start import make_grid
from fedsim.runs.world import build
from tests.basics.processes import QUICKLY
from tests.cases.own_projects import NET, project

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _closed():
    """No test's folders stay open for the next one."""
    yield
    enter([])


def trained(scenario, out):
    """How many hidden units the model of a run has."""
    result = fedsim.start(scenario, out=out)
    return len(load_file(result.folder / "params.safetensors")["0.weight"])


def test_each_trains_its_own_module_whichever_was_loaded_or_run_before(tmp_path):
    first = fedsim.load_scenario(project(tmp_path / "first", units=4))
    assert trained(first, tmp_path / "a") == 4
    second = fedsim.load_scenario(project(tmp_path / "second", units=7))
    assert trained(second, tmp_path / "b") == 7
    assert trained(first, tmp_path / "c") == 4
    assert trained(second.with_overrides(["seed=2"]), tmp_path / "d") == 7


def test_worlds_that_are_built_before_they_run_keep_their_modules(tmp_path):
    scenarios = [
        fedsim.load_scenario(project(tmp_path / name, units=units))
        for name, units in (("first", 4), ("second", 7))
    ]
    worlds = [build(each) for each in scenarios]
    for world, units in zip(worlds, (4, 7), strict=True):
        folder = create(tmp_path / f"run{units}", world.scenario)
        write_plan(world, folder)
        with make_grid(world) as grid:
            execute(world, folder, grid, seed=1)
        assert len(load_file(folder.file("params.safetensors"))["0.weight"]) == units


def test_what_a_module_imports_is_its_projects_own_too(tmp_path):
    model = "from inside.layers import net\n"
    late = (
        "def net(feature_shape, num_classes):\n    from inside import layers\n"
        "    return layers.net(feature_shape, num_classes)\n"
    )
    for name, text, units in (("first", model, 4), ("second", late, 7), ("third", late, 5)):
        layers = {"inside/layers": NET.format(units=units), "inside/__init__": ""}
        project(tmp_path / name, **{"model": text, **layers})
    for name, units in (("first", 4), ("second", 7), ("third", 5), ("first", 4)):
        file = tmp_path / name / "scenario.toml"
        found = trained(
            fedsim.load_scenario(file),
            tmp_path / f"run-{units}-{name}-{len([*tmp_path.iterdir()])}",
        )
        assert found == units


def test_a_project_does_not_import_what_lies_beside_another_one(tmp_path):
    project(tmp_path / "first", model="from layers import net\n", layers=NET.format(units=4))
    project(tmp_path / "second", model="from layers import net\n")
    fedsim.load_scenario(tmp_path / "first" / "scenario.toml")
    with pytest.raises(ScenarioError, match=r"'model' needs a missing one.*'layers'"):
        fedsim.load_scenario(tmp_path / "second" / "scenario.toml")


def test_a_module_that_is_edited_between_two_starts_is_read_anew(tmp_path):
    layers = NET.format(units=4)
    file = project(tmp_path / "p", model="from layers import net\n", layers=layers)
    scenario = fedsim.load_scenario(file)
    assert trained(scenario, tmp_path / "a") == 4
    # as many bytes, in the same second: what is compiled by Python itself would stay the old
    (tmp_path / "p" / "layers.py").write_text(layers.replace("4", "9"))
    assert trained(scenario, tmp_path / "b") == 9
    assert trained(fedsim.load_scenario(file), tmp_path / "c") == 9


def test_a_module_that_was_imported_before_and_edited_then_is_read_anew(tmp_path, monkeypatch):
    file = project(tmp_path / "p", units=4)
    monkeypatch.syspath_prepend(str(tmp_path / "p"))
    import model  # as a notebook's first cell does

    (tmp_path / "p" / "model.py").write_text(NET.format(units=11))
    assert trained(fedsim.load_scenario(file), tmp_path / "a") == 11
    assert model.net((3,), 2)[0].out_features == 4  # what the notebook holds is its own


def test_the_module_beside_comes_before_the_working_folders(tmp_path, monkeypatch):
    project(tmp_path / "here", units=4)
    file = project(tmp_path / "there", units=7)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    assert trained(fedsim.load_scenario(file), tmp_path / "a") == 7


@pytest.mark.parametrize(("name", "whose"), [("queue", "Python's own"), ("click", "installed")])
def test_a_module_beside_that_another_one_hides_is_refused(tmp_path, name, whose):
    file = project(tmp_path / "p", named=f"{name}:net", **{name: NET.format(units=4)})
    with pytest.raises(ScenarioError, match=rf"{name}\.py lies beside .*{whose}.*another name"):
        fedsim.load_scenario(file)


@pytest.mark.slow
def test_a_study_of_two_projects_trains_each_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, units in (("a", 4), ("b", 7)):
        project(tmp_path / name, units=units)
    files = ("a/scenario.toml", "b/scenario.toml")
    done = CliRunner().invoke(app, ["compare", *files, "--seeds", "2", "--out", "st"])
    assert done.exit_code == 0, done.output
    models = [load_file(f / "params.safetensors") for f in (tmp_path / "st" / "cells").iterdir()]
    assert sorted(len(model["0.weight"]) for model in models) == [4, 4, 7, 7]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_workers_train_each_projects_own(tmp_path, engine):
    for name, units in (("first", 4), ("second", 7)):
        project(tmp_path / name, units=units, engine=engine)
    script = """
        import json
        import fedsim
        from safetensors.torch import load_file
        found = []
        for name in ("first", "second", "first"):
            scenario = fedsim.load_scenario(f"{name}/scenario.toml")
            result = fedsim.start(scenario, workers=1)
            found.append(len(load_file(result.folder / "params.safetensors")["0.weight"]))
        print(json.dumps(found))
    """
    done = subprocess.run(
        [sys.executable, "-c", QUICKLY + textwrap.dedent(script)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [4, 7, 4]


OF_LIB = """
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "lib"))
from layers import net
"""


def with_lib(folder, units):
    """A project whose model puts a folder of its own on `sys.path` and imports from there."""
    file = project(folder, model=OF_LIB)
    (folder / "lib").mkdir()
    (folder / "lib" / "layers.py").write_text(textwrap.dedent(NET).format(units=units))
    return file


def test_a_folder_that_a_project_puts_on_the_path_is_left_with_it(tmp_path):
    before = list(sys.path)
    first = fedsim.load_scenario(with_lib(tmp_path / "first", 4))
    second = fedsim.load_scenario(with_lib(tmp_path / "second", 7))
    found = [trained(s, tmp_path / str(n)) for n, s in enumerate((first, second, first, second))]
    assert found == [4, 7, 4, 7]
    enter([])
    assert [entry for entry in sys.path if entry not in before] == []
    assert "layers" not in sys.modules


def test_an_edit_below_a_project_is_trained_in_the_same_session(tmp_path):
    file = with_lib(tmp_path / "p", 4)
    assert trained(fedsim.load_scenario(file), tmp_path / "a") == 4
    layers = tmp_path / "p" / "lib" / "layers.py"
    layers.write_text(textwrap.dedent(NET).format(units=9))
    assert trained(fedsim.load_scenario(file), tmp_path / "b") == 9


def test_a_second_thread_with_another_project_is_refused_and_harms_nobody(tmp_path):
    waits = (
        "\nimport time\nfrom pathlib import Path\n\nHERE = Path(__file__).parent\ntwice = net\n\n\n"
        "def net(feature_shape, num_classes):\n    (HERE / 'begun').touch()\n"
        "    for _ in range(3000):\n        if (HERE / 'go').exists():\n            break\n"
        "        time.sleep(0.01)\n    from inside import layers\n"
        "    return layers.net(feature_shape, num_classes)\n"
    )
    inside = {"inside/__init__": "", "inside/layers": NET.format(units=4)}
    slow = project(tmp_path / "slow", model=NET.format(units=9) + waits, **inside)
    inside["inside/layers"] = inside["model"] = NET.format(units=7)
    other = project(tmp_path / "other", **inside)
    plain = project(tmp_path / "plain", named="mlp")
    second = fedsim.load_scenario(other)
    first, found = fedsim.load_scenario(slow), []
    thread = threading.Thread(target=lambda: found.append(trained(first, tmp_path / "a")))
    thread.start()
    try:
        while not (tmp_path / "slow" / "begun").exists():
            assert thread.is_alive()
            time.sleep(0.01)
        for attempt in (
            lambda: trained(second, tmp_path / "b"),
            lambda: fedsim.load_scenario(other),
        ):
            with pytest.raises(ScenarioError, match="another thread of this process runs code of"):
                attempt()
        assert not (tmp_path / "b").exists()
        assert fedsim.load_scenario(plain).folders == []
        assert fedsim.load_scenario(slow).code == first.code
    finally:
        (tmp_path / "slow" / "go").touch()
        thread.join()
    assert found == [4]
    assert trained(second, tmp_path / "b") == 7
