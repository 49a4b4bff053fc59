"""Files of the user's own: which are read, which columns are what, and what is refused."""

import json
import tracemalloc

import datasets
import numpy as np
import pytest
from PIL import Image

from fedsim.basics.errors import ScenarioError
from tests.data.tables import IID, load, pictures, png, write

NATURAL = {"kind": "natural"}


def table(path, rows, header="a,b,label", separator=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines).replace(",", separator) + "\n")


def numbers(count=20, seed=0):
    draw = np.random.default_rng(seed)
    return [
        (round(a, 3), round(b, 3), n % 2) for n, (a, b) in enumerate(draw.normal(size=(count, 2)))
    ]


def folder(path, partition=IID, **keys):
    return load(path.parent / "cache", partition, name="folder", path=str(path), **keys)


# --- which files --------------------------------------------------------------------------------


def _as_csv(root, rows):
    table(root / "all.csv", rows)


def _as_tsv(root, rows):
    table(root / "all.tsv", rows, separator="\t")


def _as_json_lines(root, rows):
    lines = [json.dumps(dict(zip(("a", "b", "label"), row, strict=True))) for row in rows]
    (root / "all.jsonl").write_text("\n".join(lines))


def _as_parquet(root, rows):
    columns = dict(zip(("a", "b", "label"), map(list, zip(*rows, strict=True)), strict=True))
    types = {"a": "float64", "b": "float64", "label": "int64"}
    write(root / "all.parquet", columns, types)


@pytest.mark.parametrize("write_rows", [_as_csv, _as_tsv, _as_json_lines, _as_parquet])
def test_every_format_gives_the_same_samples(tmp_path, write_rows):
    root = tmp_path / "mine"
    root.mkdir()
    write_rows(root, numbers())
    data = folder(root, standardise=False)
    expected = np.array(numbers())
    np.testing.assert_allclose(data.clients([0]).features, expected[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(data.clients([0]).targets, expected[:, 2])
    assert data.spec == ((2,), 2, (), 0)
    assert np.bincount(data.test.targets).tolist() == [2, 2]  # a fifth, by class


@pytest.mark.parametrize(
    ("train", "test", "keys"),
    [
        ("train.csv", "test.csv", {}),
        ("train-00000-of-00001.csv", "test-00000-of-00001.csv", {}),
        ("train/a.csv", "test/a.csv", {}),
        ("data/train_1.csv", "data/test_1.csv", {}),
        ("ours.csv", "theirs.csv", {"train": "ours", "test": "theirs"}),
        ("ours.csv", "test.csv", {}),
    ],
)
def test_files_belong_to_the_split_that_their_names_say(tmp_path, train, test, keys):
    root = tmp_path / "mine"
    table(root / train, numbers(20))
    table(root / test, numbers(6, seed=1))
    data = folder(root, **keys)
    assert len(data.clients([0]).targets) == 20
    assert len(data.test.targets) == 6
    assert data.manifest["held_out"]["drawn"] == "the test split of the data set"
    assert data.manifest["data"]["files"] == [train, test]


@pytest.mark.parametrize("name", ["mine.csv", "odd [d]*? name, really.csv"])
def test_one_file_is_a_data_set(tmp_path, name):
    table(tmp_path / name, numbers())
    assert folder(tmp_path / name).manifest["data"]["files"] == [name]


def _photos(root, shape=(5, 4), names=("cat", "dog", "eel"), count=6):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for n, pixels in enumerate(pictures(count, number, shape)):
            (root / name / f"{n}.png").write_bytes(png(pixels))


def test_folders_of_images_are_classes(tmp_path):
    _photos(tmp_path / "mine")
    data = folder(tmp_path / "mine")
    assert data.spec == ((1, 5, 4), 3, (), 0)
    assert data.manifest["data"]["label_names"] == ["cat", "dog", "eel"]
    pool = data.clients([0])
    expected = np.concatenate([pictures(6, n, (5, 4)) for n in range(3)])[:, None] / 255
    np.testing.assert_allclose(pool.features, expected, rtol=0, atol=1e-6)
    assert pool.targets.tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_folders_of_images_may_lie_in_folders_of_splits(tmp_path):
    _photos(tmp_path / "mine" / "train")
    _photos(tmp_path / "mine" / "test", count=2)
    _photos(tmp_path / "mine" / "validation", count=3)
    data = folder(tmp_path / "mine")
    assert (len(data.clients([0]).targets), len(data.test.targets)) == (18, 6)
    assert len(folder(tmp_path / "mine", test="validation").test.targets) == 9


def test_images_are_resized_or_made_grey_when_asked(tmp_path):
    _photos(tmp_path / "mine", shape=(8, 6, 3))
    assert folder(tmp_path / "mine").feature_shape == (3, 8, 6)
    data = folder(tmp_path / "mine", resize=[4, 3], channels="grey")
    assert data.feature_shape == (1, 4, 3)
    assert data.manifest["data"]["preprocessing"]["resized_to"] == [4, 3]
    first = Image.open(tmp_path / "mine" / "cat" / "0.png").convert("L").resize((3, 4), 2)
    np.testing.assert_allclose(
        data.clients([0]).features[0, 0], np.asarray(first) / 255, rtol=0, atol=1e-6
    )


def test_a_script_in_the_folder_is_not_run(tmp_path):
    root, trap = tmp_path / "mine", tmp_path / "trap"
    table(root / "train.csv", numbers())
    for name in ("mine.py", "train.py", "csv.py"):
        (root / name).write_text(f"open({str(trap)!r}, 'w')\n")
    folder(root)
    assert not trap.exists()


def test_nothing_is_drawn_and_nobody_is_told(tmp_path, capfd, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("counted"))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    table(tmp_path / "mine" / "train.csv", numbers())
    folder(tmp_path / "mine")
    assert capfd.readouterr() == ("", "")
    assert asked == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True


# --- which columns ------------------------------------------------------------------------------


def test_text_booleans_and_named_classes_are_classes_in_sorted_order(tmp_path):
    rows = [(n, n * n % 7, "no" if n % 3 else "yes") for n in range(12)]
    table(tmp_path / "text" / "x.csv", rows)
    text = folder(tmp_path / "text")
    assert text.manifest["data"]["label_names"] == ["no", "yes"]
    assert text.clients([0]).targets.tolist() == [int(n % 3 == 0) for n in range(12)]
    columns = {"a": list(range(12)), "label": [n % 2 == 0 for n in range(12)]}
    write(tmp_path / "bool" / "x.parquet", columns, {"a": "int64", "label": "bool"})
    truth = folder(tmp_path / "bool")
    assert truth.manifest["data"]["label_names"] == ["false", "true"]
    assert truth.clients([0]).targets.tolist() == [1, 0] * 6
    columns["label"] = [n % 3 for n in range(12)]
    write(tmp_path / "named" / "x.parquet", columns, {"a": "int64", "label": ["u", "v", "w", "z"]})
    named = folder(tmp_path / "named")
    assert named.num_classes == 4  # the data set says so, though nothing is a "z"
    assert named.manifest["data"]["label_names"] == ["u", "v", "w", "z"]


def test_fractional_targets_are_numbers_and_may_be_several(tmp_path):
    draw = np.random.default_rng(0).normal(size=(20, 4))
    table(tmp_path / "mine" / "x.csv", draw.tolist(), header="a,b,c,d")
    one = folder(tmp_path / "mine", target="d")
    assert one.spec == ((3,), 0, (), 0)
    np.testing.assert_allclose(one.clients([0]).targets, draw[:, 3], rtol=1e-6)
    two = folder(tmp_path / "mine", target=["d", "b"], features=["c"])
    assert two.spec == ((1,), 0, (2,), 0)
    np.testing.assert_allclose(two.clients([0]).targets, draw[:, [3, 1]], rtol=1e-6)
    assert two.manifest["data"]["columns"] == {"features": ["c"], "target": ["d", "b"]}


def test_whole_numbers_are_classes_or_amounts_as_the_scenario_says(tmp_path):
    rows = [(n, n % 3, 1 + n % 3) for n in range(12)]
    table(tmp_path / "mine" / "x.csv", rows)
    with pytest.raises(ScenarioError, match=r"'label' has no sample of class 0 .* target_type"):
        folder(tmp_path / "mine")
    classes = folder(tmp_path / "mine", target_type="classes")
    assert classes.clients([0]).targets.tolist() == [0, 1, 2] * 4
    assert classes.manifest["data"]["label_names"] == ["1", "2", "3"]
    amounts = folder(tmp_path / "mine", target_type="numbers")
    assert amounts.clients([0]).targets.tolist() == [1, 2, 3] * 4
    assert amounts.num_classes == 0


def test_a_column_of_lists_is_one_features_array(tmp_path):
    lists = np.arange(72.0).reshape(12, 2, 3)
    made = datasets.Dataset.from_dict({"x": lists.tolist(), "y": [n % 2 for n in range(12)]})
    (tmp_path / "mine").mkdir()
    made.to_parquet(tmp_path / "mine" / "x.parquet")
    data = folder(tmp_path / "mine")
    assert data.feature_shape == (2, 3)
    np.testing.assert_array_equal(data.clients([0]).features, lists)


def test_owners_are_numbered_in_sorted_order_of_their_names(tmp_path):
    rows = [(n, ("site 2", "site 10", "site 1")[n % 3], n % 2) for n in range(30)]
    table(tmp_path / "mine" / "x.csv", rows, header="a,site,label")
    data = folder(tmp_path / "mine", NATURAL, group="site")
    assert data.num_clients == 3
    assert data.manifest["owners"]["of_first_clients"] == ["site 1", "site 10", "site 2"]
    assert [set(rows % 3) for rows in data.clients([0, 1, 2]).rows] == [{2}, {1}, {0}]
    assert data.feature_shape == (1,)  # the owner is no feature


def test_characters_are_learnt_from_any_text(tmp_path):
    rows = [{"a": "to be or not"[n % 4 : n % 4 + 6], "label": "tb"[n % 2]} for n in range(20)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = folder(tmp_path / "x.jsonl", target_type="characters")
    assert data.spec == ((6,), 81, (), 81)


# --- standardising ------------------------------------------------------------------------------


def test_columns_of_numbers_get_mean_0_and_deviation_1_over_what_is_trained_on(tmp_path):
    draw = np.random.default_rng(0).normal(size=(60, 3)) * [1, 50, 0] + [3, -700, 5]
    table(
        tmp_path / "mine" / "x.csv", [(*row, n % 2) for n, row in enumerate(draw)],
        header="a,b,constant,label",
    )  # fmt: skip
    partition = {"kind": "iid", "clients": 3, "test_fraction": 0.25}
    raw = folder(tmp_path / "mine", partition, standardise=False)
    data = folder(tmp_path / "mine", partition)
    rows = np.concatenate(data.clients([0, 1, 2]).rows)
    trained = raw.clients([0]).features[rows].astype(np.float64)
    mean, std = trained.mean(axis=0), trained.std(axis=0)
    std[2] = 1
    for found, source in (
        (data.clients([0]).features, raw.clients([0]).features),
        (data.test.features, raw.test.features),
    ):
        np.testing.assert_allclose(found, (source - mean) / std, rtol=0, atol=1e-5)
    assert (data.clients([0]).features[:, 2] == 0).all()
    told = data.manifest["data"]["standardised"]["features"]
    np.testing.assert_allclose(told["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(told["std"], std, rtol=1e-6)


def test_no_held_out_value_moves_the_statistics(tmp_path):
    rows = numbers(40)
    table(tmp_path / "mine" / "train.csv", rows)
    told = []
    for scale in (1, 1000):
        table(tmp_path / "mine" / "test.csv", [(a * scale, b, n) for a, b, n in rows[:8]])
        told.append(folder(tmp_path / "mine").manifest["data"]["standardised"])
    assert told[0] == told[1]


def test_images_are_standardised_by_channel(tmp_path):
    _photos(tmp_path / "mine", shape=(6, 6, 3))
    data = folder(tmp_path / "mine", standardise=True)
    trained = data.clients([0]).features[np.concatenate(data.clients(range(4)).rows)]
    np.testing.assert_allclose(trained.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(trained.std(axis=(0, 2, 3)), 1, atol=1e-5)


# --- refusals -----------------------------------------------------------------------------------


def _many_targets(root):
    table(root / "x.csv", numbers(), header="a,label,target")


def _no_target(root):
    table(root / "x.csv", numbers(), header="a,b,c")


def _text_feature(root):
    table(root / "x.csv", [(n, "red", n % 2) for n in range(8)])


def _missing(root):
    table(root / "train_1.csv", numbers(10))
    table(root / "train_2.csv", [*numbers(3), (1.5, "", 0)])


def _infinite(root):
    table(root / "x.csv", [*numbers(5), ("inf", 0.5, 1)])


def _missing_label(root):
    table(root / "x.csv", [(1, 2, "u"), (1, 2, ""), (2, 3, "v")])


def _one_text(root):
    rows = numbers()
    table(root / "x.csv", [*rows[:7], ("none", 1, 0), *rows[7:]])


def _twice(root):
    table(root / "x.csv", numbers(), header="a,a,label")


def _torn_table(root):
    table(root / "train_1.csv", numbers())
    (root / "train_2.csv").write_text('a,b,label\n1,"2')


def _missing_owner(root):
    table(root / "x.csv", [(1, "s", 0), (1, "", 1), (2, "t", 1)])


def _ragged(root):
    made = datasets.Dataset.from_dict({"x": [[1, 2], [3, 4], [5]], "y": [0, 1, 0]})
    made.to_parquet(root / "x.parquet")


def _hole_in_a_list(root):
    made = datasets.Dataset.from_dict({"x": [[1, 2], [3, None], [5, 6]], "y": [0, 1, 0]})
    made.to_parquet(root / "x.parquet")


def _dictionaries(root):
    made = datasets.Dataset.from_dict({"x": [{"u": 1}, {"u": 2}], "y": [0, 1]})
    made.to_parquet(root / "x.parquet")


def _unequal_images(root):
    _photos(root / "train")
    (root / "train" / "dog" / "3.png").write_bytes(png(pictures(1, 0, (9, 9))[0]))


def _torn_photo(root):
    _photos(root / "train")
    (root / "train" / "dog" / "3.png").write_bytes(b"\x89PNG")


def _two_formats(root):
    table(root / "x.csv", numbers())
    _as_json_lines(root, numbers())


def _only_test(root):
    table(root / "test.csv", numbers())


def _nothing(root):
    (root / "readme.txt").write_text("")


def _one_class(root):
    table(root / "x.csv", [(n, n, 0) for n in range(8)])


def _unequal_columns(root):
    table(root / "train_1.csv", numbers())
    table(root / "train_2.csv", numbers(), header="a,c,label")


def _new_class(root):
    table(root / "train.csv", numbers())
    table(root / "test.csv", [(1, 2, 0), (3, 4, 3)])


def _uneven_text(root):
    _as_json_lines(root, [("abc", 0, "d"), ("abcd", 0, "e"), ("abc", 0, "f")])


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (_many_targets, {}, r"target is missing, and label and target could each be it: name one"),
        (_no_target, {}, r"target is missing, and no name or type tells it: name .* a, b, c"),
        (
            _no_target,
            {"target": "d"},
            r"target: 'd' is not a column of the train split; .*: a, b",
        ),
        (_no_target, {"target": "c", "features": ["a", "c"]}, r"'c' is named as a feature and as"),
        (_no_target, {"target": ["a", "a"]}, r"target = \['a', 'a'\]: must name one column or mo"),
        (
            _text_feature,
            {},
            r"column 'b' holds text, which is no number: x.csv, row 0 is 'red'; c",
        ),
        (_one_text, {}, r"column 'a' holds text, which is no number: x.csv, row 7 is 'none'; corr"),
        (_twice, {}, r"x.csv has two columns 'a'"),
        (_torn_table, {}, r"train_2.csv cannot be read: "),
        (_no_target, {"target": "c", "resize": [4, 4]}, r"\[data\] resize: is about images, and c"),
        (_no_target, {"target": "c", "channels": "grey"}, r"channels: is about images, and column"),
        (_missing, {}, r"train_2.csv, row 3, column 'b' is missing"),
        (_infinite, {}, r"x.csv, row 5, column 'a' is inf, expected a finite number"),
        (_missing_label, {}, r"x.csv, row 1, column 'label' is missing"),
        (_missing_owner, {"group": "b"}, r"x.csv, row 1, column 'b' is missing"),
        (_ragged, {}, r"x.parquet, row 2, column 'x' holds a list of 1, expected 2"),
        (_hole_in_a_list, {}, r"x.parquet, row 1, column 'x' holds a missing value"),
        (_dictionaries, {}, r"column 'x' holds .*, expected numbers or images"),
        (_unequal_images, {}, r"train/dog/3.png: the image is 9x9, expected 4x5; set \[data\] res"),
        (_torn_photo, {}, r"train/dog/3.png: the image cannot be decoded"),
        (_two_formats, {}, r"files of several formats \(csv, json\): say which in \[data\] format"),
        (_only_test, {}, r"holds no csv files to train on"),
        (_nothing, {}, r"holds no files that can be read; tables end in .parquet .csv"),
        (_nothing, {"format": "csv"}, r"holds no csv files; "),
        (_no_target, {"test": "held"}, r"holds no csv files of \[data\] test = 'held'"),
        (_one_class, {}, r"'label' holds class 0 alone, expected at least two classes"),
        (_unequal_columns, {}, r"its csv files cannot be read together: .*columns"),
        (_new_class, {}, r"column 'label' has no sample of class 2 but one of class 3"),
        (
            _uneven_text,
            {"target_type": "characters", "features": "a"},
            r"row 1, column 'a' has 4 c",
        ),
        (_no_target, {"resize": [3]}, r"\[data\] resize = \[3\]: must be \[height, width\]"),
        (_no_target, {"test_fraction": 0.0}, r"\[data\] test_fraction = 0.0: must be in \(0, 1\)"),
        (_no_target, {"target": "c", "target_type": "characters"}, r"'a' holds .*, expected text"),
        (
            _no_target,
            {"target": "b", "target_type": "classes"},
            r"x.csv, row 0, column 'b' is -0.132, expected classes",
        ),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_the_place(tmp_path, make, keys, message):
    root = tmp_path / "mine"
    root.mkdir()
    make(root)
    with pytest.raises(ScenarioError, match=message) as refused:
        folder(root, {"kind": "iid", "clients": 2}, **keys)
    assert "\n" not in str(refused.value)


def test_a_format_that_a_file_does_not_have_is_refused(tmp_path):
    table(tmp_path / "x.csv", numbers())
    with pytest.raises(ScenarioError, match=r"\[data\] format = 'json': x.csv is csv by its"):
        folder(tmp_path / "x.csv", format="json")
    folder(tmp_path / "x.csv", format="csv")


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(ScenarioError, match=r"\[data\] path = '.*gone': no such folder or file$"):
        folder(tmp_path / "gone")


# --- the Hub, by repository ---------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that loads a folder as `datasets` takes it for a repository of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrow").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    table(tmp_path / "me" / "mine" / "train.csv", numbers(20))
    table(tmp_path / "me" / "mine" / "test.csv", numbers(6, seed=1))
    return lambda **keys: load(
        tmp_path / "cache", name="hub", **{"repository": "me/mine", **keys}
    )  # fmt: skip


def test_any_repository_of_the_hub_is_read_by_columns(hub, tmp_path):
    data = hub(test="test", standardise=False)
    assert (len(data.clients([0]).targets), len(data.test.targets)) == (20, 6)
    assert data.manifest["data"]["hub"] == "me/mine"
    same = folder(tmp_path / "me" / "mine", standardise=False)
    assert data.manifest["sha256"] == same.manifest["sha256"]
    assert len(hub().test.targets) == 4  # without a test split a fifth is drawn


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"test": "tests"}, r"test = 'tests': me/mine has no such split; did you mean 'test'\?"),
        ({"repository": "mine"}, r"repository = 'mine': must be 'owner/name'"),
        (
            {"target": "lable"},
            r"target: 'lable' is not a column .*; did you mean 'label'\?",
        ),
        ({"config": "other"}, r"\[data\] config: me/mine: .*other"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(hub, keys, message):
    with pytest.raises(ScenarioError, match=message):
        hub(**keys)


def test_a_repository_with_a_script_is_refused_and_the_script_not_run(hub, tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "me" / "coded").mkdir()
    (tmp_path / "me" / "coded" / "coded.py").write_text(f"open({str(trap)!r}, 'w')\n")
    with pytest.raises(
        ScenarioError, match=r"me/coded is loaded by a script of its own, which fed"
    ):
        hub(repository="me/coded")
    assert not trap.exists()


# --- memory -------------------------------------------------------------------------------------


def test_images_are_decoded_in_bounded_batches(tmp_path):
    # large files of few pixels: all of them at once would be ten times what is kept
    root = tmp_path / "mine"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for n in range(60):
            Image.fromarray(pictures(1, n, (128, 128, 3))[0]).save(root / name / f"{n}.png")
    folder(root, resize=[4, 4])  # what is imported once is not counted
    tracemalloc.start()
    data = load(tmp_path / "other", name="folder", path=str(root), resize=[8, 8])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    files = sum(file.stat().st_size for file in root.rglob("*.png"))
    assert files > 5_000_000
    assert peak < 2_000_000 + 4 * data.clients([0]).features.nbytes
