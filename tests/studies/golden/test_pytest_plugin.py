"""The pytest plugin, in a process of its own as a user has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.basics.processes import QUICKLY
from tests.studies.golden.test_verdict import SCENARIO, STRATEGY

ROOT = Path(__file__).resolve().parents[3]
PYTEST = f"{QUICKLY}import runpy; runpy.run_module('pytest', run_name='__main__', alter_sys=True)"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine_plugged.py").write_text(STRATEGY)
    text = SCENARIO.format(module="mine_plugged")
    (tmp_path / "mine.toml").write_text(text)
    (tmp_path / "later.toml").write_text(f'tier = "slow"\n{text}')
    (tmp_path / "broken.toml").write_text(text.replace("min = 0.2", "min = 0.999"))
    (tmp_path / "refused.toml").write_text(text.replace("local_lr", "local_lrr"))
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    return tmp_path


def run(folder, *arguments):
    # the entry point may not be installed yet where tests run from a checkout
    given = [] if _installed() else ["-p", "fedsim.studies.golden.pytest_plugin"]
    return subprocess.run(
        [sys.executable, "-c", PYTEST, *given, "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )


def _installed():
    from importlib.metadata import entry_points

    return any(
        each.value == "fedsim.studies.golden.pytest_plugin"
        for each in entry_points(group="pytest11")
    )


def test_each_scenario_of_a_folder_is_a_test_and_no_other_file_is(folder):
    ended = run(folder, "-v", "-rs")
    said = ended.stdout
    assert ended.returncode == 1, said + ended.stderr
    assert "2 failed, 1 passed, 1 skipped" in said
    assert "broken: test/accuracy >= 0.999: measured" in said
    assert "did you mean 'local_lr'" in said
    assert "tier slow; --fedsim-tier slow runs it" in said
    assert "pyproject" not in said.split("collected", 1)[1]
    assert "Traceback" not in said


def test_data_that_are_not_there_are_refused_before_anything_is_collected(folder):
    ended = run(folder, "--fedsim-data", "nowhere")
    assert ended.returncode == 4
    assert "--fedsim-data nowhere: there is no such folder" in ended.stderr
    assert "collected" not in ended.stdout


def test_pytest_starts_without_torch_and_collects_nothing_where_told(folder):
    code = (
        "import sys, pytest; code = pytest.main(['--collect-only', '-q', *sys.argv[1:]]); "
        "print('heavy:', sorted({'torch', 'flwr', 'ray', 'pydantic'} & set(sys.modules))); "
        "sys.exit(code)"
    )
    given = [] if _installed() else ["-p", "fedsim.studies.golden.pytest_plugin"]
    for more, collected in ([], "4 tests collected"), (["-o", "fedsim_collect=false"], "no tests"):
        ended = subprocess.run(
            [sys.executable, "-c", code, *given, "-p", "no:cacheprovider", *more],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert collected in ended.stdout, ended.stdout + ended.stderr
        assert "heavy: []" in ended.stdout
