"""What a table has that no reader can know is named where it stands, with what to write instead."""

import json
from functools import partial

import pandas as pd
import pytest
from PIL import Image

from fedsim.basics.errors import ScenarioError
from tests.cases.own_tables import NATURAL, read, rows

FRAME = pd.DataFrame(rows(), columns=["a", "b", "label"])
RECORDS = FRAME.to_json(orient="records")
HEADER, *BODY = FRAME.to_csv(index=False).splitlines()
refused = partial(pytest.raises, ScenarioError)
second = partial(pytest.param, marks=pytest.mark.slow)  # of a kind


def put(tmp_path, **files):
    for name, content in files.items():
        path = tmp_path / "mine" / name.replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / "mine"


def csv(sep=",", header=HEADER, body=BODY):
    return "\n".join([header, *body]).replace(",", sep) + "\n"


def with_a(value):
    """The table with another value in column `a` of its second row."""
    cells = BODY[1].split(",")
    return csv(body=[BODY[0], ",".join([value, *cells[1:]]), *BODY[2:]])


def with_owners(*names):
    body = [f"{line},{names[n % len(names)]}" for n, line in enumerate(BODY)]
    return csv(header=f"{HEADER},site", body=body)


# --- first lines --------------------------------------------------------------------------------


@pytest.mark.parametrize("sep", [":", "~", "^", second("#"), second("\x01"), second("/")])
def test_a_rare_separator_is_guessed_and_taken_when_it_is_said(tmp_path, sep):
    folder = put(tmp_path, x__csv=csv(sep))
    with refused() as caught:
        read(folder)
    hint = f"(one column: is its separator another? say it in [data] separator, such as {sep!r})"
    assert str(caught.value).endswith(hint)
    assert read(folder, separator=sep).feature_shape == (2,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (csv("::"), r"is its separator '::'\? it must be one character: write a comma or a tab"),
        ("# d, e, f\n" + csv(), r"is its first line a comment\? take it away"),
        ("# mine\n" + csv(), r"row 0 has 3 values \(is its first line a comment\? take it away\)"),
        (",,\n" + csv(), r"its first line names no column; take lines above the names away"),
        (csv(header="'a','b','label'"), r"its names stand in '; quote by \" or not at all"),
        (csv(header="“a”,“b”,“label”"), r"its names stand in “; quote by \""),
        ("1 1:0.5 2:0.1\n0 1:0.25 2:3\n" * 3, r"is it of LIBSVM\?"),
        ("| a | label |\n|---|:-:|\n| 1 | 0 |\n", r"x.csv is a table of Markdown; save it as CSV"),
        (csv(header="a,a,label"), r"two columns 'a'; give each a name of its own"),
        (csv(body=[f"{line}," for line in BODY]), r"row 0 ends in a ',' and the first line does"),
        (
            csv(header=HEADER + ",", body=[f"{line}," for line in BODY]),
            r"column 4 has no name, as columns have where lines end in a separator",
        ),
        (csv(body=[*BODY[:5], '"1,2,0', *BODY[5:]]), r"a quotation mark in line 7 is never closed"),
    ],
)
def test_lines_that_are_no_names_or_not_divided_alike(tmp_path, content, message):
    with refused(match=message):
        read(put(tmp_path, x__csv=content))


def test_a_row_that_is_longer_far_below_is_named(tmp_path):
    long = csv(body=BODY * 1000 + ["1,2,0,4"])
    with refused(match=r"x.csv cannot be read: line 20002 has 4 values, and those before it 3"):
        read(put(tmp_path, x__csv=long))


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (csv(), csv(header=BODY[0], body=BODY[1:]), r"and not their a, b, label \(is its first"),
        (
            csv(header=BODY[0], body=BODY[1:]),
            csv(),
            r"q.csv has the columns a, b, label, which .*ro",
        ),
        (csv(), csv(header="A,b,label"), r"q.csv has the columns A, which the files before it hav"),
        (
            csv(),
            with_owners("x"),
            r"q.csv has the columns site, .* name columns alike in all files",
        ),
    ],
)
def test_files_whose_columns_differ_are_told_apart(tmp_path, p, q, message):
    with refused(match=message) as caught:
        read(put(tmp_path, p__csv=p, q__csv=q))
    assert "hf.co" not in str(caught.value)


def test_the_order_of_columns_may_differ_from_file_to_file(tmp_path):
    turned = FRAME[["label", "b", "a"]].to_csv(index=False)
    data = read(put(tmp_path, train__csv=csv(), test__csv=turned), standardise=False)
    assert (data.test.features == data.clients([0, 1]).features).all()


def test_files_of_other_tables_are_told_apart(tmp_path):
    with refused(
        match=r"one has the columns key, value and those before it a, b, label; name colum"
    ):
        read(put(tmp_path, a__csv=csv(), b__csv="key,value\nx,1\n"))


@pytest.mark.parametrize("names", [("Train", "Test"), ("wine_train", "wine_test"), ("a", "valid")])
def test_no_file_is_trained_on_whose_name_says_that_it_is_for_a_test(tmp_path, names):
    folder = put(tmp_path, **{f"{name}.csv": csv() for name in names})
    with refused(
        match=rf"'{names[1]}.csv' seems to hold .*train = '{names[0]}' and test = '{names[1]}"
    ):
        read(folder)
    assert len(read(folder, train=names[0], test=names[1]).test.targets) == len(BODY)
    assert read(folder, NATURAL, group="file").num_clients == 2


def test_tables_of_no_split_are_said(tmp_path):
    folder = put(tmp_path, train__csv=csv(), test__csv=csv(), valid__csv=csv())
    assert "not read, as in neither split: valid.csv; set train or test" in read(folder).said[0]
    assert not any("neither split" in line for line in read(folder, train="train").said)


def _images(folder, *splits):
    for split in splits:
        for number, kind in enumerate(("cat", "dog")):
            place = folder / split / kind
            place.mkdir(parents=True)
            for n in range(4):
                Image.new("L", (4, 4), 60 * n + number).save(place / f"{n}.png")
    return folder


def test_splits_that_are_called_otherwise_are_guessed(tmp_path):
    folder = _images(tmp_path / "x", "Train", "Test")
    with refused(match=r"did you mean \[data\] train = 'Train' and test = 'Test'\?"):
        read(folder)
    assert len(read(folder, train="Train", test="Test").test.targets) == 8
    with refused(match=r"\[data\] train = 'Trian'; did you mean 'Train'\?"):
        read(folder, train="Trian")
    for split in ("training", "testing"):
        put(tmp_path, x__csv=csv()).joinpath(split).mkdir()
        (tmp_path / "mine" / "x.csv").rename(tmp_path / "mine" / split / "x.csv")
    with refused(match=r"did you mean \[data\] train = 'training' and test = 'testing'\?"):
        read(tmp_path / "mine")


def test_folders_of_images_of_no_split_are_said(tmp_path):
    folder = _images(tmp_path / "x", "train", "val")
    assert "not read, as in neither split: val/; set train or test" in read(folder).said[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"separator": "a"}, r"separator = 'a': is what values themselves hold"),
        ({"separator": "\n"}, r"separator = '\\n': is what values themselves hold"),
        ({"separator": '"'}, r"is what values themselves hold"),
        ({"encoding": "rot13"}, r"encoding = 'rot13': is none that Python knows"),
        ({"encoding": "ascii"}, r"x.csv is no text in ASCII \(byte 5\); say how it is encoded"),
        ({"encoding": "utf-16"}, r"x.csv is no text in UTF-16"),
        (
            {"decimal": ",", "target": "läbel"},
            r"is '0.126'; say \[data\] decimal = '.' if that is o",
        ),
    ],
)
def test_keys_that_do_not_fit_the_file_are_named(tmp_path, keys, message):
    with refused(match=message):
        read(put(tmp_path, x__csv=csv(header="a,b,läbel")), **keys)


def test_rare_ways_to_write_a_table_are_read_without_a_warning(tmp_path, recwarn):
    folder = put(tmp_path, x__csv=csv().encode("utf-32"))
    assert "encoding 'utf-32'" in read(folder).said[0]
    assert read(put(tmp_path, x__csv=csv("§")), separator="§").feature_shape == (2,)
    assert not [each for each in recwarn if "pandas" in str(each.message) + str(each.filename)]
    assert not [each for each in recwarn if "python" in str(each.message)]


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("1_000", r"write it without marks between its digits \(1000\)"),
        ("1 000", r"write it without marks between its digits \(1000\)"),
        second("1'000", r"write it without marks between its digits \(1000\)"),
        second("1\u202f000", r"write it without marks between its digits \(1000\)"),
        ('"1,234.5"', r"write it without marks between its digits \(1234.5\)"),
        ("12%", r"write the number alone, without a unit"),
        second("€5", r"write the number alone, without a unit"),
        second("5 kg", r"write the number alone, without a unit"),
        ("2020-01-02", r"make numbers of dates and times"),
        second("01:30", r"make numbers of dates and times"),
        ("yes", r"write 1 and 0"),
        ("?", r"if it stands for a missing value"),
        second("#DIV/0!", r"if it stands for a missing value"),
        ("\u22125", r"write it as -5, in the common signs"),
        second("\uff15", r"write it as 5, in the common signs"),
        ("a", r"take lines away that name the columns once more"),
        second('"=""5"""', r"save the value in place of the formula"),
        second("# note", r"take comments away"),
        ('"[1, 2]"', r"write each number of a list in a column of its own"),
        ("five", r"correct it"),
    ],
)
def test_a_text_among_numbers_is_named_with_what_to_write(tmp_path, value, remedy):
    with refused(
        match=rf"which is no number: x.csv, row 1 is .*; {remedy}.*, leave the column out"
    ):
        read(put(tmp_path, x__csv=with_a(value)))


def test_points_between_digits_are_named_where_decimals_have_commas(tmp_path):
    body = [line.replace(".", ";", 0).replace(",", ";").replace(".", ",") for line in BODY]
    body[3] = "1.234;0,5;0"
    with refused(match=r"row 3 is '1.234'; write it without marks between its digits \(1234\)"):
        read(put(tmp_path, x__csv=csv(",", "a;b;label", body)), decimal=",", separator=";")


def test_numbers_beyond_64_bits_are_called_too_long(tmp_path):
    body = [f"{10**25 + n},0.5,{n % 2}" for n in range(9)]
    with refused(match=r"its numbers are too long, such as '1000.*; write them with fewer digits"):
        read(put(tmp_path, x__csv=csv(body=body)))


def test_a_target_of_numbers_that_is_text_is_named(tmp_path):
    body = [f"{line.rpartition(',')[0]},1_000" for line in BODY]
    with refused(
        match=r"'label' holds text, and \[data\] target is to be numbers: x.csv, row 0 is"
    ):
        read(put(tmp_path, x__csv=csv(body=body)), target_type="numbers")


def test_a_word_that_pandas_takes_for_nothing_is_told(tmp_path):
    body = [line.rpartition(",")[0] + (",NA" if n % 2 else ",EU") for n, line in enumerate(BODY)]
    with refused(match=r"row 1, column 'label' is missing \(empty, or a word .*such as NA or None"):
        read(put(tmp_path, x__csv=csv(body=body)))


def test_columns_of_dates_and_of_nothing_are_called_that(tmp_path):
    (tmp_path / "mine").mkdir()
    FRAME.assign(a=pd.date_range("2020", periods=20)).to_parquet(tmp_path / "mine" / "x.parquet")
    with refused(match=r"'a' holds dates or times \(timestamp.*days since the first.*leave it out"):
        read(tmp_path / "mine")
    FRAME.assign(c=None).to_parquet(tmp_path / "mine" / "x.parquet")
    with refused(match=r"column 'c' holds no value in any row"):
        read(tmp_path / "mine")


# --- names that are one number ------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("0", "00"),
        ("01", "1", "02"),
        ("1e3", "1000"),
        second(("9007199254740993", "9007199254740992", "1.0")),
    ],
)
def test_owners_that_would_be_one_number_are_refused(tmp_path, names):
    folder = put(tmp_path, x__csv=with_owners(*names))
    with refused(match=rf"column 'site': owners '{names[0]}' and '{names[1]}' are the same number"):
        read(folder, NATURAL, group="site")


@pytest.mark.parametrize(
    "names", [("7", "7.0", "8"), ("01", "02"), ("+1", "1", "2"), ("x0", "x00")]
)
def test_owners_that_are_written_alike_or_as_text_are_read(tmp_path, names):
    data = read(put(tmp_path, x__csv=with_owners(*names)), NATURAL, group="site")
    assert data.num_clients == 2


def test_classes_that_would_be_one_number_are_refused(tmp_path):
    folder = put(tmp_path, x__csv=with_owners("0", "00", "1"))
    with refused(
        match=r"column 'site': classes '0' and '00' are the same number; write them alike"
    ):
        read(folder, target="site", features=["a", "b"])


# --- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (RECORDS.encode("utf-8-sig"), "x.json", r"begins with a byte-order mark; save it as UTF-8"),
        (RECORDS.encode("utf-16"), "x.jsonl", r"x.jsonl is text in UTF-16.*save it so"),
        (RECORDS.encode("utf-16-le"), "x.json", r"x.json is text in UTF-16.*save it so"),
        (RECORDS.replace("a", "ä").encode("latin-1"), "x.json", r"no text in UTF-8 \(.*save it as"),
        (FRAME.to_json(orient="split"), "x.json", r"with orient='split': write it with orient="),
        (FRAME.to_json(orient="values"), "x.json", r"as pandas writes with orient='records'"),
        (FRAME.to_json(orient="index"), "x.json", r"with orient='index', write it with orient="),
        (RECORDS.replace('"b"', '"a"'), "x.json", r"x.json has the key 'a' twice in one object"),
        ('{"a": 1, "a": 2}\n{"a": 1}\n', "x.jsonl", r"x.jsonl has the key 'a' twice"),
        ('{"a": [1], "a": [2], "label": [1]}', "x.json", r"x.json has the key 'a' twice"),
        ('{"user_data": {"u": {}, "u": {}}}', "x.json", r"x.json has the key 'u' twice"),
        (
            json.dumps({"users": ["u", "u"], "user_data": {"u": {"x": [[1]], "y": [0]}}}),
            "x.json",
            r"x.json: user 'u' stands twice among its users",
        ),
        (
            json.dumps({"users": [1, "1"], "user_data": {"1": {"x": [[1]], "y": [0]}}}),
            "x.json",
            r"x.json: user '1' stands twice among its users",
        ),
        ('{"a": 1},\n{"a": 2},\n', "x.jsonl", r"do its lines end in commas\? take them away"),
        ('{"a": 1} {"a": 2}', "x.json", r"several rows stand in a line\? write one per line"),
        (json.dumps([{"a": "2", "label": n % 2} for n in range(9)]), "x.json",
         r"its numbers are written as text, such as '2'; write them as numbers"),
    ],
)  # fmt: skip
def test_json_that_is_otherwise_written_is_called_what_it_is(tmp_path, content, name, message):
    with refused(match=message):
        read(put(tmp_path, **{name: content}))


def test_a_column_of_numbers_and_texts_is_called_that(tmp_path):
    mixed = [{"a": n if n % 2 else "7", "b": n, "label": n % 2} for n in range(9)]
    folder = put(tmp_path, **{"x.json": json.dumps(mixed)})
    with refused(match=r"'a' holds values of several kinds, such as numbers in some rows and text"):
        read(folder)
    with refused(match=r"'a' holds values of several kinds.*expected classes: whole numbers, text"):
        read(folder, target="a", features=["b"])


def test_rows_by_name_are_told_from_columns_by_row_by_their_target_alone(tmp_path):
    by_row = FRAME.set_index("r" + FRAME.index.astype(str)).to_json(orient="index")
    with refused(
        match=r"'label' is not a column .*an object per column; if each is a row's, as pan"
    ):
        read(put(tmp_path, x__json=by_row), target="label")
    numbered = FRAME.set_axis(["0", "1", "2"], axis=1).set_index("r" + FRAME.index.astype(str))
    assert read(put(tmp_path, x__json=numbered.to_json()), target="2").feature_shape == (2,)
