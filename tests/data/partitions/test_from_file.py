"""A partition that a file writes down."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedsim.basics.errors import ScenarioError
from fedsim.data.federated import Samples
from fedsim.data.partitions.from_file import file
from fedsim.data.partitions.partition import DROPPED
from fedsim.data.preparation import prepare
from fedsim.scenario.load import load

OWNERS = [2, 0, 0, 1, 2, 2]


def assign(path, labels=6, rows=None, total=None, **keys):
    samples = Samples(np.zeros(labels, dtype=np.int64), None, rows, total)
    return file(path=str(path), **keys).assign(samples, 0)


def write(folder, suffix, columns):
    path = folder / f"who.{suffix}"
    if suffix == "csv":
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    elif suffix == "parquet":
        parquet.write_table(pa.table(columns), path)
    else:
        path.write_text(json.dumps({k: list(map(int, v)) for k, v in columns.items()}))
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_every_format_says_the_same_with_and_without_sample_numbers(tmp_path, suffix):
    path = write(tmp_path, suffix, {"client": OWNERS})
    assert assign(path).owners.tolist() == OWNERS
    order = [4, 0, 3, 5, 1, 2]
    path = write(tmp_path, suffix, {"client": [OWNERS[i] for i in order], "sample": order})
    made = assign(path)
    assert made.owners.tolist() == OWNERS
    assert made.clients == 3


def test_json_may_be_a_list_of_rows(tmp_path):
    path = tmp_path / "who.json"
    path.write_text(json.dumps([{"sample": 1, "client": 0}, {"sample": 0, "client": 4}]))
    made = assign(path, labels=2)
    assert made.owners.tolist() == [4, 0]
    assert made.clients == 5  # 1, 2 and 3 exist and are empty


def test_samples_that_are_not_named_are_dropped_and_counted(tmp_path):
    made = assign(write(tmp_path, "csv", {"sample": [5, 1], "client": [0, 1]}))
    assert made.owners.tolist() == [DROPPED, 1, DROPPED, DROPPED, DROPPED, 0]
    assert made.why_dropped == "the file does not name them"


def test_more_clients_than_are_named_are_empty_and_fewer_are_refused(tmp_path):
    path = write(tmp_path, "csv", {"client": OWNERS})
    assert assign(path, clients=5).clients == 5
    with pytest.raises(ScenarioError, match="clients = 1000000000000: must be <= 10000000"):
        assign(path, clients=10**12)
    with pytest.raises(ScenarioError, match=r"names client 2; clients = 2 allows 0\.\.1"):
        assign(path, clients=2)


def test_numbers_are_those_of_the_data_set_before_the_server_holds_any_out(tmp_path):
    path = write(tmp_path, "csv", {"client": OWNERS})
    made = assign(path, labels=3, rows=np.array([0, 3, 4]), total=6)
    assert made.owners.tolist() == [2, 1, 2]
    assert made.notes["named_but_held_out"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client\n0\n1\n-1\n", r"row 2: client = -1: must be in 0\.\."),
        ("sample,client\n0,1\n6,1\n", r"row 1: sample = 6: must be in 0\.\.5"),
        ("client\n0\n0\n0\n0\n0\n0\n0\n", r"row 6: sample = 6: must be in 0\.\.5"),
        ("sample,client\n3,1\n2,0\n3,0\n", "names sample 3 in rows 0 and 2"),
        ("sample,client\n3,1.5\n", "row 0: client = '1.5': must be a whole number"),
        ("sample,client\n3,\n", "row 0: client = '': must be a whole number"),
        ("sample,client\n3,99999999999999999999\n", "must be a whole number"),
        ("sample,client\n3\n", "row 0: has 1 values for 2 columns"),
        ("sample,clients\n3,1\n", "no column 'client' among sample, clients; is it 'clients'?"),
        ("client,site\n3,1\n", "column 'site' means nothing; allowed: sample, client"),
        ("client\n", "no sample has an owner: the file does not name them"),
        ("", "has no column 'client' among none"),
        ("client\n10000000\n", r"row 0: client = 10000000: must be in 0\.\.9999999"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "who.csv"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=message) as caught:
        assign(path)
    assert str(caught.value).startswith("[partition] ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("who.json", b"[1, 2", "is not JSON"),
        ("who.json", b"3", "must be a list of rows, or a table of columns"),
        ("who.json", b'[{"client": 1}, {"sample": 2}]', "every row must be a table with the same"),
        ("who.json", b'{"client": [true]}', "row 0: client = True: must be a whole number"),
        ("who.parquet", b"PAR", "is not parquet"),
        ("who.csv", b"client\n\xff\n", "is not CSV"),
        ("who.txt", b"client\n1\n", r"must end in \.csv, \.json, \.parquet"),
    ],
)
def test_what_is_not_the_format_its_name_says_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScenarioError, match=message):
        assign(tmp_path / name, labels=1)


def test_a_missing_file_is_refused_before_data_are_read():
    with pytest.raises(ScenarioError, match=r"path = 'nowhere\.csv': cannot be read: No such file"):
        file(path="nowhere.csv")


def test_the_content_decides_and_not_where_or_when_the_file_was_written(tmp_path):
    owners = np.arange(1797) % 7

    def prepared(path):
        table = {"kind": "file", "path": str(path)}
        return prepare({"name": "digits"}, table, seed=0, cache_dir=tmp_path / "cache")

    path = write(tmp_path, "csv", {"client": owners})
    first = prepared(path)
    assert first.num_clients == 7
    held = first.clients([3]).rows[0]
    assert (held % 7 == 3).all()
    assert first.manifest["partition"]["path"] == "who.csv"  # and not where this machine has it
    assert first.manifest["partition"]["named_but_held_out"] == 1797 - 1438
    (tmp_path / "elsewhere").mkdir()
    moved = prepared(write(tmp_path / "elsewhere", "parquet", {"client": owners}))
    assert moved.manifest_sha256 == first.manifest_sha256
    changed = prepared(write(tmp_path, "csv", {"client": (owners + 1) % 7}))
    assert changed.manifest_sha256 != first.manifest_sha256
    assert (changed.clients([3]).rows[0] % 7 == 2).all()


SCENARIO = """
[data]
name = "digits"
[partition]
kind = "file"
path = "who.csv"
"""


def test_a_path_beside_the_scenario_is_found_and_no_part_of_what_the_run_is(tmp_path):
    hashes = set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "csv", {"client": OWNERS})
        (tmp_path / folder / "mine.toml").write_text(SCENARIO)
        scenario = load(tmp_path / folder / "mine.toml")
        assert scenario.partition["path"] == str(tmp_path / folder / "who.csv")
        hashes.add(scenario.sha256)
    assert len(hashes) == 1
