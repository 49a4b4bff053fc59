"""Tables as people have them are read, or refused by what they are, with the remedy."""

import gzip
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.data.reading import files as reading
from fedsim.scenario.scenario import Scenario
from tests.cases.own_tables import NATURAL, SCENARIO, read, rows, write

FRAME = pd.DataFrame(rows(), columns=["a", "b", "label"])
# of the scenario in `own_tables` before these keys came
SHA256 = "001b3b616a4b1d73bdd9d85ee553f6000a4bb81dd4ce814437175ce138dbe800"
second = partial(pytest.param, marks=pytest.mark.slow)  # of a kind
READ = np.asarray(rows())[:, :2]


def put(content, name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)


def csv(**how):
    return FRAME.to_csv(index=False, **how)


def quoted_decimals():
    lines = [f'"{a}","{b}",{label}'.replace(".", ",") for a, b, label in rows()]
    return "a,b,label\n" + "\n".join(lines)


# --- separators, decimals, encodings ------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (csv(sep=";"), "x.csv", "separator ';'"),
        (csv(sep="\t"), "x.csv", r"separator '\t'"),
        second(csv(sep="|"), "x.csv", "separator '|'"),
        second(csv(sep=" "), "x.csv", "separator ' '"),
        (FRAME.to_string(index=False), "x.csv", "separator ' '"),
        second(csv(), "x.tsv", "separator ','"),
        (csv(sep=";", decimal=","), "x.csv", "separator ';', decimal ','"),
        second(csv(sep="\t", decimal=","), "x.tsv", "decimal ','"),
        (quoted_decimals(), "x.csv", "decimal ','"),
        (csv(sep="\t").encode("utf-16"), "x.csv", r"separator '\t', encoding 'utf-16'"),
        second(csv(sep=";", lineterminator="\r\n"), "x.csv", "separator ';'"),
    ],
)
def test_how_a_table_is_written_is_found_and_said(tmp_path, content, name, said):
    put(content, name, tmp_path / "mine")
    data = read(tmp_path / "mine", standardise=False)
    np.testing.assert_allclose(data.clients([0]).features, READ, rtol=1e-6)
    assert f"{name} is read with {said}, as" in data.said[0]


@pytest.mark.parametrize(
    "content",
    [
        csv(),
        csv().encode("utf-8-sig"),
        second(csv(lineterminator="\r")),
        second(csv(quoting=1)),
        csv().replace(",", ", "),
    ],
)
def test_what_is_as_its_name_says_needs_no_word(tmp_path, content):
    put(content, "x.csv", tmp_path / "mine")
    (said,) = read(tmp_path / "mine").said
    assert "read as features: a, b; target: label, 2 classes (0, 1)" in said


def test_what_is_said_in_the_scenario_is_not_said_again(tmp_path):
    put(csv(sep=";", decimal=",").encode("cp1252"), "x.csv", tmp_path / "mine")
    data = read(tmp_path / "mine", separator=";", decimal=",", encoding="cp1252")
    assert len(data.said) == 1


def test_a_file_of_another_ending_is_read_when_its_format_is_said(tmp_path):
    file = write(tmp_path / "wine.data", rows(), separator=";")
    with pytest.raises(ScenarioError, match=r"wine.data is perhaps a table.* format = 'csv'"):
        read(file)
    assert read(file, format="csv").feature_shape == (2,)


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (
            "ä;b;label\n1;2;0\n".encode("latin-1"),
            {},
            r"no text in UTF-8 \(byte 0\).*encoding = 'cp",
        ),
        (
            (csv() + "1,2,0\n" * 20_000).encode() + b"1,2,\xe4\n",
            {},
            r"x.csv is no text in UTF-8; say how .* encoding = 'cp1252'",
        ),
        (csv().encode("utf-16-le"), {}, r"encoding = 'utf-16-le'"),
        (csv(), {"encoding": "utf-99"}, r"encoding = 'utf-99': is none that Python knows"),
        (csv(), {"separator": "::"}, r"separator = '::': must be one character"),
        (csv(), {"separator": ";"}, r"a,b,label \(one column: is its separator another"),
        ("a;b;label\n1,250;2;0\n2,100;3;1\n", {}, r"1,250, which may be 1.250 or 1250; say .* dec"),
        ("a,b;label,c\n1,2;0,1\n", {}, r"may be separated by ',' or ';'; say it in \[data\] sep"),
        (
            csv().replace(".", ","),
            {},
            r"has 3 of the names and row 0 has 5 values.*commas",
        ),
        ("a,b,label\nr1,1,2,0\nr2,1,3,1\n", {}, r"row 0 has 4 values; name every column \(R le"),
        ("# of 2020\n" + csv(), {}, r"first line has 1 .* take lines above the names away"),
        (csv(header=False), {}, r"target is missing.*is its first line a row\? then write the co"),
        ("0,0,1\n0,1,1\n", {}, r"two columns '0' \(is its first line a row\?"),
        ("a,b,label\n", {}, r"x.csv has no row below its first line"),
        ("", {}, r"x.csv is empty"),
        ("sep=;\n" + csv(sep=";"), {}, r"a first line for Excel alone; take that line out"),
        (gzip.compress(csv().encode()), {}, r"x.csv is compressed by gzip; unpack it"),
        (b"PK\x03\x04workbook", {}, r"a zip archive, as Excel's workbooks are"),
        ("<html>not found</html>", {}, r"x.csv is HTML or XML, as a page"),
        (FRAME.to_json(orient="records"), {}, r"x.csv is JSON; let its name end in .json"),
        (
            "a;b;label\n" + "1;2;0\n" * 30_000 + "1,5;2;1\n",
            {},
            r"row 30000 is '1,5'; say \[data\] decimal = ',' if that is one",
        ),
    ],
)
def test_what_cannot_be_read_is_called_what_it_is(tmp_path, content, keys, message):
    put(content, "x.csv", tmp_path / "mine")
    with pytest.raises(ScenarioError, match=message) as refused:
        read(tmp_path / "mine", **keys)
    assert str(refused.value).startswith("[data] ")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "x.parquet", r"a pointer of Git LFS"),
        (csv(), "x.parquet", r"x.parquet is no parquet"),
        ("[[1, 2], [3, 4]]", "x.json", r"x.json is a list of lists or of values, expected one of"),
        (csv(), "x.json", r"x.json is no JSON: that begins with"),
        (b"PK\x03\x04", "x.xlsx", r"x.xlsx is a workbook; save the sheet as CSV"),
        (b"", "x.csv.gz", r"x.csv.gz is packed; unpack it"),
        (b"", "x.pkl", r"x.pkl is a pickle, which fedsim never opens"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, content, name, message):
    put(content, name, tmp_path / "mine")
    with pytest.raises(ScenarioError, match=message):
        read(tmp_path / "mine")


def test_files_that_are_written_otherwise_are_named(tmp_path):
    put(csv(), "p.csv", tmp_path / "mine")
    put(csv(sep=";"), "q.csv", tmp_path / "mine")
    with pytest.raises(ScenarioError, match=r"q.csv has the separator ';' and p.csv ','; write"):
        read(tmp_path / "mine")


def test_keys_of_text_tables_are_refused_for_others(tmp_path):
    put(FRAME.to_json(orient="records"), "x.json", tmp_path / "mine")
    with pytest.raises(ScenarioError, match=r"\[data\] separator: is about CSV and TSV"):
        read(tmp_path / "mine", separator=";")


def test_the_keys_leave_a_scenario_its_hash(tmp_path):
    write(tmp_path / "patients.csv", rows())
    (tmp_path / "s.toml").write_text(SCENARIO)
    scenario = fedsim.load_scenario(tmp_path / "s.toml")
    document = scenario.resolved()
    for key in ("separator", "decimal", "encoding"):
        assert document["data"][key] is None
    said = Scenario.from_resolved(
        {**document, "data": {**document["data"], "separator": ";"}}, scenario.origin
    )
    without = {k: v for k, v in document["data"].items() if k not in ("separator", "decimal")}
    old = Scenario.from_resolved({**document, "data": without}, scenario.origin)
    assert scenario.sha256 == old.sha256 == SHA256
    assert said.sha256 != old.sha256


# --- types --------------------------------------------------------------------------------------


def test_no_type_is_decided_by_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(reading._READERS["csv"][1], "chunksize", 5)
    values = [[n if n < 15 else n + 0.5, n % 3, n % 2 if n < 18 else "?"] for n in range(20)]
    file = write(tmp_path / "x.csv", values)
    data = read(file, standardise=False)
    assert data.clients([0]).features[:, 0].tolist() == [row[0] for row in values]
    assert data.manifest["data"]["label_names"] == ["0", "1", "?"]
    with pytest.raises(ScenarioError, match=r"x.csv, row 18 is '\?'"):
        read(file, target="a", features=["label"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_site_may_have_whole_numbers_where_another_has_fractions(tmp_path, kind):
    for name, frame in (("p", FRAME.assign(a=range(20))), ("q", FRAME)):
        (tmp_path / "mine").mkdir(exist_ok=True)
        file = tmp_path / "mine" / f"{name}.{kind}"
        frame.to_csv(file, index=False) if kind == "csv" else frame.to_parquet(file)
    data = read(tmp_path / "mine", NATURAL, group="file", standardise=False)
    found = data.clients([0]).features
    np.testing.assert_allclose(found[:20, 0], range(20))
    np.testing.assert_allclose(found[20:], READ, rtol=1e-6)


# --- JSON ---------------------------------------------------------------------------------------

USERS = {
    "users": ["u0", "u1"],
    "num_samples": [6, 4],
    "user_data": {
        "u0": {"x": [[n, 1.5] for n in range(6)], "y": [0, 1] * 3},
        "u1": {"x": [[n, 2.5] for n in range(4)], "y": [1, 0] * 2},
    },
}


@pytest.mark.parametrize("indent", [None, 2])
def test_users_of_leaf_are_owners(tmp_path, indent):
    put(json.dumps(USERS, indent=indent), "all_data.json", tmp_path / "mine")
    data = read(tmp_path / "mine", NATURAL)
    assert data.manifest["owners"]["of_first_clients"] == ["u0", "u1"]
    assert data.feature_shape == (2,)
    assert "features: x; target: y, 2 classes (0, 1); group: user (set" in data.said[0]


def test_splits_of_leaf_are_kept(tmp_path):
    for split in ("train", "test"):
        put(json.dumps(USERS), f"all_data_{split}_9.json", tmp_path / "mine" / split)
    data = read(tmp_path / "mine", NATURAL, standardise=False)
    assert data.sizes([0, 1]).tolist() == [6, 4]
    assert data.test.targets.tolist() == [0, 1, 0, 1, 0, 1, 1, 0, 1, 0]
    assert data.clients([1]).features[6:].tolist() == [[n, 2.5] for n in range(4)]


@pytest.mark.parametrize(
    "content",
    [
        FRAME.to_json(),
        json.dumps(FRAME.to_dict("list")),
        second(FRAME.to_json(orient="records")),
        second(FRAME.to_json(orient="records", lines=True)),
        second(json.dumps(FRAME.to_dict("list"), indent=1)),
    ],
)
def test_rows_and_columns_are_tables(tmp_path, content):
    put(content, "x.json", tmp_path / "mine")
    data = read(tmp_path / "mine", standardise=False)
    np.testing.assert_allclose(data.clients([0]).features, READ, rtol=1e-6)


def _without(*names):
    return {key: value for key, value in USERS.items() if key not in names}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**USERS, "num_samples": [6, 5]}, r"user 'u1' has 4 x and 4 y, and num_samples says 5"),
        ({**USERS, "users": ["u0", "u2"]}, r"user 'u2' has no lists x and y in user_data"),
        ({**_without("num_samples"), "users": ["u0"]}, r"user 'u1' of user_data is not among"),
        ({**USERS, "num_samples": [6]}, r"2 users and 1 num_samples"),
        (
            {"version": 1, "data": FRAME.to_dict("records")},
            r"one object \(version, data\), expected rows .*; its rows seem to be in 'data'",
        ),
        (FRAME.to_dict("split"), r"one object \(index, columns, data\), expected rows"),
        ({"a": {"0": 1, "1": 2}, "b": {"0": 1, "2": 2}}, r"columns 'a' and 'b' have other rows"),
    ],
)
def test_objects_that_are_no_table_are_called_what_they_are(tmp_path, document, message):
    put(json.dumps(document), "x.json", tmp_path / "mine")
    with pytest.raises(ScenarioError, match=rf"x.json.*{message}"):
        read(tmp_path / "mine")


def test_a_bad_value_of_leaf_is_named_by_user_and_sample(tmp_path):
    document = json.loads(json.dumps(USERS))
    document["user_data"]["u1"]["x"][2][0] = None
    put(json.dumps(document), "x.json", tmp_path / "mine")
    with pytest.raises(ScenarioError, match=r"x.json, user 'u1', sample 2, column 'x' holds a mis"):
        read(tmp_path / "mine")
    with pytest.raises(ScenarioError, match=r"'quality' is not a column .*the files are LEAF's"):
        read(tmp_path / "mine", target="quality")


# --- files and folders as owners ----------------------------------------------------------------


def _sites(folder, suffix="csv"):
    content = csv() if suffix == "csv" else FRAME.to_json(orient="records", lines=True)
    for site in ("rome", "bern", "ulm"):
        put(content, f"{site}.{suffix}", folder)


def test_a_file_may_be_an_owner(tmp_path):
    _sites(tmp_path / "mine")
    pooled = read(tmp_path / "mine")
    assert "3 files are read as one table (bern, rome, ulm); group = 'file' makes" in pooled.said[0]
    data = read(tmp_path / "mine", NATURAL, group="file")
    assert data.manifest["owners"]["of_first_clients"] == ["bern", "rome", "ulm"]
    assert data.feature_shape == (2,)
    assert len(data.said) == 1


@pytest.mark.parametrize("suffix", ["csv", second("jsonl")])
def test_files_of_sites_keep_their_splits(tmp_path, suffix):
    for split in ("train", "test"):
        _sites(tmp_path / "mine" / split, suffix)
    data = read(tmp_path / "mine", NATURAL, group="file")
    assert (data.num_clients, len(data.test.targets)) == (3, 60)


def _client_folders(folder, *names):
    for client in ("client_0", "client_1"):
        for name in names:
            put(csv(), name, folder / client)


def _clients_in_splits(folder):
    for split in ("train", "test"):
        _client_folders(folder / split, "rows.csv")


@pytest.mark.parametrize(
    ("make", "held_out"),
    [
        (lambda folder: _client_folders(folder, "train.csv", "test.csv"), 40),
        second(lambda folder: _client_folders(folder / "data", "train.csv", "test.csv"), 40),
        (lambda folder: _client_folders(folder, "january.csv", "june.csv"), 16),
        (_clients_in_splits, 40),
    ],
)
def test_a_folder_may_be_an_owner(tmp_path, make, held_out):
    make(tmp_path / "mine")
    data = read(tmp_path / "mine", NATURAL, group="folder")
    assert data.manifest["owners"]["of_first_clients"] == ["client_0", "client_1"]
    assert len(data.test.targets) == held_out


def test_folders_of_clients_are_named_with_the_key(tmp_path):
    _client_folders(tmp_path / "mine", "train.csv", "test.csv")
    message = r"2 folders in it do \(client_0, client_1\): say \[data\] group = 'folder'"
    with pytest.raises(ScenarioError, match=message):
        read(tmp_path / "mine")


def test_files_that_tell_no_owners_apart_are_refused(tmp_path):
    _client_folders(tmp_path / "mine", "train.csv")
    put(csv(), "train.csv", tmp_path / "mine")
    refused = partial(pytest.raises, ScenarioError)
    with refused(match=r"train.csv lies in 'mine', no client's folder"):
        read(tmp_path / "mine", group="folder")
    (tmp_path / "mine" / "client_1" / "train.csv").unlink()
    (tmp_path / "mine" / "train.csv").unlink()
    with refused(match=r"group = 'folder': there is one folder to train on, so it divides nothing"):
        read(tmp_path / "mine", group="folder")
    for folder in ("x", "x/data"):
        put(csv(), "ulm.csv", tmp_path / folder)
    with refused(match=r"two files to train on are called 'ulm'"):
        read(tmp_path / "x", group="file")


def test_a_column_of_that_name_comes_first(tmp_path):
    for name in ("p", "q"):
        put(csv().replace("label", "file"), f"{name}.csv", tmp_path / "mine")
    data = read(tmp_path / "mine", NATURAL, group="file", target="b", features=["a"])
    assert data.manifest["owners"]["of_first_clients"] == ["0", "1"]
    assert data.manifest["data"]["columns"]["group"] == "file"


# --- a map from clients to samples --------------------------------------------------------------


def divided(tmp_path, document, **keys):
    file = write(tmp_path / "x.csv", rows())
    write(tmp_path / "test.csv", rows(4))
    (tmp_path / "map.json").write_text(json.dumps(document))
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    for name in (file, tmp_path / "test.csv"):
        name.rename(folder / name.name)
    return read(folder, {"kind": "file", "path": str(tmp_path / "map.json"), **keys})


def held(data):
    return [rows.tolist() for rows in data.clients(range(data.num_clients)).rows]


def test_a_map_from_clients_to_samples_is_a_partition(tmp_path):
    data = divided(tmp_path, {"0": [3, 1], "2": [0, 19], "1": []})
    assert held(data) == [[1, 3], [], [0, 19]]
    assert data.manifest["dropped"]["samples"] == 16


def test_a_sample_may_have_several_clients(tmp_path):
    data = divided(tmp_path, {"0": [3, 1], "1": [1, 3, 7], "3": [7]})
    assert held(data) == [[1, 3], [1, 3, 7], [], [7]]
    assert data.manifest["partition"]["samples_of_several_clients"] == 3
    assert data.manifest["dropped"]["samples"] == 17
    trained = np.asarray(rows())[[1, 3, 7], :2]
    told = data.manifest["data"]["standardised"]["features"]["mean"]
    np.testing.assert_allclose(told, trained.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("separator", [second(","), ";", second("\t")])
def test_a_table_of_samples_and_clients_may_have_any_separator(tmp_path, separator):
    who = write(tmp_path / "who.csv", [[3, 0], [1, 1]], "sample,client", separator)
    data = read(write(tmp_path / "x.csv", rows()), {"kind": "file", "path": str(who)})
    assert data.num_clients == 2
    write(who, [[0, 3, 0], [1, 1, 1]], ",sample,client", separator)
    with pytest.raises(ScenarioError, match=r"who.csv': column 1 has no name; write the file wit"):
        read(tmp_path / "x.csv", {"kind": "file", "path": str(who)})


@pytest.mark.parametrize(
    ("document", "keys", "message"),
    [
        ({"0": [3, 1], "1": [20]}, {}, r"client 1: sample = 20: must be in 0\.\.19"),
        ({"0": [3, 1, 3]}, {}, r"client 0: names sample 3 twice"),
        ({"0": [3, 1.5]}, {}, r"client 0: sample = 1.5: must be a whole number"),
        ({"0": {"0": 12}}, {}, r"must be a list of rows, .* '0' holds no list"),
        ({"ulm": [3]}, {}, r"each client's samples names clients by number, from \"0\""),
        ({"0": [1], "7": [2]}, {"clients": 4}, r"names client 7; clients = 4 allows 0\.\.3"),
        ({"0": [1], "1": [1]}, {"label_noise": 0.1}, r"label_noise: samples belong to several"),
        ({"0": [1], "1": [1]}, {"test_fraction": 0.5}, r"test_fraction: samples belong to sever"),
        ({"0": [1], "1": [1]}, {"feature_noise": 0.5}, r"feature_noise, .*samples belong to sev"),
    ],
)
def test_a_map_that_cannot_be_followed_is_refused(tmp_path, document, keys, message):
    with pytest.raises(ScenarioError, match=message):
        divided(tmp_path, document, **keys)
