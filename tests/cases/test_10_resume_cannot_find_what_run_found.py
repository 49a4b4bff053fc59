"""`fedsim resume RUN` finds what the run found, from anywhere, or is told where it is now."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import read_json
from fedsim.basics.project import enter
from fedsim.cli import app
from fedsim.runs.folder import resuming
from tests.cases.own_projects import NET, project

ROUNDS = 3
ROWS = "a,b,label\n" + "".join(f"{i % 5},{i % 3},{i % 2}\n" for i in range(60))
MANIFESTED = {
    "data": "data", "loader": "data", "partition": "data", "trace": "participation",
    "graph": "topology", "weights": "weights",
}  # fmt: skip
LOADER = """
from pathlib import Path

from fedsim.data import DataSet


def load(path: str):
    rows = [line.split(",") for line in Path(path).read_text().splitlines()[1:]]
    return DataSet([[float(a), float(b)] for a, b, _ in rows], [int(c) for _, _, c in rows])
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test begins in a folder of its own, and no folder stays open for the next one."""
    monkeypatch.chdir(tmp_path)
    yield
    enter([])


def interrupted(scenario, out="run"):
    """Run a scenario to its end and take the last round away again; returns its hash."""
    result = fedsim.start(scenario, out=out)
    (result.folder / "checkpoints" / f"round_{ROUNDS:06d}.safetensors").unlink()
    (result.folder / "summary.json").unlink()
    return result.summary["params_sha256"]


def resumed(*arguments):
    """Give the command that a run prints; returns the hash."""
    enter([])  # as in another process
    said = CliRunner().invoke(app, ["resume", *map(str, arguments), "--quiet"])
    assert said.exit_code == 0, said.output
    return read_json(Path(arguments[0]) / "summary.json")["params_sha256"]


def refused(*arguments):
    enter([])
    said = CliRunner().invoke(app, ["resume", *map(str, arguments), "--quiet"])
    assert said.exit_code == 2, said.output
    return said.stderr


def test_the_scenarios_folder_is_found_again_from_anywhere(tmp_path, monkeypatch):
    file = project(tmp_path / "p", rounds=ROUNDS)
    expected = interrupted(fedsim.load_scenario(os.path.relpath(file)))
    run = Path("run").absolute()
    assert resuming(Path("run")) == f"fedsim resume {run}"
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert resumed(run) == expected


def test_the_working_folder_in_which_a_module_was_found_is_found_again(tmp_path, monkeypatch):
    file = project(tmp_path / "p" / "scenarios", rounds=ROUNDS)
    (tmp_path / "p" / "scenarios" / "model.py").rename(tmp_path / "p" / "model.py")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "p"))  # as the command line does
        expected = interrupted(fedsim.load_scenario(file))
    assert resumed("run") == expected


def test_a_project_that_was_moved_is_given_anew_and_remembered(tmp_path):
    expected = interrupted(fedsim.load_scenario(project(tmp_path / "p", rounds=ROUNDS)))
    (tmp_path / "p").rename(tmp_path / "moved")
    said = refused("run")
    assert "there is no such folder" in said
    assert "`--set modules=FOLDER`" in said
    shutil.copytree("run", "copy")
    assert resumed("run", "--set", "modules=moved") == expected
    assert resumed("run") == expected
    (tmp_path / "moved" / "model.py").write_text(NET.format(units=5))
    assert "model.py has changed since the run began" in refused("copy", "--set", "modules=moved")


def test_a_folder_without_the_module_says_which_setting_names_it(tmp_path):
    interrupted(fedsim.load_scenario(project(tmp_path / "p", rounds=ROUNDS)))
    (tmp_path / "p" / "model.py").rename(tmp_path / "p" / "net.py")
    assert "model.py is gone since the run began" in refused("run")
    Path("run/code.json").unlink()
    assert "`--set modules=FOLDER`" in refused("run")


def sets(kind, *, changed=False):
    """Write a file of a run's, or another one in its place: assignments, the key, its name."""
    if kind in ("data", "loader"):
        Path("own.csv").write_text(ROWS.replace("0,1,", "4,1,") if changed else ROWS)
        name = "folder" if kind == "data" else "loader:load"
        data = f"data={{name='{name}', path='own.csv'}}"
        return [data, *["task={}"] * (kind == "data")], "data.path", "own.csv"
    if kind == "partition":
        rows = [f"{i},{(i + changed) % 4}\n" for i in range(500)]
        Path("who.csv").write_text("sample,client\n" + "".join(rows))
        return ["partition={kind='file', path='who.csv'}"], "partition.path", "who.csv"
    if kind == "trace":
        rows = [f"{r},{c}\n" for r in range(1, ROUNDS + 1) for c in range(4 - changed) if c != r]
        Path("trace.csv").write_text("round,client\n" + "".join(rows))
        return ["participation={kind='trace', path='trace.csv'}"], "participation.path", "trace.csv"
    if kind == "graph":
        Path("graph.txt").write_text("0 1\n1 2\n2 3\n" + "3 0\n" * changed)
        topology = "topology={kind='file', path='graph.txt'}"
        return ["strategy.name=gossip", topology], "topology.path", "graph.txt"
    torch.manual_seed(changed)
    layers = torch.nn.Linear(30, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
    save_file(torch.nn.Sequential(*layers).state_dict(), "start.safetensors")
    return ["task.weights=start.safetensors"], "task.weights", "start.safetensors"


@pytest.mark.parametrize("kind", ["data", "loader", "partition", "trace", "graph", "weights"])
def test_a_file_that_was_moved_is_named_given_anew_and_held_against_the_old(tmp_path, kind):
    assigned, key, name = sets(kind)
    file = project(tmp_path / "p", rounds=ROUNDS, loader=LOADER)
    expected = interrupted(fedsim.load_scenario(file, assigned))
    Path("new").mkdir()
    Path(name).rename(f"new/{name}")
    said = refused("run")
    assert "is no longer there" in said
    assert f"--set {key}=PATH" in said
    shutil.copytree("run", "copy")
    assert resumed("run", "--set", f"{key}=new/{name}") == expected
    assert resumed("run") == expected
    sets(kind, changed=True)
    said = CliRunner().invoke(app, ["resume", "copy", "--set", f"{key}={name}"])
    assert said.exit_code == 1
    assert f"bring the {MANIFESTED[kind]} back" in said.stderr


def test_weights_that_a_run_never_had_change_its_result(tmp_path):
    sets("weights")
    interrupted(fedsim.load_scenario(project(tmp_path / "p", rounds=ROUNDS)))
    said = refused("run", "--set", "task.weights=weights.safetensors")
    assert "would change the result of a run that has begun" in said


def test_a_loader_that_reads_where_the_run_was_begun_says_where_that_was(tmp_path, monkeypatch):
    loader = LOADER.replace("path: str", "").replace("Path(path)", "Path('own.csv')")
    Path("own.csv").write_text(ROWS)
    file = project(tmp_path / "p", rounds=ROUNDS, data="loader:load", loader=loader)
    expected = interrupted(fedsim.load_scenario(file))
    run = Path("run").absolute()
    (tmp_path / "away").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "away")
        assert f"the run was begun in {tmp_path}: resume it there" in refused(run)
    assert resumed(run) == expected


def test_a_wrong_setting_is_refused_with_its_own_words(tmp_path):
    interrupted(fedsim.load_scenario(project(tmp_path / "p", rounds=ROUNDS)))
    with pytest.raises(ScenarioError, match="modules = 'nowhere': there is no such folder"):
        fedsim.resume("run", overrides=["modules=nowhere"])


FILES = {
    "rows": LOADER.replace("path: str", "csv_file: str").replace("Path(path)", "Path(csv_file)"),
    "strat": """
from pathlib import Path

from flwr.serverapp.strategy import FedAvg


class Reads(FedAvg):
    def __init__(self, folder: str, again: bool = True):
        super().__init__(min_available_nodes=1)
        self.folder, self.again = folder, again
        self.share = len((Path(folder) / "names.txt").read_text())

    def aggregate_train(self, server_round, replies):
        if self.again:
            (Path(self.folder) / "names.txt").read_text()
        return super().aggregate_train(server_round, replies)
""",
    "nets": """
from pathlib import Path

from torch import nn


def net(feature_shape, num_classes, *, words: str = "x"):
    units = len(Path(words).read_text())
    layers = nn.Linear(feature_shape[0], units), nn.ReLU(), nn.Linear(units, num_classes)
    return nn.Sequential(*layers)
""",
}


def own_places(kind):
    """Write what an argument of own code names: assignments, its key, where it lies."""
    Path("old").mkdir(exist_ok=True)
    Path("old/names.txt").write_text("names")
    Path("old/own.csv").write_text(ROWS)
    if kind == "rows":
        return ["data={name='rows:load', csv_file='old/own.csv'}"], "data.csv_file", "own.csv"
    if kind == "nets":
        task = "task={model='nets:net', words='old/names.txt'}"
        return [task], "task.words", "names.txt"
    return ["strategy={name='strat:Reads', folder='old'}"], "strategy.folder", ""


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_own_code_under_any_key_is_found_from_anywhere_and_given_anew(
    kind, tmp_path, monkeypatch
):
    assigned, key, name = own_places(kind)
    file = project(tmp_path / "p", rounds=ROUNDS, **FILES)
    expected = interrupted(fedsim.load_scenario(file, assigned))
    for copied in ("moved", "other", "elsewhere"):
        shutil.copytree("run", copied)
    run = Path("elsewhere").absolute()
    Path("away/old").mkdir(parents=True)  # another one of that name
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "away")
        assert resumed(run) == expected
    Path("old").rename("new")
    said = refused("moved")
    if kind == "strat":  # a word alone may be none; what misses it says so
        assert '[strategy] folder = "old": old/names.txt: No such file' in said
    else:
        assert f"is no longer there; say where it lies now: --set {key}=PATH" in said
    assert resumed("moved", "--set", f"{key}=new/{name}") == expected
    assert resumed("moved") == expected
    for each in ("names.txt", "own.csv"):
        changed = Path("new") / each
        changed.write_text(changed.read_text().replace("0,1,", "4,1,").replace("names", "other"))
    enter([])
    said = CliRunner().invoke(app, ["resume", "other", "--set", f"{key}=new/{name}"])
    assert said.exit_code == (1 if kind == "rows" else 2), said.output
    assert ("bring the data back" if kind == "rows" else "is not what the run began") in said.stderr
    Path("new").rename("old")
    own_places(kind)  # as it was
    said = refused("other", "--set", f"{key}=nowhere")
    assert "would change the result" in said or '[strategy] folder = "nowhere"' in said


@pytest.mark.parametrize("folder", ["x" * 200, "a 'quoted\" name", "\u00e9t\u00e9 \\ 2"])
def test_a_place_may_have_any_name(tmp_path, folder, monkeypatch):
    Path(folder).mkdir()
    assigned, key, name = own_places("rows")
    file = project(tmp_path / "p", rounds=ROUNDS, **FILES)
    expected = interrupted(fedsim.load_scenario(file, assigned))
    run = Path("run").absolute()
    Path("old").rename(Path(folder) / "old")
    there = Path(folder).absolute()
    monkeypatch.chdir(tmp_path / "p")
    assert resumed(run, "--set", f"{key}={there}/old/{name}") == expected
    assert resumed(run) == expected


def test_a_missing_file_of_a_strategy_is_named_with_the_key_that_holds_it(tmp_path):
    own_places("strat")
    file = project(tmp_path / "p", **FILES)
    with pytest.raises(
        ScenarioError, match=r'\[strategy\] folder = "gone": gone/names.txt: No such file .*working'
    ):
        fedsim.load_scenario(file, ["strategy={name='strat:Reads', folder='gone'}"])


def test_a_missing_file_whose_name_only_begins_like_an_argument_is_none_of_its_key(tmp_path):
    own_places("strat")
    other = FILES["strat"].replace('(Path(folder) / "names.txt")', "Path(folder + 'er.txt')")
    file = project(tmp_path / "p", **{**FILES, "strat": other})
    with pytest.raises(ScenarioError, match=r"\[strategy\] \"older.txt\": No such file"):
        fedsim.load_scenario(file, ["strategy={name='strat:Reads', folder='old'}"])


def test_a_word_that_is_a_folders_name_by_chance_stays_a_word(tmp_path):
    Path("mean").mkdir()
    words = FILES["strat"].replace("folder: str", "folder: str, kind: str = 'mean'")
    own_places("strat")
    file = project(tmp_path / "p", rounds=ROUNDS, strat=words)
    expected = interrupted(
        fedsim.load_scenario(file, ["strategy={name='strat:Reads', folder='old', kind='mean'}"])
    )
    shutil.copytree("run", "copy")
    Path("mean").rmdir()
    assert "would change the result" in refused("run", "--set", "strategy.kind=median")
    assert resumed("run") == expected
