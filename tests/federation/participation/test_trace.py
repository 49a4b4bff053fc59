"""Recorded participation: files of rows and of spells, and what may be wrong in them."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedsim.basics.errors import CheckpointError, ScenarioError
from fedsim.basics.json_files import JsonLines, read_json
from fedsim.federation.participation.kinds import Trace
from fedsim.runs.manifest import manifest_of
from fedsim.runs.start import resume, start
from fedsim.runs.world import build
from fedsim.scenario.load import load

CLIENTS = 6


def write(path: Path, columns: dict[str, list]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
        return str(path)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
    return str(path)


def matrix(rule, rounds, clients=CLIENTS):
    there = np.zeros((rounds, clients), dtype=bool)
    for t in range(rounds):
        there[t, rule.participants(t + 1, num_clients=clients, seed=4)] = True
    return there


def truth(rounds=9, clients=CLIENTS):
    there = np.random.default_rng(2).random((rounds, clients)) < 0.5
    there[:, 3] = False  # one is never there
    there[-1, 0] = True
    return there


def as_rows(there):
    rounds, clients = np.nonzero(there)
    return {"round": (rounds + 1).tolist(), "client": clients.tolist()}


def as_table(there):
    grid = np.indices(there.shape)
    return {
        "client": grid[1].ravel().tolist(),
        "available": there.ravel().astype(int).tolist(),
        "round": (grid[0].ravel() + 1).tolist(),
    }


def as_spells(there):
    spells = {"client": [], "start": [], "end": []}
    for client in range(there.shape[1]):
        padded = np.concatenate([[0], there[:, client].astype(int), [0]])
        for begin, after in zip(
            *(np.flatnonzero(np.diff(padded) == d) for d in (1, -1)), strict=True
        ):
            for name, value in (("client", client), ("start", begin + 1), ("end", after)):
                spells[name].append(int(value))
    return spells


FORMS = {"rows": as_rows, "availability": as_table, "spells": as_spells}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_who_is_in_the_file_takes_part(tmp_path, form, suffix):
    there = truth()
    rule = Trace(path=write(tmp_path / f"t{suffix}", FORMS[form](there)))
    np.testing.assert_array_equal(matrix(rule, 9), there)
    np.testing.assert_allclose(rule.rates(CLIENTS), there.mean(axis=0))
    assert rule.expected_cohort(CLIENTS) == round(there.sum(axis=1).mean())
    assert rule.state() == {}


def test_all_forms_of_one_trace_have_one_hash_and_another_trace_another(tmp_path):
    there, hashes = truth(), set()
    for form, make in FORMS.items():
        for suffix in (".csv", ".parquet"):
            path = write(tmp_path / f"{form}{suffix}", make(there))
            hashes.add(Trace(path=path).manifest()["sha256"])
    assert len(hashes) == 1
    there[4, 1] ^= True
    other = Trace(path=write(tmp_path / "other.csv", as_rows(there))).manifest()
    assert other["sha256"] not in hashes
    assert other["rounds"] == 9


@settings(max_examples=40)
@given(there=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12))
def test_any_trace_comes_back_as_it_was(tmp_path_factory, there):
    there = np.array(there)
    if not there.any():
        return
    folder = tmp_path_factory.mktemp("trace")
    for number, form in enumerate((as_table, as_spells)):
        rule = Trace(path=write(folder / f"{number}.csv", form(there)))
        rounds = (
            len(there) if form is as_table else 1 + int(np.flatnonzero(there.any(axis=1)).max())
        )
        np.testing.assert_array_equal(matrix(rule, rounds, 4), there[:rounds])


def test_overlapping_spells_and_rows_that_come_twice_count_once(tmp_path):
    spells = {"client": [1, 1, 1, 0], "start": [1, 2, 5, 3], "end": [3, 6, 5, 3]}
    rule = Trace(path=write(tmp_path / "t.csv", spells))
    assert matrix(rule, 6, 2).T.astype(int).tolist() == [[0, 0, 1, 0, 0, 0], [1] * 6]
    assert rule.rates(2).tolist() == [1 / 6, 1.0]
    twice = {"round": [1, 1, 2], "client": [0, 0, 0]}
    assert Trace(path=write(tmp_path / "u.csv", twice)).rates(1).tolist() == [1.0]


def test_after_the_last_round_the_trace_repeats_or_nobody_takes_part(tmp_path):
    there = truth()
    there[-1] = False  # the file's last rounds may be empty ones
    path = write(tmp_path / "t.csv", as_table(there))
    np.testing.assert_array_equal(matrix(Trace(path=path), 18), np.vstack([there, there]))
    over = matrix(Trace(path=path, beyond="nobody"), 12)
    np.testing.assert_array_equal(over[:9], there)
    assert not over[9:].any()


def test_a_file_that_was_changed_is_read_anew(tmp_path):
    path = write(tmp_path / "t.csv", {"round": [1], "client": [0]})
    assert Trace(path=path).participants(1, num_clients=2, seed=0).tolist() == [0]
    write(tmp_path / "t.csv", {"round": [1, 1], "client": [0, 1]})
    assert Trace(path=path).participants(1, num_clients=2, seed=0).tolist() == [0, 1]


BROKEN = {
    "round,client\n1,0\n2,x\n": "row 1, column 'client' = 'x': must be an integer >= 0",
    "round,client\n1,0\n0,1\n": "row 1, column 'round' = 0: must be an integer >= 1",
    "round,client\n1,-1\n": "row 0, column 'client' = '-1': must be an integer >= 0",
    "round,client\n1,1.5\n": "row 0, column 'client' = '1.5': must be an integer",
    "round,client\n1,\n": "row 0, column 'client' = '': must be an integer",
    "round,client\n1,9999999999\n": "row 0, column 'client' = 9999999999: must be .* <= 2147483647",
    "round,client,available\n1,0,1\n1,1,yes\n": "row 1, column 'available' = 'yes': must be 0 or 1",
    "round,client,available\n1,0,0\n": "no client takes part in any round",
    "round,client\n": "no client takes part in any round",
    "round,cleint\n1,0\n": "'cleint' is not a column of a trace; did you mean 'client'?",
    "round,round,client\n1,1,0\n": "has two columns 'round'",
    "client,start\n0,1\n": "has no column 'end'",
    "client,start,end\n0,4,3\n": "row 0: end = 3 comes before start = 4",
    "round,client\n1,0\n2\n": "is no csv file: .*Expected 2 columns, got 1",
    "": "is no csv file: Empty CSV file",
}


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_wrong_in_a_file_is_named_with_its_column_and_row(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=BROKEN[text]) as refusal:
        Trace(path=str(path))
    assert str(refusal.value).startswith(f"[participation] path = '{path}'")


def test_what_is_wrong_with_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    cases = [
        ({"round": [1, 2], "client": [0.5, 1.0]}, "column 'client': holds double, must be an int"),
        ({"round": [1, None], "client": [0, 1]}, "row 1, column 'round' = None: must be an int"),
        ({"round": [1], "client": [0], "available": [2]}, "column 'available' = 2: must be 0 or 1"),
    ]
    for columns, message in cases:
        with pytest.raises(ScenarioError, match=re.escape(message)):
            Trace(path=write(path, columns))
    whole = write(path, {"round": list(range(1, 99)), "client": [0] * 98})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ScenarioError, match="is no parquet file"):
        Trace(path=whole)
    flags = {"round": [1, 1], "client": [0, 1], "available": [True, False]}
    rule = Trace(path=write(path, flags))
    assert rule.participants(1, num_clients=2, seed=0).tolist() == [0]


def test_files_that_are_missing_or_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ScenarioError, match=r"none.csv': cannot be read: No such file"):
        Trace(path=str(tmp_path / "none.csv"))
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ScenarioError, match=r"t.json': must be a .csv or a .parquet file"):
        Trace(path=str(tmp_path / "t.json"))
    path = write(tmp_path / "t.csv", {"round": [1], "client": [7]})
    with pytest.raises(ScenarioError, match="names client 7, and there are 6 clients"):
        Trace(path=path).expected_cohort(6)
    with pytest.raises(ScenarioError, match="beyond = 'stop': must be repeat or nobody"):
        Trace(path=path, beyond="stop")


# --- in a scenario --------------------------------------------------------------------------------

SCENARIO = """
rounds = 4

[data]
name = "synthetic"
dimension = 4
max_samples = 20

[partition]
kind = "natural"
clients = 6

[participation]
kind = "trace"
path = "who.csv"

[engine]
kind = "inline"
"""


def test_a_scenario_s_trace_lies_beside_it_and_is_in_the_manifest(tmp_path):
    there = truth(rounds=3)
    write(tmp_path / "who.csv", as_rows(there))
    (tmp_path / "traced.toml").write_text(SCENARIO)
    scenario = load(tmp_path / "traced.toml")
    result = start(scenario, out=tmp_path / "run")
    records = JsonLines.read(result.folder / "participation.jsonl")
    assert [r["selected"] for r in records] == [
        np.flatnonzero(there[t % 3]).tolist() for t in range(4)
    ]
    manifest = read_json(result.folder / "manifest.json")
    assert manifest["participation"] == Trace(path=str(tmp_path / "who.csv")).manifest()
    moved = shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-moved"))
    assert load(moved / "traced.toml").sha256 == scenario.sha256  # where it lies does not matter
    there[1, 2] ^= True
    write(tmp_path / "who.csv", as_rows(there))
    with pytest.raises(CheckpointError, match=r"the run began with participation \w+, the same"):
        resume(result.folder)


def test_a_scenario_without_a_trace_has_none_in_its_manifest(tmp_path):
    text = SCENARIO.replace('kind = "trace"\npath = "who.csv"', 'kind = "full"')
    (tmp_path / "full.toml").write_text(text)
    world = build(load(tmp_path / "full.toml"))
    assert "participation" not in manifest_of(world)


def test_a_trace_that_is_wrong_is_refused_with_the_scenario_s_name(tmp_path):
    write(tmp_path / "who.csv", {"round": [1], "client": [8]})
    (tmp_path / "traced.toml").write_text(SCENARIO)
    with pytest.raises(ScenarioError, match=r"traced.toml: \[participation\] path = .* client 8"):
        load(tmp_path / "traced.toml")
    with pytest.raises(ScenarioError, match=r"\[participation\] 'path' is missing"):
        load(tmp_path / "traced.toml", ["participation={kind='trace'}"])
