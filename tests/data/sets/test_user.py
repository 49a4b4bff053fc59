"""A loader of the user's own, by import path."""

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.scenario import discovery
from fedsim.scenario.load import load as load_scenario
from tests.basics.processes import QUICKLY
from tests.data.tables import IID, load

ROOT = Path(__file__).resolve().parents[3]
LOADERS = ROOT / "tests" / "data" / "loaders.py"


def user(cache_dir, name, partition=IID, **arguments):
    return load(cache_dir, partition, name=f"tests.data.loaders:{name}", **arguments)


def test_what_a_loader_returns_is_what_clients_hold(tmp_path):
    data = user(tmp_path, "everything", {"kind": "iid", "clients": 2})
    pool = data.clients([0, 1])
    assert pool.features.dtype == np.float32
    assert pool.targets.dtype == np.int64
    np.testing.assert_array_equal(pool.features, np.arange(24.0).reshape(6, 2, 2))
    np.testing.assert_array_equal(pool.targets, [0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(data.test.features, np.arange(12.0).reshape(3, 2, 2) + 100)
    assert data.test.targets.tolist() == [1, 1, 0]
    assert data.spec == ((2, 2), 3, (), 0)
    assert data.manifest["held_out"]["drawn"] == "given by the loader"


def test_its_groups_are_natural_owners_in_sorted_order(tmp_path):
    data = user(tmp_path, "everything", {"kind": "natural"})
    assert [rows.tolist() for rows in data.clients([0, 1, 2]).rows] == [[1, 4], [0, 2, 5], [3]]
    assert data.manifest["owners"]["of_first_clients"] == ["a", "b", "c"]


def test_whole_numbers_are_classes_and_fractional_ones_are_amounts(tmp_path):
    numbers = np.column_stack([np.arange(20.0), np.arange(20.0) / 8])
    np.savetxt(tmp_path / "numbers.txt", numbers)
    data = user(tmp_path, "from_file", path=str(tmp_path / "numbers.txt"))
    assert data.spec == ((1,), 0, (), 0)
    assert data.clients([0]).targets.dtype == np.float32
    np.testing.assert_array_equal(data.clients([0]).targets, np.arange(20) / 8)
    assert len(data.test.targets) == 4


def test_tokens_stay_whole_numbers(tmp_path):
    data = user(tmp_path, "tokens")
    assert data.spec == ((2,), 7, (), 7)
    assert data.clients([0]).features.dtype == np.int64


def test_a_loader_without_a_test_set_has_its_fraction_held_out_by_class(tmp_path):
    data = user(tmp_path, "blobs", samples=50)
    assert np.bincount(data.test.targets).tolist() == [5, 5]
    assert data.manifest["held_out"]["drawn"] == "stratified by class"


def test_its_arguments_are_scenario_keys():
    keys = discovery.schema("datasets", "tests.data.loaders:blobs")
    assert {name: key.default for name, key in keys.items()} == {
        "samples": 60, "shift": 2.0, "calls": "",
    }  # fmt: skip
    assert keys["shift"].description == "Between the two."
    (entry,) = discovery.describe("datasets", "tests.data.loaders:blobs")
    assert entry.description == "Two blobs"


SCENARIO = """
rounds = 1
[data]
name = "tests.data.loaders:{name}"
{keys}
[partition]
kind = "iid"
clients = 4
"""


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "blobs",
            "sample = 3",
            r"'sample' is not a key of tests.data.loaders:blobs; did you mean 'samp",
        ),
        ("blobs", "samples = 'x'", r'\[data\] samples = "x": must be an integer'),
        ("from_file", "", r"\[data\] 'path' is missing: give a str"),
        ("blob", "", r"\[data\] name = 'tests.data.loaders:blob': .* did you mean 'blobs'"),
        ("not_a_function", "", r"names a int, expected a function that returns a fedsim.data.Dat"),
    ],
)
def test_a_scenario_that_misuses_a_loader_is_refused(tmp_path, name, keys, message):
    file = tmp_path / "mine.toml"
    file.write_text(SCENARIO.format(name=name, keys=keys))
    with pytest.raises(ScenarioError, match=message):
        load_scenario(file)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a tuple", r"returned a tuple, expected a fedsim.data.DataSet"),
        ("a hole", r"features\[2\] is nan, expected a finite number"),
        ("too large", r"features\[0\] is 1e\+300, expected a finite number in float32"),
        ("text", r"features holds text, expected numbers"),
        ("flat", r"features has shape \(4,\), expected \[n, ...\] .* reshape\(-1, 1\)"),
        ("ragged", r"features cannot be made an array"),
        ("masked", r"features\[1\] is missing"),
        ("lengths", r"targets has 3 rows for 4 samples"),
        ("one sample", r"features has 1 samples, expected at least 2"),
        ("one class", r"targets holds class 0 alone, expected at least two"),
        ("gap", r"targets has no sample of class 1 but one of class 2"),
        ("from one", r"targets has no sample of class 0 but one of class 1"),
        ("negative", r"targets holds class -1, expected classes from 0"),
        ("above", r"targets\[2\] is 2, expected classes from 0 to 1"),
        ("class shape", r"targets has shape \(4, 1\), expected one class per sample"),
        ("half a test", r"test_targets is None, expected an array"),
        ("test shape", r"test_features has samples of shape \(3,\), those to train on \(2,\)"),
        ("test class", r"targets has no sample of class 2 but one of class 3"),
        ("empty test", r"test_features has no sample"),
        ("fraction", r"test_fraction is 1.0, expected a float in \(0, 1\)"),
        ("groups", r"groups has 3 rows for 4 samples"),
        ("no owner", r"groups\[1\] is missing"),
        ("token", r"features\[1\] is 7, expected tokens from 0 to 6"),
        ("float token", r"features holds float64, expected tokens as whole numbers"),
        ("hole in targets", r"targets\[2\] is inf, expected a finite number"),
        ("no features", r"features is None, expected an array"),
    ],
)
def test_what_no_federation_can_use_is_refused_by_field_and_row(tmp_path, case, message):
    with pytest.raises(ScenarioError, match=rf"name = 'tests.data.loaders:returning': {message}"):
        user(tmp_path, "returning", case=case)


def test_an_error_of_the_loader_is_told_with_its_line(tmp_path):
    line = LOADERS.read_text().splitlines().index('    return {}["missing"]') + 1
    with pytest.raises(ScenarioError, match=rf"KeyError: 'missing' \(loaders.py, line {line}\)"):
        user(tmp_path, "failing")


def test_a_changed_loader_or_file_never_gives_stale_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = LOADERS.read_text()
    (tmp_path / "changing_loader.py").write_text(source)
    module = importlib.import_module("changing_loader")
    first = load(tmp_path / "cache", name="changing_loader:blobs")
    # the same size and time of change, so that only the content tells
    (tmp_path / "changing_loader.py").write_text(source.replace("default_rng(5)", "default_rng(6)"))
    importlib.invalidate_caches()
    exec((tmp_path / "changing_loader.py").read_text(), module.__dict__)
    second = load(tmp_path / "cache", name="changing_loader:blobs")
    assert first.manifest_sha256 != second.manifest_sha256
    assert first.manifest["data"]["loader_sha256"] != second.manifest["data"]["loader_sha256"]
    assert not np.array_equal(first.test.features, second.test.features)

    numbers = tmp_path / "numbers.txt"
    np.savetxt(numbers, np.arange(40.0).reshape(20, 2) / 8)
    before = user(tmp_path, "from_file", path=str(numbers))
    np.savetxt(numbers, np.arange(40.0).reshape(20, 2) / 4)
    after = user(tmp_path, "from_file", path=str(numbers))
    np.testing.assert_array_equal(after.test.features, 2 * before.test.features)


def test_the_manifest_names_the_loader_and_no_folder(tmp_path):
    np.savetxt(tmp_path / "numbers.txt", np.arange(40.0).reshape(20, 2) / 8)
    data = user(tmp_path, "from_file", path=str(tmp_path / "numbers.txt"))
    assert data.manifest["data"]["name"] == "tests.data.loaders:from_file"
    assert str(tmp_path) not in json.dumps(data.manifest)


READ_PICKLE = """
import pickle, sys
data = pickle.load(sys.stdin.buffer)
print(data.manifest_sha256, data.clients([3]).rows[0].tolist())
"""


def _elsewhere(data, **environment):
    return subprocess.run(
        [sys.executable, "-c", QUICKLY + READ_PICKLE],
        input=pickle.dumps(data),
        capture_output=True,
        env={"PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )


def test_workers_map_what_was_loaded_once(tmp_path):
    calls = tmp_path / "calls"
    data = user(tmp_path / "cache", "blobs", calls=str(calls))
    assert calls.read_text() == "called\n"
    again = pickle.loads(pickle.dumps(data))
    done = _elsewhere(data)
    assert done.returncode == 0, done.stderr.decode()
    expected = f"{data.manifest_sha256} {data.clients([3]).rows[0].tolist()}\n"
    assert done.stdout.decode() == expected
    assert again.manifest_sha256 == data.manifest_sha256
    assert calls.read_text() == "called\n"


def test_another_machine_loads_once_more_and_finds_the_same(tmp_path):
    calls = tmp_path / "calls"
    data = user(tmp_path / "here", "blobs", calls=str(calls))
    sent = pickle.dumps(data)
    (tmp_path / "here").rename(tmp_path / "gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_CACHE", str(tmp_path / "there"))
        for _ in range(2):
            assert pickle.loads(sent).manifest_sha256 == data.manifest_sha256
    assert calls.read_text() == "called\n" * 2


def test_a_loader_that_gives_other_data_on_another_machine_is_refused(tmp_path, monkeypatch):
    sent = pickle.dumps(user(tmp_path / "here", "unseeded"))
    (tmp_path / "here").rename(tmp_path / "gone")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "there"))
    with pytest.raises(
        RunError, match=r"'tests.data.loaders:unseeded': gives other data here .* seed"
    ):
        pickle.loads(sent)


@pytest.mark.slow
def test_it_runs_in_ray_workers(tmp_path, ray_cluster, capsys):
    from fedsim.cli import app

    file, calls = tmp_path / "mine.toml", tmp_path / "calls"
    file.write_text(SCENARIO.format(name="blobs", keys=f'calls = "{calls}"'))
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        app(["run", str(file), "--out", str(out), "--set", "engine.workers=2"])
    assert ended.value.code in (0, None), capsys.readouterr()
    # once when the run is prepared; no worker loads again
    assert calls.read_text() == "called\n"
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 1
