"""A module that somebody else has imported is imported anew when its file has changed since."""

import importlib
import py_compile
import sys
import time
import types

import pytest

from fedsim.basics import project


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Imports a module of a folder, as a script beside it would; the file holds a number."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "beside_a_script.py"

    def write(number, *, compiled=None):
        if compiled is not None:
            file.write_text(f"number = {compiled}\n\n")
            py_compile.compile(str(file), doraise=True)
        file.write_text(f"number = {number}\n")
        importlib.invalidate_caches()
        return importlib.import_module(file.stem)

    yield write
    project.enter([])
    sys.modules.pop(file.stem, None)


def began(monkeypatch, seconds):
    """Let this process have begun so many seconds from now."""
    then = time.time() + seconds
    monkeypatch.setattr(project, "_began", lambda: then)


def test_what_was_compiled_of_an_older_source_and_left_there_is_no_change(
    imported, tmp_path, monkeypatch
):
    module = imported(2, compiled=1)
    assert module.number == 2
    began(monkeypatch, 1)  # all that happened before
    project.enter([str(tmp_path)])
    assert sys.modules[module.__name__] is module


@pytest.mark.parametrize("compiled", [None, 1])
def test_an_edit_since_the_process_began_is_imported_anew(
    imported, tmp_path, monkeypatch, compiled
):
    began(monkeypatch, -60)
    module = imported(2, compiled=compiled)
    (tmp_path / "beside_a_script.py").write_text("number = 312\n")
    project.enter([str(tmp_path)])
    assert module.__name__ not in sys.modules
    assert importlib.import_module(module.__name__).number == 312


def test_a_module_that_names_no_folder_belongs_to_no_project(imported, tmp_path, monkeypatch):
    module = imported(2)
    stray = types.ModuleType("stray")
    stray.__file__ = "_stray.py"
    monkeypatch.setitem(sys.modules, "stray", stray)
    monkeypatch.chdir(tmp_path)
    began(monkeypatch, 1)
    project.enter([str(tmp_path)])
    assert sys.modules["stray"] is stray
    assert sys.modules[module.__name__] is module
