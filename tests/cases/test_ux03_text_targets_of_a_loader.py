"""Targets of a loader are read as those of a file are: text and truth values are classes."""

import numpy as np
import pandas as pd
import pytest
import torch

from fedsim.basics.errors import ScenarioError
from fedsim.data.sets.user import DataSet, checked

NAMES = ["no", "yes", "maybe", "no", "yes", "maybe"]
FEATURES = np.random.default_rng(0).normal(size=(6, 2))


def read(targets, **fields):
    return checked(DataSet(FEATURES, targets, **fields), "[data] name = 'mine:load'")


def numbers_and_names(loaded):
    return loaded.train.targets.tolist(), loaded.notes.get("label_names")


@pytest.mark.parametrize(
    "targets",
    [
        np.array(NAMES),
        np.array(NAMES, dtype="S"),
        np.array(NAMES, dtype=object),
        np.array(NAMES, dtype=np.dtypes.StringDType()),
        NAMES,
        tuple(NAMES),
        pd.Series(NAMES),
        pd.Series(NAMES, dtype="string", index=[5, 4, 3, 2, 1, 0]),
        pd.Series(NAMES, dtype="category"),
        pd.Categorical(NAMES),
        pd.CategoricalIndex(NAMES),
        pd.DataFrame({"label": NAMES})["label"],
    ],
)
def test_text_is_classes_in_sorted_order_with_their_names(targets):
    loaded = read(targets)
    assert numbers_and_names(loaded) == ([1, 2, 0, 1, 2, 0], ["maybe", "no", "yes"])
    assert loaded.spec.num_classes == 3
    assert loaded.train.targets.dtype == np.int64


def test_a_categorical_keeps_its_order_and_its_classes_without_samples():
    loaded = read(pd.Categorical(NAMES, categories=["no", "maybe", "yes", "never"]))
    assert numbers_and_names(loaded) == (
        [0, 2, 1, 0, 2, 1],
        ["no", "maybe", "yes", "never"],
    )
    assert loaded.spec.num_classes == 4
    binned = read(pd.cut(pd.Series([1, 5, 9, 1, 5, 9]), 3))
    assert binned.spec.num_classes == 3


@pytest.mark.parametrize(
    "targets",
    [
        [True, False, True, True, False, True],
        np.array([1, 0, 1, 1, 0, 1], dtype=bool),
        torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool),
        pd.Series([True, False, True, True, False, True], dtype="boolean"),
        np.array([True, False, True, True, False, True], dtype=object),
    ],
)
def test_truth_values_are_two_classes(targets):
    assert numbers_and_names(read(targets)) == ([1, 0, 1, 1, 0, 1], ["false", "true"])


@pytest.mark.parametrize(
    "targets",
    [
        pd.Series([0, 1, 2, 0, 1, 2], dtype="Int64"),
        np.array([0, 1, 2, 0, 1, 2], dtype=object),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8),
    ],
)
def test_whole_numbers_stay_the_classes_that_they_are(targets):
    assert numbers_and_names(read(targets)) == ([0, 1, 2, 0, 1, 2], None)


@pytest.mark.parametrize("kind", [np.array, pd.Series, pd.Categorical])
def test_held_out_text_has_the_numbers_of_the_same_names(kind):
    loaded = read(kind(NAMES), test_features=FEATURES[:2], test_targets=["yes", "maybe"])
    assert loaded.test.targets.tolist() == [2, 0]
    seen_held_out_alone = read(
        np.array(NAMES), test_features=FEATURES[:2], test_targets=["yes", "never"]
    )
    assert seen_held_out_alone.spec.num_classes == 4


def test_columns_of_numbers_and_truth_values_are_features():
    frame = pd.DataFrame({"a": [0.5, 1, 2, 3, 4, 5], "b": [True, False] * 3})
    loaded = checked(DataSet(frame, NAMES, groups=pd.Series(NAMES, dtype="category")), "x")
    assert loaded.train.features[:2].tolist() == [[0.5, 1], [1, 0]]
    assert loaded.group_names == ("maybe", "no", "yes")


def test_floats_that_are_whole_are_amounts_and_said_to_be():
    (said,) = read([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).said
    assert "whole numbers as floats and are learnt as amounts" in said
    assert read([0.5, 1.0, 0.0, 1.0, 0.0, 1.0]).said == ()


def test_classes_and_owners_that_look_alike_are_named():
    owners = ["Ulm", "Ulm ", "Bern", "Ulm", "Bern", "Bern"]
    classes, groups = read(["no", "No", "yes"] * 2, groups=owners).said
    assert "'No' and 'no' differ in case" in classes
    assert "'Ulm' and 'Ulm ' differ" in groups


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["no", None, "yes", "no", "yes", "no"], r"targets\[1\] is missing"),
        (pd.Categorical(["no", None, *NAMES[2:]]), r"targets\[1\] is missing"),
        (pd.Series([1, None, 0, 1, 0, 1], dtype="Int64"), r"targets\[1\] is missing"),
        (["no", "yes", 3, "no", "yes", "no"], r"targets\[2\] is 3, and those before are text"),
        (["no"] * 6, r"targets holds 'no' alone, expected at least two classes"),
        ([True] * 6, r"targets holds 'true' alone, expected at least two classes"),
        (np.array(NAMES)[:, None], r"targets has shape \(6, 1\), expected one class per sample"),
        (
            pd.to_datetime(pd.Series(["2020-01-01"] * 6)),
            r"targets holds datetime64.*, expected classes \(whole numbers, text or truth values\)"
            r" or amounts \(floats\)",
        ),
        ([1 + 2j] * 6, r"targets holds complex128, expected classes .* or amounts \(floats\)"),
        ([{}] * 6, r"targets holds object.*, expected classes .* or amounts \(floats\)"),
    ],
)
def test_what_stays_refused_says_what_is_allowed(targets, message):
    with pytest.raises(ScenarioError, match=message):
        read(targets)


@pytest.mark.parametrize(
    ("targets", "tested", "message"),
    [
        (NAMES, [0, 1], r"test_targets holds whole numbers, and the targets to train on are text"),
        ([0, 1] * 3, [0.5, 1.5], r"test_targets holds floats, .* are whole numbers"),
        (pd.Categorical(NAMES), ["no", "never"], r"test_targets\[1\] is 'never', which is no clas"),
    ],
)
def test_held_out_targets_of_another_kind_are_refused_in_their_own_name(targets, tested, message):
    with pytest.raises(ScenarioError, match=message):
        read(targets, test_features=FEATURES[:2], test_targets=tested)


def test_names_and_num_classes_must_agree():
    with pytest.raises(ScenarioError, match=r"names 3 classes, and num_classes is 4; leave it out"):
        read(NAMES, num_classes=4)
    assert read(NAMES, num_classes=3).spec.num_classes == 3


@pytest.mark.parametrize("groups", [[0, "0"] * 3, (0, "0", 1) * 2, [True, "True"] * 3])
def test_owners_that_numpy_would_make_one_text_are_refused(groups):
    with pytest.raises(ScenarioError, match=r"groups\[1\] is '.*', and those before are"):
        read(NAMES, groups=groups)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["1_000", *"12345"], r"features\[0\] is '1_000' in column 'a', a text; write it without"),
        (
            [1, 2, 3, "?", 5, 6],
            r"features\[3\] is '\?' in column 'a', a text; if it stands for a mi",
        ),
        ([*"123456"], r"features\[0\] is '1' in column 'a', a text; make it of numbers \(astype"),
        (pd.Categorical([*"xyxyxy"]), r"features\[0\] is 'x' in column 'a', a text; correct it"),
        (pd.date_range("2020", periods=6), r"features holds dates or times in column 'a'; make nu"),
    ],
)
def test_a_table_s_column_that_holds_no_numbers_is_named(column, message):
    features = pd.DataFrame({"b": range(6), "a": column})
    with pytest.raises(ScenarioError, match=message):
        checked(DataSet(features, NAMES), "[data] name = 'mine:load'")


LEVELS = pd.MultiIndex.from_product([range(3), ["x", "y"]])


@pytest.mark.parametrize("field", ["features", "targets", "groups", "test_targets"])
def test_an_index_of_several_levels_is_no_column_and_says_so(field):
    given = {"features": FEATURES, "targets": [0, 1] * 3, field: LEVELS}
    if field == "test_targets":
        given["test_features"] = FEATURES
    with pytest.raises(
        ScenarioError, match=rf"{field} is a MultiIndex of 2 levels.*get_level_values"
    ):
        checked(DataSet(**given), "[data] name = 'mine:load'")


def table(columns):
    return pd.DataFrame([[0.5, 1.0], [0.25, 2.0]] * 3, columns=columns)


@pytest.mark.parametrize(
    "features",
    [
        table(["a", "b"]).set_index(LEVELS),
        table(pd.MultiIndex.from_tuples([("u", "a"), ("u", "b")])),
        table(["a", "a"]),
        table(pd.CategoricalIndex(["a", "a"])),
    ],
)
def test_a_table_counts_by_its_values_however_rows_and_columns_are_called(features):
    found = checked(DataSet(features, [0, 1] * 3), "[data] name = 'mine:load'")
    assert found.train.features.tolist() == table(["a", "b"]).to_numpy().tolist()


def test_a_column_that_no_row_of_the_heading_names_is_refused():
    names = [("Unnamed: 0_level_0", "Unnamed: 0_level_1"), ("u", "b")]
    with pytest.raises(ScenarioError, match=r"features has a column without a name, its 1\."):
        checked(
            DataSet(table(pd.MultiIndex.from_tuples(names)), [0, 1] * 3), "[data] name = 'mine:l'"
        )
