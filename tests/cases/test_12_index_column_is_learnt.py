"""What fedsim takes from a table by itself is refused where it is no feature, or said."""

import logging
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import fedsim
from fedsim.basics.errors import ScenarioError
from fedsim.data.preparation import prepare
from fedsim.data.sets.user import DataSet, checked
from tests.cases.own_tables import SCENARIO, read, rows, write

second = partial(pytest.param, marks=pytest.mark.slow)  # of a kind


def frame(count=20):
    return pd.DataFrame(rows(count), columns=["a", "b", "label"])


def _index_as_csv(folder):
    frame().to_csv(folder / "x.csv")
    return 1


def _index_as_parquet(folder):
    frame().sample(frac=1, random_state=0).to_parquet(folder / "x.parquet")
    return 4


def _two_levels(folder):
    made = frame()
    made.set_index([made.index, made.index + 1]).to_csv(folder / "x.csv")
    return 1


def _last_separator(folder):
    write(folder / "x.csv", [[*row, ""] for row in rows()], header="a,b,label,")
    return 4


def _blank(folder):
    write(folder / "x.csv", [[n, *row] for n, row in enumerate(rows())], header=" ,a,b,label")
    return 1


def _twice(folder):
    frame().to_csv(folder / "x.csv")
    pd.read_csv(folder / "x.csv").to_csv(folder / "x.csv")
    pd.read_csv(folder / "x.csv").to_csv(folder / "x.csv", index=False)
    return 1


def _by_r(folder):
    write(folder / "x.csv", [[n, *row] for n, row in enumerate(rows())], header="...1,a,b,label")
    return 1


@pytest.mark.parametrize(
    "make",
    [
        _index_as_csv,
        _index_as_parquet,
        _twice,
        *map(second, (_two_levels, _last_separator, _blank, _by_r)),
    ],
)
def test_a_column_without_a_name_is_no_feature(tmp_path, make):
    folder = tmp_path / "mine"
    folder.mkdir()
    place = make(folder)
    with pytest.raises(ScenarioError, match=rf"x\.\w+: column {place} has no name") as refused:
        read(folder)
    assert '[data] features = ["a", "b"]' in str(refused.value)
    assert read(folder, features=["a", "b"]).feature_shape == (2,)


@pytest.mark.parametrize(
    ("numbers", "span"),
    [
        (range(1, 21), "1 to 20"),
        (np.random.default_rng(0).permutation(20), "0 to 19"),
        (np.delete(np.arange(24), [3, 9, 10, 17]) + 20_000_000, "20000000 to 20000023"),
        ([f"{n}.0" for n in range(20)], "0 to 19"),
    ],
)
def test_a_column_that_numbers_the_rows_is_named(tmp_path, numbers, span):
    values = [[n, *row] for n, row in zip(numbers, rows(), strict=True)]
    file = write(tmp_path / "x.csv", values, header="id,a,b,label")
    _, said = read(file).said
    assert f"column 'id' numbers the rows ({span}" in said
    assert read(file, features=["id", "a"], target="label", target_type="classes").said == ()


@pytest.mark.parametrize(
    "numbers",
    [[n // 2 for n in range(20)], [n * n % 37 for n in range(20)], [n / 2 for n in range(20)]],
)
def test_other_whole_numbers_are_features_without_a_word(tmp_path, numbers):
    values = [[n, *row] for n, row in zip(numbers, rows(), strict=True)]
    assert len(read(write(tmp_path / "x.csv", values, header="age,a,b,label")).said) == 1


def test_what_was_chosen_is_said_with_the_keys_that_settle_it(tmp_path):
    file = write(tmp_path / "x.csv", rows())
    (said,) = read(file).said
    assert said == (
        "[data] read as features: a, b; target: label, 2 classes (0, 1) "
        "(set features, target, target_type to have it otherwise)"
    )
    (said,) = read(file, features=["a"], target="b").said
    assert said == "[data] read as target: b, numbers (set target_type to have it otherwise)"
    assert read(file, features=["a"], target="b", target_type="numbers").said == ()


def test_it_is_said_before_the_first_round(tmp_path, caplog):
    write(tmp_path / "patients.csv", [[n, *row] for n, row in enumerate(rows())], "id,a,b,label")
    (tmp_path / "scenario.toml").write_text(SCENARIO)
    scenario = fedsim.load_scenario(tmp_path / "scenario.toml")
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        fedsim.start(scenario, out=tmp_path / "run")
    assert [text for text in caplog.messages if re.search("features: id, a, b", text)]
    assert [text for text in caplog.messages if re.search("'id' numbers the rows", text)]


@pytest.mark.parametrize(
    "name",
    ["breast_cancer", *(second(n) for n in ("digits", "diabetes", "synthetic"))],
)
def test_bundled_data_say_nothing(tmp_path, name):
    partition = {"kind": "natural"} if name == "synthetic" else {"kind": "iid", "clients": 2}
    assert prepare({"name": name}, partition, seed=0, cache_dir=tmp_path).said == ()


def test_classes_and_owners_that_look_alike_are_named(tmp_path):
    answers = ["yes", "Yes ", "no", "NO"] * 5
    sites = ["Ulm", "ulm", "Köln", "Ko\u0308ln"] * 5
    values = [[*r[:2], *rest] for r, *rest in zip(rows(), answers, sites, strict=True)]
    file = write(tmp_path / "x.csv", values, header="a,b,label,site")
    _, classes, owners = read(file, {"kind": "natural"}, group="site").said
    assert "classes of column 'label': 'NO' and 'no', 'Yes ' and 'yes' differ in case" in classes
    assert "owners of column 'site': 'Ko\u0308ln' and 'Köln', 'Ulm' and 'ulm' differ" in owners
    assert len(read(file, features=["a"], target="label", target_type="classes").said) == 1


def test_whole_numbers_written_as_fractions_are_asked_about(tmp_path):
    values = [[a, b, float(label)] for a, b, label in rows()]
    file = write(tmp_path / "x.csv", values)
    with pytest.raises(ScenarioError, match=r"'label' holds whole .* \(0.0, 1.0\).*target_type"):
        read(file)
    classes = read(file, target_type="classes")
    assert (classes.num_classes, classes.manifest["data"]["label_names"]) == (2, ["0", "1"])
    assert read(file, target_type="numbers").num_classes == 0
    owners = read(file, {"kind": "natural"}, target="a", features=["b"], group="label")
    assert owners.manifest["owners"]["of_first_clients"] == ["0", "1"]


def test_numbers_that_are_written_otherwise_look_alike(tmp_path):
    values = [[*r[:2], ("1", "01", "1.0", "x")[n % 4]] for n, r in enumerate(rows())]
    said = read(write(tmp_path / "x.csv", values)).said
    assert any("'01' and '1' and '1.0' differ" in line for line in said)


# --- loaders ------------------------------------------------------------------------------------


def load(features):
    data = DataSet(features, frame()["label"], test_features=features, test_targets=[0, 1] * 10)
    return checked(data, "[data] name = 'mine:load'")


def test_a_table_of_a_loader_with_a_column_without_a_name_is_refused(tmp_path):
    frame().to_csv(tmp_path / "x.csv")
    again = pd.read_csv(tmp_path / "x.csv").drop(columns="label")
    with pytest.raises(ScenarioError, match=r"features has a column without a name, its 1\."):
        load(again)
    assert load(again.drop(columns="Unnamed: 0")).said == ()


def test_row_numbers_among_features_of_a_loader_are_named():
    table = frame()[["a", "b"]].reset_index()
    assert "column 'index' numbers the rows (0 to 19" in load(table).said[0]
    assert "column 0 of the loader numbers the rows (0 to 19" in load(table.to_numpy()).said[0]
    assert load(table.assign(index=table["index"] // 2)).said == ()
    large = table.assign(index=table["index"] + 2**30)  # the same in float32
    assert "(1073741824 to 1073741843" in load(large).said[0]


# --- images -------------------------------------------------------------------------------------


def photos(folder, modes, split="train"):
    for number, mode in enumerate(modes):
        place = folder / split / "uv"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").convert(mode).save(place / f"{number}.png")


@pytest.mark.parametrize("modes", [["L", "L", "RGB", "RGB", "L", "L"], ["RGB"] * 2 + ["L"] * 4])
def test_one_image_in_colour_makes_all_rgb_wherever_it_stands(tmp_path, modes):
    photos(tmp_path / "mine", modes)
    data = read(tmp_path / "mine")
    assert data.feature_shape == (3, 4, 4)
    assert "channels: rgb" in data.said[0]
    assert f"{modes.count('L')} images are grey among others in colour" in data.said[1]
    assert read(tmp_path / "mine", channels="grey").feature_shape == (1, 4, 4)


def test_held_out_images_in_colour_do_not_lose_it_silently(tmp_path):
    photos(tmp_path / "mine", ["L"] * 6)
    photos(tmp_path / "mine", ["L", "RGB"], split="test")
    with pytest.raises(ScenarioError, match=r"test/v/1.png: the image is in colour .* channels"):
        read(tmp_path / "mine")
    assert read(tmp_path / "mine", channels="rgb").feature_shape == (3, 4, 4)


def test_what_lies_behind_transparency_is_said(tmp_path):
    photos(tmp_path / "mine", ["RGBA", "RGB", "RGB", "RGB", "RGB", "RGBA"])
    assert "2 images are transparent in parts" in read(tmp_path / "mine").said[1]


def test_a_file_of_several_images_is_refused(tmp_path):
    photos(tmp_path / "mine", ["L"] * 4)
    pages = [Image.fromarray(np.full((4, 4), n, dtype=np.uint8)) for n in range(3)]
    pages[0].save(
        tmp_path / "mine" / "train" / "u" / "9.tif", save_all=True, append_images=pages[1:]
    )
    with pytest.raises(ScenarioError, match=r"9.tif: the file holds 3 images, expected one"):
        read(tmp_path / "mine")


# --- rows that are counted part by part, as where sites' files are put together -----------------


def parts(lengths, first=0):
    return [first + n for length in lengths for n in range(length)]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (parts([30, 50]), "0 to 49, begun 2 times"),
        (parts([20, 20, 200], first=1), "1 to 200, begun 3 times"),
        (parts([100]), "0 to 99, no value twice"),
    ],
)
def test_a_column_that_counts_the_rows_of_each_part_is_named(numbers, said, tmp_path):
    draw = np.random.default_rng(1)
    table = pd.DataFrame(
        {"id": numbers, "a": draw.normal(size=len(numbers)), "label": np.arange(len(numbers)) % 2}
    )
    table.to_csv(tmp_path / "x.csv", index=False)
    lines = [line for line in read(tmp_path / "x.csv").said if "numbers the rows" in line]
    assert len(lines) == 1
    assert f"column 'id' numbers the rows ({said})" in lines[0]
    features = table[["id", "a"]]
    data = DataSet(features, table["label"], test_features=features, test_targets=table["label"])
    assert f"column 'id' numbers the rows ({said})" in checked(data, "here").said[0]


@pytest.mark.parametrize(
    "numbers",
    [
        parts([12] * 40, first=1),  # months
        parts([24] * 300),  # hours
        parts([7] * 50),
        [n % 3 for n in range(200)],
        list(np.random.default_rng(0).integers(0, 90, 200)),
        [*parts([30]), *parts([30], first=5)],
    ],
)
def test_numbers_that_begin_again_for_other_reasons_are_features_without_a_word(numbers, tmp_path):
    draw = np.random.default_rng(1)
    table = pd.DataFrame({"n": numbers, "a": draw.normal(size=len(numbers))})
    table["label"] = np.arange(len(numbers)) % 2
    table.to_csv(tmp_path / "x.csv", index=False)
    assert not [line for line in read(tmp_path / "x.csv").said if "numbers the rows" in line]
