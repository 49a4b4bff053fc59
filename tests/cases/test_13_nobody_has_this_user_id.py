"""A user id that nobody has, as in containers: no home folder, no name, no terminal."""

import io
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.home import cache_root, expanded, home
from fedsim.basics.project import enter
from fedsim.cli import app
from fedsim.cli.doctor import machine
from fedsim.runs.progress import Progress
from tests.cases.own_projects import project
from tests.tiers import slow

ROOT = Path(__file__).resolve().parents[2]
NOBODY = """
import pwd


def missing(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")


pwd.getpwuid = missing
"""


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """This process's user has no home folder and no entry among the users."""

    def missing(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", missing)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    enter([])


def fedsim_(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("named", [None, "", "~/cache"])
def test_a_run_without_a_place_for_data_is_refused_with_the_remedy(
    nobody, tmp_path, monkeypatch, named
):
    monkeypatch.delenv("FEDSIM_CACHE", raising=False)
    if named is not None:
        monkeypatch.setenv("FEDSIM_CACHE", named)
    said = fedsim_("run", project(tmp_path / "p"), "--out", "run", "--quiet")
    assert said.exit_code == 2
    assert "there is no home folder" in said.stderr
    assert said.stderr.strip().endswith("set FEDSIM_CACHE to a writable folder")
    assert not Path("run").exists()


def test_the_log_is_written_and_resume_and_partition_work(nobody, tmp_path, capfd):
    file = project(tmp_path / "p", rounds=2)
    result = fedsim.start(fedsim.load_scenario(file), out="run")
    assert "INFO plan:" in (result.folder / "log.txt").read_text()
    assert fedsim_("resume", "run", "--quiet").exit_code == 0
    assert fedsim_("partition", file).exit_code == 0
    assert "Logging error" not in capfd.readouterr().err


def test_what_stands_for_the_home_folder_stands_for_itself_there(nobody):
    assert home() is None
    assert expanded("~/x") == Path("~/x")
    with pytest.raises(ScenarioError, match=r"modules = '~/x': there is no such folder"):
        fedsim.load_scenario("quickstart", ["modules=~/x", "task={model='a:b'}"])


def test_a_home_that_is_no_absolute_path_is_none(monkeypatch):
    monkeypatch.setenv("HOME", "somewhere")
    monkeypatch.delenv("FEDSIM_CACHE", raising=False)
    with pytest.raises(ScenarioError, match="there is no home folder"):
        cache_root()


def test_doctor_looks_at_it(nobody, monkeypatch):
    monkeypatch.delenv("FEDSIM_CACHE", raising=False)
    found = machine.cache()
    assert (found.state, found.remedy) == ("failed", "set FEDSIM_CACHE to a writable folder")
    assert "there is no home folder" in found.found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["inline", "ray"])
@pytest.mark.parametrize("strategy", ["fedavg", "gossip"])
def test_a_run_of_nobodys_without_a_terminal_is_as_any_other(tmp_path, engine, strategy):
    file = project(tmp_path / "p", engine=engine, rounds=2)
    (tmp_path / "sitecustomize.py").write_text(NOBODY)
    asked = [sys.executable, "-m", "fedsim", "run", str(file), "--out", "run", "--workers", "1"]
    done = subprocess.run(
        [*asked, "--set", f"strategy.name={strategy}"],
        cwd=tmp_path, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={
            "PATH": os.defpath, "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "FEDSIM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Logging error" not in done.stderr
    assert "INFO plan:" in (tmp_path / "run" / "log.txt").read_text()


def test_a_working_folder_that_is_gone_is_said_in_a_line(tmp_path):
    code = (
        "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "
        "sys.argv[1:] = ['list', 'strategies']; from fedsim.cli import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr == "fedsim: the working folder has been removed; go to another one\n"


def in_a_shell(command, folder, **environment):
    """Run `fedsim COMMAND`, redirections included, in a process of its own."""
    return subprocess.run(
        ["sh", "-c", f"{sys.executable} -m fedsim {command}"],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FEDSIM_CACHE": str(folder / "c"),
             **environment},
    )  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", ">/dev/null 2>&- <&-"])
@pytest.mark.parametrize("engine", ["inline", slow("ray")])
def test_progress_that_nobody_takes_ends_no_run(where, engine, tmp_path):
    project(tmp_path, rounds=2)
    ended = in_a_shell(f"run scenario.toml --out run --set engine.kind={engine} {where}", tmp_path)
    assert ended.returncode == 0
    assert (tmp_path / "run" / "summary.json").is_file()
    assert ended.stderr == ""
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


QUIET = "run scenario.toml -q --out run --set engine.kind=inline"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
@pytest.mark.parametrize("asked", ["list strategies", slow("--help"), QUIET])
def test_a_result_that_standard_output_does_not_take_is_said_in_a_line(asked, tmp_path):
    project(tmp_path, rounds=2)
    ended = in_a_shell(f"{asked} >/dev/full", tmp_path)
    assert ended.returncode == 1
    line = "fedsim: standard output cannot be written: No space left on device"
    assert ended.stderr == line + ("; the result is in run" if "run" in asked else "") + "\n"


def test_a_display_is_quiet_once_it_cannot_be_written():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    for terminal in (False, True):
        progress = Progress(2, console=Console(file=Full(), force_terminal=terminal))
        progress.start(1)
        for server_round in (1, 2):
            progress.update(server_round, {}, done=1, failed=0, absent=0)
        progress.note("a line")
        progress.stop()


@pytest.mark.parametrize("inside", ["", "/x/y"])
def test_a_file_in_the_place_of_a_folder_is_named_with_the_variable(tmp_path, monkeypatch, inside):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FEDSIM_CACHE", f"{file}{inside}")
    with pytest.raises(ScenarioError, match=r"FEDSIM_CACHE = '.*': .*file is no folder but a file"):
        cache_root()
    monkeypatch.setenv("HOME", f"{file}{inside}")
    for named in ("", "~/cache"):
        monkeypatch.setenv("FEDSIM_CACHE", named)
        with pytest.raises(ScenarioError, match=r"HOME = '.*': .*file is no folder.*set FEDSIM"):
            cache_root()
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "new" / "cache"))
    assert cache_root() == tmp_path / "new" / "cache"
