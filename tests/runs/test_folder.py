"""The run folder: whole or not at all, grown by whole lines, without anybody's name."""

import getpass
import json
import logging
import math
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.json_files import JsonLines, read_json, write_json_atomic
from fedsim.runs import folder as run_folder
from fedsim.runs.folder import folder_of, open_existing
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load("quickstart", ["rounds=3"])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Making and opening.


def test_new_folder_holds_the_resolved_scenario_and_versions(
    tmp_path: Path, scenario: Scenario
) -> None:
    folder = run_folder.create(tmp_path / "a" / "run", scenario)
    assert names(folder.path) == ["scenario.json", "versions.json"]
    assert folder.scenario().resolved() == scenario.resolved()
    assert folder.scenario().sha256 == scenario.sha256
    assert names(tmp_path / "a") == ["run"]


def test_folder_is_named_after_scenario_time_and_chance(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = run_folder.create(None, scenario)
    second = run_folder.create(None, scenario)
    for folder in (first, second):
        assert re.fullmatch(r"runs/quickstart-\d{8}T\d{6}Z-[0-9a-f]{4}", str(folder.path))
    assert first != second


def test_versions_name_packages_and_kernels_and_no_person_or_machine(
    tmp_path: Path, scenario: Scenario
) -> None:
    folder = run_folder.create(tmp_path / "run", scenario)
    versions = read_json(folder.file("versions.json"))
    assert {"python", "fedsim", "flwr", "torch", "ray", "numpy", "machine"} <= set(versions)
    assert {"processor", "instructions", "aten", "mkl", "onednn", "openblas"} <= set(versions)
    assert versions["numpy"] == np.__version__
    text = folder.file("versions.json").read_text() + folder.file("scenario.json").read_text()
    assert socket.gethostname() not in text
    assert str(tmp_path) not in text
    words = re.findall(r"\w+", text)
    assert getpass.getuser() not in words


def test_empty_folder_is_taken(tmp_path: Path, scenario: Scenario) -> None:
    (tmp_path / "run").mkdir()
    assert run_folder.create(tmp_path / "run", scenario).scenario().rounds == 3


def test_folder_of_another_run_is_refused_with_the_command_that_resumes_it(
    tmp_path: Path, scenario: Scenario
) -> None:
    run_folder.create(tmp_path / "run", scenario)
    before = (tmp_path / "run" / "scenario.json").read_bytes()
    with pytest.raises(ScenarioError, match=r"holds a run already; `fedsim resume .*run`"):
        run_folder.create(tmp_path / "run", scenario)
    assert (tmp_path / "run" / "scenario.json").read_bytes() == before
    assert names(tmp_path) == ["run"]


def test_folder_with_something_else_is_refused(tmp_path: Path, scenario: Scenario) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ScenarioError, match="is not empty"):
        run_folder.create(tmp_path, scenario)
    assert names(tmp_path) == ["thesis.txt"]


def test_file_is_refused_as_a_run_folder(tmp_path: Path, scenario: Scenario) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(ScenarioError, match="is a file"):
        run_folder.create(tmp_path / "run", scenario)


def test_folder_that_cannot_be_made_is_refused_with_the_reason(
    tmp_path: Path, scenario: Scenario
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScenarioError, match="cannot make the run folder: Not a directory"):
        run_folder.create(tmp_path / "file" / "run", scenario)


def test_nothing_is_left_when_making_the_folder_fails(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, Any]:
        raise MemoryError

    monkeypatch.setattr(run_folder, "versions", fail)
    with pytest.raises(MemoryError):
        run_folder.create(tmp_path / "run", scenario)
    assert names(tmp_path) == []


def test_existing_run_is_opened(tmp_path: Path, scenario: Scenario) -> None:
    made = run_folder.create(tmp_path / "run", scenario)
    assert open_existing(tmp_path / "run") == made


def test_missing_run_is_refused_with_the_nearest_name(tmp_path: Path, scenario: Scenario) -> None:
    run_folder.create(tmp_path / "first", scenario)
    with pytest.raises(ScenarioError, match=r"no such run folder; did you mean '.*/first'\?"):
        open_existing(tmp_path / "frist")


def test_folder_without_a_scenario_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(
        ScenarioError, match=r"is not the folder of a run: it has no scenario\.json"
    ):
        open_existing(tmp_path)


def test_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ScenarioError, match="is a file"):
        open_existing(tmp_path / "x")


def test_damaged_scenario_is_named(tmp_path: Path) -> None:
    (tmp_path / "scenario.json").write_text('{"seed": 1')
    with pytest.raises(RunError, match=r"scenario\.json: is not JSON"):
        open_existing(tmp_path).scenario()


# The log.


def test_log_holds_what_happened_and_the_traceback_of_what_ended_it(
    tmp_path: Path, scenario: Scenario
) -> None:
    folder = run_folder.create(tmp_path / "run", scenario)
    logger = logging.getLogger("fedsim")
    handlers, level = list(logger.handlers), logger.level

    @folder.recording()
    def work() -> float:
        logging.getLogger("fedsim.engine").info("chunk %d done", 3)
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        work()
    text = folder.file("log.txt").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO chunk 3 done$", text, re.M)
    assert "ZeroDivisionError: division by zero" in text
    assert "return 1 / 0" in text
    assert folder_of(caught.value) == folder.path
    assert (list(logger.handlers), logger.level) == (handlers, level)


def test_log_of_a_resumed_run_goes_on(tmp_path: Path, scenario: Scenario) -> None:
    folder = run_folder.create(tmp_path / "run", scenario)
    for word in ("first", "second"):
        with folder.recording():
            logging.getLogger("fedsim").info(word)
    lines = folder.file("log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]


def test_error_from_outside_a_run_has_no_folder() -> None:
    assert folder_of(ValueError("x")) is None


# Lines of JSON.

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text().filter(lambda text: text not in ("nan", "inf", "-inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(st.text(), json_values, max_size=4)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    folder = tmp_path_factory.mktemp("lines")
    numbers = iter(range(10**6))
    return lambda: folder / f"{next(numbers)}.jsonl"


@given(st.lists(records, max_size=5))
@settings(deadline=None)
def test_records_are_read_back_exactly(scratch: Any, written: list[dict[str, Any]]) -> None:
    path = scratch()
    with JsonLines(path) as lines:
        for record in written:
            lines.append(record)
    assert JsonLines.read(path) == written
    for line in path.read_bytes().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@given(st.lists(records, min_size=1, max_size=5), st.data())
@settings(deadline=None)
def test_file_cut_anywhere_keeps_its_whole_records(
    scratch: Any, written: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = scratch()
    ends = []
    with JsonLines(path) as lines:
        for record in written:
            lines.append(record)
            ends.append(lines.offset)
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    whole = [record for record, end in zip(written, ends, strict=True) if end <= cut]
    assert JsonLines.read(path) == whole
    with JsonLines(path) as lines:
        lines.truncate()
        lines.append({"next": 1})
    assert JsonLines.read(path) == [*whole, {"next": 1}]


@given(st.lists(records, min_size=1, max_size=5), st.data())
@settings(deadline=None)
def test_truncating_at_a_stored_offset_forgets_what_came_after(
    scratch: Any, written: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = scratch()
    keep = data.draw(st.integers(0, len(written)))
    stored = 0
    with JsonLines(path) as lines:
        for number, record in enumerate(written, start=1):
            lines.append(record)
            stored = lines.offset if number == keep else stored
    with path.open("ab") as file:
        file.write(b'{"torn')
    with JsonLines(path) as lines:
        lines.truncate(stored)
        assert lines.offset == stored
    assert JsonLines.read(path) == written[:keep]


def test_numbers_that_json_lacks_come_back_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as lines:
        lines.append({"a": math.nan, "b": [math.inf, -math.inf], "c": np.float32("nan")})
    assert path.read_text() == '{"a": "nan", "b": ["inf", "-inf"], "c": "nan"}\n'
    (record,) = JsonLines.read(path)
    assert math.isnan(record["a"])
    assert record["b"] == [math.inf, -math.inf]
    assert math.isnan(record["c"])


def test_numpy_values_are_written_as_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as lines:
        lines.append({"i": np.int64(3), "f": np.float64(0.1), "a": np.arange(2), "b": np.bool_(1)})
    assert path.read_text() == '{"i": 3, "f": 0.1, "a": [0, 1], "b": true}\n'


def test_value_that_json_cannot_hold_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as lines:
        with pytest.raises(TypeError, match="object cannot be written as JSON"):
            lines.append({"ok": 1, "bad": object()})
        assert lines.offset == 0


def test_two_handles_see_the_same_offset(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as first, JsonLines(path) as second:
        first.append({"a": 1})
        second.append({"b": 2})
        assert first.offset == second.offset == path.stat().st_size
    assert JsonLines.read(path) == [{"a": 1}, {"b": 2}]


def test_file_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.append({"a": 1})
        with pytest.raises(
            RunError, match=r"metrics\.jsonl has 9 bytes where the checkpoint count"
        ):
            lines.truncate(100)
        assert lines.offset == 9


def test_offset_inside_a_record_is_refused(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.append({"a": 1})
        with pytest.raises(RunError, match="no record begins at byte 4"):
            lines.truncate(4)
        assert lines.offset == 9


def test_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2 is not JSON"):
        JsonLines.read(path)


# Atomic files.


def test_json_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"rounds": 1})
    write_json_atomic(path, {"rounds": 2, "loss": math.nan})
    assert names(tmp_path) == ["summary.json"]
    read = read_json(path)
    assert read["rounds"] == 2
    assert math.isnan(read["loss"])


def test_old_json_file_stands_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"rounds": 1})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(path, {"rounds": 2})
    assert names(tmp_path) == ["summary.json"]
    assert json.loads(path.read_text()) == {"rounds": 1}


def test_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"summary\.json: cannot be read: No such file"):
        read_json(tmp_path / "summary.json")
