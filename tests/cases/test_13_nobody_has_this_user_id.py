"""A user id that nobody has, as in containers: no home folder, no name, no terminal."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.basics.home import cache_root, expanded, home
from fedsim.basics.project import enter
from fedsim.cli import app
from fedsim.cli.doctor import machine
from tests.cases.own_projects import project

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
