"""What a model's code reads besides modules decides a result as its source does."""

import json
import os
import subprocess
import sys

import pytest

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.json_files import read_json
from fedsim.basics.project import enter
from fedsim.basics.reads import by_now, watching
from fedsim.runs.world import build
from fedsim.studies.cells.cell import cells_of
from fedsim.studies.cells.code import said_of_code
from fedsim.studies.cells.given import of_runs
from fedsim.studies.cells.variants import of_scenarios
from tests.cases.own_projects import project

HEAD = "import json, os\nfrom pathlib import Path\nimport torch\nfrom torch import nn\n"
NETWORK = (
    "def net(feature_shape, num_classes):\n"
    "    units = {units}\n"
    "    return nn.Sequential(nn.Linear(feature_shape[0], units), nn.ReLU(),"
    " nn.Linear(units, num_classes))\n"
)
CONFIG = "CONFIG = Path(__file__).with_name('config.json')\n"
READERS = {
    "a function": HEAD + CONFIG + NETWORK.format(units="json.loads(CONFIG.read_text())['units']"),
    "an import": HEAD + CONFIG + "with open(CONFIG) as f:\n    UNITS = json.load(f)['units']\n"
    + NETWORK.format(units="UNITS"),
    "numpy": "import numpy as np\n" + HEAD + CONFIG
    + NETWORK.format(units="json.loads(np.fromfile(CONFIG, dtype='u1').tobytes())['units']"),
    "pandas": "import pandas as pd\n" + HEAD + CONFIG
    + NETWORK.format(units="int(pd.read_json(CONFIG, typ='series')['units'])"),
    "the system": HEAD + CONFIG
    + NETWORK.format(units="json.loads(os.read(os.open(CONFIG, os.O_RDONLY), 99))['units']"),
    "what it kept": HEAD + CONFIG + "KEPT = []\n"
    + NETWORK.format(units="(KEPT or KEPT.append(json.loads(CONFIG.read_text())['units']) or KEPT)"
    "[0]"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _closed():
    yield
    enter([])


def write(folder, units):
    (folder / "config.json").write_text(json.dumps({"units": units}))


def begin(file, run, *overrides):
    fedsim.start(fedsim.load_scenario(file, list(overrides)), out=run)


def made(tmp_path, model, **settings):
    file = project(tmp_path / "p", model=model, **settings)
    write(tmp_path / "p", 4)
    return file


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_a_model_reads_is_written_down_and_an_edit_ends_a_resume(tmp_path, reader):
    file = made(tmp_path, READERS[reader], rounds=3)
    run = tmp_path / "run"
    begin(file, run)
    read = read_json(run / "code.json")["read"]
    assert list(read) == ["config.json"]
    write(tmp_path / "p", 5)
    (run / "summary.json").unlink()
    with pytest.raises(ScenarioError, match=r"config\.json has changed since the run began"):
        fedsim.resume(run)
    (tmp_path / "p" / "config.json").unlink()
    with pytest.raises(ScenarioError, match=r"config\.json is gone since the run began"):
        fedsim.resume(run)
    write(tmp_path / "p", 4)
    fedsim.resume(run)


@pytest.mark.parametrize("reader", READERS)
def test_the_next_run_of_a_session_has_the_file_as_it_is_by_then(tmp_path, reader):
    file = made(tmp_path, READERS[reader])
    sizes = []
    for units in (4, 6):
        write(tmp_path / "p", units)
        sizes.append(build(fedsim.load_scenario(file)).layout.dim)
    assert sizes == [30 * units + units + units * 2 + 2 for units in (4, 6)]


def test_a_study_runs_anew_once_a_file_was_edited_and_finds_the_old_runs_when_it_is_back(tmp_path):
    file, study = made(tmp_path, READERS["a function"]), tmp_path / "study"

    def ran():
        lines = said_of_code([fedsim.load_scenario(file)], study)
        (cell,) = cells_of(of_scenarios([str(file)], [], []), (1,), study)
        if not cell.finished:
            assert not cell.folder.exists()
            fedsim.start(cell.scenario, out=cell.folder)
        return lines, cell.folder

    study.mkdir()
    lines, first = ran()
    assert lines == []
    assert ran() == ([], first)
    write(tmp_path / "p", 5)
    lines, second = ran()
    (line,) = lines
    assert line.startswith("config.json has changed since this study was run")
    assert second != first
    assert ran() == ([], second)
    write(tmp_path / "p", 4)
    lines, third = ran()
    assert (len(lines), third) == (1, first)


def test_runs_of_one_scenario_with_other_files_are_not_one(tmp_path):
    file, runs = made(tmp_path, READERS["a function"]), []
    for units in (4, 5):
        write(tmp_path / "p", units)
        runs.append(tmp_path / str(units))
        begin(file, runs[-1])
    assert len(of_runs([str(run) for run in runs])) == 2


@pytest.mark.parametrize(
    "how", ["os.environ['UNITS']", "os.getenv('UNITS', 4)", "os.environ.get('UNITS', 4)"]
)
def test_an_environment_variable_counts_too(tmp_path, monkeypatch, how):
    file = made(tmp_path, HEAD + NETWORK.format(units=f"int({how})"))
    monkeypatch.setenv("UNITS", "4")
    run = tmp_path / "run"
    begin(file, run)
    read = read_json(run / "code.json")["read"]
    assert list(read) == ["$UNITS"]
    (run / "summary.json").unlink()
    monkeypatch.setenv("UNITS", "5")
    with pytest.raises(ScenarioError, match=r"\$UNITS has changed since the run began"):
        fedsim.resume(run)
    monkeypatch.setenv("UNITS", "4")
    fedsim.resume(run)


def test_a_variable_that_is_not_set_is_another_once_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("UNITS", raising=False)
    file = made(tmp_path, HEAD + NETWORK.format(units="4 if 'UNITS' not in os.environ else 5"))
    run = tmp_path / "run"
    begin(file, run)
    (run / "summary.json").unlink()
    monkeypatch.setenv("UNITS", "4")
    with pytest.raises(ScenarioError, match=r"\$UNITS has changed"):
        fedsim.resume(run)


def test_strategies_procedures_and_weights_are_watched_as_models_are(tmp_path):
    place = "(Path(__file__).parent / '{}')"
    strategy = (
        "from pathlib import Path\nfrom strategies.fedavg import FedAvg\n\n"
        "class Mine(FedAvg):\n    def __init__(self, **settings):\n"
        f"        {place.format('server.txt')}.read_text()\n        super().__init__(**settings)\n"
    )
    procedure = (
        "from pathlib import Path\nfrom clients.local_sgd import LocalSGD\n\n"
        "class Mine(LocalSGD):\n    def begin(self, *given, **named):\n"
        f"        {place.format('client.txt')}.read_text()\n"
        "        return super().begin(*given, **named)\n"
    )
    model = HEAD + NETWORK.format(units="4").replace(
        "    return ", f"    torch.load({place.format('teacher.pt')})\n    return "
    )
    import torch

    file = project(tmp_path / "p", model=model, mystrategy=strategy, myclient=procedure)
    torch.save({"w": torch.zeros(2)}, tmp_path / "p" / "teacher.pt")
    for name in ("server.txt", "client.txt"):
        (tmp_path / "p" / name).write_text("1")
    sets = ["strategy={name='mystrategy:Mine'}", "client.name=myclient:Mine"]
    begin(file, tmp_path / "run", *sets)
    read = read_json(tmp_path / "run" / "code.json")["read"]
    assert set(read) == {"server.txt", "client.txt", "teacher.pt"}


def test_a_project_that_has_moved_has_the_same_files(tmp_path):
    file = made(tmp_path, READERS["a function"])
    begin(file, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "p").rename(tmp_path / "q")
    fedsim.resume(tmp_path / "run", overrides=[f"modules={tmp_path / 'q'}"])


ARGUMENT = HEAD + NETWORK.format(units="json.loads(Path(words).read_text())['units']").replace(
    "num_classes):", "num_classes, words: str):"
)


@pytest.mark.parametrize("inside", ["p/old.json", "old.json"])
def test_a_file_that_is_an_argument_may_move_and_counts_where_it_lies_then(tmp_path, inside):
    file = made(tmp_path, ARGUMENT)
    old, new = tmp_path / inside, tmp_path / "new.json"
    (tmp_path / "p" / "config.json").rename(old)
    run = tmp_path / "run"
    begin(file, run, f"task={{model='model:net', words='{old}'}}")
    old.rename(new)
    for how in ([f"task.words={new}"], []):
        (run / "summary.json").unlink()
        fedsim.resume(run, overrides=how)
    (run / "summary.json").unlink()
    new.write_text('{"units": 5}')
    with pytest.raises(ScenarioError, match=r"old\.json has changed since the run began"):
        fedsim.resume(run)


def test_two_projects_with_modules_of_one_name_have_each_its_own_files(tmp_path):
    model = READERS["an import"]
    files = [project(tmp_path / name, model=model) for name in ("p", "q")]
    for units, name in ((4, "p"), (6, "q")):
        write(tmp_path / name, units)

    def sizes():
        return [build(fedsim.load_scenario(file)).layout.dim for file in files]

    assert sizes() == [30 * units + units + units * 2 + 2 for units in (4, 6)]
    write(tmp_path / "p", 5)
    assert sizes() == [30 * units + units + units * 2 + 2 for units in (5, 6)]
    for name, file in zip(("p", "q"), files, strict=True):
        begin(file, tmp_path / f"run-{name}")
        read = read_json(tmp_path / f"run-{name}" / "code.json")["read"]
        assert list(read) == ["config.json"]


def test_what_another_module_of_the_project_reads_is_none_of_a_run_s(tmp_path):
    other = "from pathlib import Path\nTEXT = Path(__file__).with_name('other.txt').read_text()\n"
    file = made(tmp_path, READERS["an import"], other=other + NETWORK.format(units="4").replace(
        "def net", "from torch import nn\n\n\ndef net"))  # fmt: skip
    (tmp_path / "p" / "other.txt").write_text("x")
    build(fedsim.load_scenario(file, ["task.model=other:net"]))
    begin(file, tmp_path / "run")
    assert list(read_json(tmp_path / "run" / "code.json")["read"]) == ["config.json"]


def test_what_a_loader_reads_is_compared_by_what_it_gives(tmp_path):
    loader = (
        "import os\nfrom pathlib import Path\nfrom fedsim.data import DataSet\n\n"
        "def load():\n    n = int(Path(__file__).with_name('size.txt').read_text())\n"
        "    return DataSet([[float(i % 7), 1.0] for i in range(n)], [i % 2 for i in range(n)])\n"
    )
    file = project(tmp_path / "p", data="loader:load", loader=loader)
    (tmp_path / "p" / "size.txt").write_text("40")
    run = tmp_path / "run"
    begin(file, run)
    assert "read" not in read_json(run / "code.json")
    (run / "summary.json").unlink()
    (tmp_path / "p" / "size.txt").write_text("40\n")
    fedsim.resume(run)
    (run / "summary.json").unlink()
    (tmp_path / "p" / "size.txt").write_text("42")
    with pytest.raises(fedsim.FedsimError, match="data"):
        fedsim.resume(run)


def test_what_code_writes_itself_and_what_python_and_libraries_bring_along_does_not_count(tmp_path):
    model = (
        HEAD
        + "import logging.config, email.mime.text, xml.dom.minidom\n"
        + (
            "LOG = Path(__file__).with_name('log.txt')\n"
            + NETWORK.format(units="len(LOG.write_text('1234') * 'x')").replace(
                "    return ", "    LOG.read_text(); dict(os.environ)\n    return "
            )
        )
    )
    file = project(tmp_path / "p", model=model)
    begin(file, tmp_path / "run")
    assert "read" not in read_json(tmp_path / "run" / "code.json")


def test_nothing_is_watched_outside_of_a_watch_and_of_a_projects_code(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("1")
    folder = str(tmp_path / "code")
    os.mkdir(folder)
    source = compile(f"open({str(path)!r}).close()", os.path.join(folder, "a.py"), "exec")
    with watching([folder]) as reads:
        exec(source, {"__name__": "a"})
    assert list(reads.found) == [str(path)]
    exec(source, {"__name__": "a"})
    path.write_text("2")
    assert by_now(reads.found, [folder]) != reads.found
    with watching([folder]) as nothing:
        read_json(path)
    assert nothing.found == {}


def test_a_process_that_has_watched_ends_quietly(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom fedsim.basics import reads\nwith reads.watching(['.']):\n    pass\n"
        "class Late:\n    def __del__(self, open=open, environ=os.environ):\n"
        "        open(__file__ if '__file__' in globals() else '/dev/null').close()\n"
        "        environ.get('UNITS')\n"
        "late = Late()\nreads.late = Late()\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
