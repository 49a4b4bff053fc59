"""`fedsim new`: the project it writes runs as it is, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.cli.new.project import create

BIN = Path(sys.executable).parent
ENVIRONMENT = {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}


def shell(command, folder):
    """Run a command as typed into a shell, with this environment's programs."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, **ENVIRONMENT},
    )


def test_the_next_command_that_is_printed_runs(tmp_path):
    made = shell("fedsim new demo", tmp_path)
    assert made.returncode == 0, made.stderr
    *_, heading, command = made.stdout.splitlines()
    assert heading == "run it:"
    ran = shell(f"{command} --set engine.kind=inline", tmp_path)  # no Ray, for its time
    assert ran.returncode == 0, ran.stderr  # and so its claims hold
    assert "holds" in ran.stdout
    (run,) = (tmp_path / "demo" / "runs").iterdir()
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rounds[-1]["round"] == 20
    assert rounds[-1]["server/speed"] > 0  # the project's own strategy was the one that ran


@pytest.fixture
def imported(monkeypatch):
    """A function that imports a file; what it imports in turn is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def imported(file):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield imported
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "demo":
            del sys.modules[name]


@pytest.mark.parametrize("client", [False, True])
def test_the_project_s_own_tests_pass(tmp_path, imported, client):
    project = create(tmp_path / "demo", client=client)
    module = imported(project.folder / "tests" / "test_demo.py")
    tests = [name for name in vars(module) if name.startswith("test_")]
    assert len(tests) == 3
    for name in tests:
        (tmp_path / name).mkdir()
        getattr(module, name)(tmp_path / name)


def test_the_project_s_sources_are_clean(tmp_path):
    project = create(tmp_path / "demo", client=True)
    linted = shell("ruff check --isolated . && ruff format --isolated --check .", project.folder)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.slow
def test_the_project_runs_from_any_folder_on_ray_too(tmp_path):
    create(tmp_path / "far" / "demo", client=True)
    ran = shell("fedsim run far/demo/scenario.toml --set rounds=2 --set expect={}", tmp_path)
    assert ran.returncode == 0, ran.stderr
    tested = shell("python -m pytest -q -p no:cacheprovider", tmp_path / "far" / "demo")
    assert tested.returncode == 0, tested.stdout


@pytest.mark.parametrize("client", [False, True])
def test_every_part_is_named_by_import_path(tmp_path, client):
    project = create(tmp_path / "demo", client=client)
    scenario = tomllib.loads((project.folder / "scenario.toml").read_text())
    assert scenario["task"]["model"] == "demo.model:build"
    assert scenario["data"]["name"] == "demo.data:load"
    assert scenario["strategy"]["name"] == "demo.strategy:ServerMomentum"
    expected = "demo.client:NormalisedSGD" if client else "local_sgd"
    assert scenario["client"]["name"] == expected
    written = {
        path.relative_to(project.folder).as_posix()
        for path in project.folder.rglob("*")
        if path.is_file()
    }
    assert written == set(project.files)
    assert ("demo/client.py" in written) == client
    for path in written:
        assert "$" not in (project.folder / path).read_text()


def test_the_next_command_names_a_folder_that_needs_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project = create("my folder/demo")
    assert project.next_command == "cd 'my folder/demo' && fedsim run scenario.toml"


def test_an_empty_folder_that_is_there_is_filled_and_can_be_the_present_one(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path / "demo")
    project = create(".")
    assert project.next_command == "fedsim run scenario.toml"
    assert (tmp_path / "demo" / "demo" / "model.py").is_file()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my-project", "did you mean 'my_project'?"),
        ("2demo", "did you mean 'my_2demo'?"),
        ("class", "did you mean 'my_class'?"),
        ("a b", "did you mean 'a_b'?"),
        ("\x1b[2J", "'\\x1b[2J' cannot be the name of a project"),
        ("torch", "already finds"),
        ("json", "a module of Python's own"),
        ("sys", "a module of Python's own"),
        ("fedsim", "fedsim uses it"),
        ("tests", "fedsim uses it; call it 'my_tests'?"),
    ],
)
def test_a_name_that_cannot_be_a_package_s_is_refused(tmp_path, name, expected):
    with pytest.raises(ScenarioError) as caught:
        create(tmp_path / name)
    assert expected in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")
    with pytest.raises(ScenarioError, match="is a folder that holds something already"):
        create(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ScenarioError, match=r"file/demo: cannot be written: Not a directory"):
        create(tmp_path / "file" / "demo")
    (tmp_path / "taken").write_text("")
    with pytest.raises(ScenarioError, match=r"taken: cannot be written"):
        create(tmp_path / "taken")


def test_the_command_prints_one_document_on_demand(tmp_path):
    made = shell("fedsim new demo --json", tmp_path)
    document = json.loads(made.stdout)
    assert document["next"] == "cd demo && fedsim run scenario.toml"
    assert document["files"][0] == "README.md"
    again = shell("fedsim new demo", tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("fedsim: demo: is a folder that holds something already")
