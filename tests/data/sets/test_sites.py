"""Data of sites, each in a file of its own: read apart, they are what they are together."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.data.federated import DataRecipe
from fedsim.data.preparation import prepare, reopen
from fedsim.data.reading.standardise import moments
from fedsim.data.sites.agreement import Agreement
from fedsim.data.sites.description import Description
from fedsim.data.sites.moments import FeatureMoments, moments_of
from fedsim.runs.own_sites import data_at_server, data_at_site, described
from tests.deployment.sites_apart import COLUMNS, rows_of, write

NATURAL = {"kind": "natural"}


def tables(folder, sizes=(14, 9, 23)):
    """A table per site in one folder."""
    for site, size in enumerate(sizes):
        write(folder / f"site_{site}.csv", *rows_of(site, size))
    return folder


def sites_of(folder, partition=NATURAL, seed=0, **keys):
    data = {"name": "sites", "sites": str(folder), "target": "outcome", **keys}
    return prepare(data, partition, seed=seed)


def everything(data, split="train"):
    """Each client's samples."""
    drawn = data.clients(range(data.num_clients), split=split)
    return [(drawn.features[rows], drawn.targets[rows]) for rows in drawn.rows]


# --- together, they are what the same files are as one data set -----------------------------------


@pytest.mark.parametrize("test_fraction", [0.0, 0.25])
def test_sites_are_the_clients_of_the_same_files_read_together(tmp_path, test_fraction):
    train = tables(tmp_path / "all" / "train")
    write(tmp_path / "all" / "test.csv", *rows_of(9, 12))
    pooled = prepare(
        {"name": "folder", "path": str(tmp_path / "all"), "target": "outcome", "group": "file"},
        NATURAL,
        seed=0,
    )
    partition = {**NATURAL, "test_fraction": test_fraction}
    own = sites_of(train, partition, test=str(tmp_path / "all" / "test.csv"))
    assert own.spec == pooled.spec
    if test_fraction:
        for (mine, _), (tested, _), (whole, _) in zip(
            everything(own), everything(own, "test"), everything(pooled), strict=True
        ):
            # standardised over what is trained on: other numbers, of as many samples
            assert len(mine) + len(tested) == len(whole)
            assert len(tested) == round(test_fraction * len(whole) + 1e-9)
        return
    assert own.sizes(range(3)).tolist() == pooled.sizes(range(3)).tolist()
    assert own.manifest["data"]["label_names"] == pooled.manifest["data"]["label_names"]
    for mine, other in zip(everything(own), everything(pooled), strict=True):
        np.testing.assert_allclose(mine[0], other[0], rtol=2e-7, atol=2e-7)
        np.testing.assert_array_equal(mine[1], other[1])
    np.testing.assert_allclose(own.test.features, pooled.test.features, rtol=2e-7, atol=2e-7)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    shape=st.sampled_from([(1,), (4,), (2, 3, 3)]),
    centre=st.floats(-1e4, 1e4),
    seed=st.integers(0, 2**31),
)
def test_moments_of_parts_are_those_of_the_whole(sizes, shape, centre, seed):
    draw = np.random.default_rng(seed)
    parts = [draw.normal(centre, 3, size=(n, *shape)).astype(np.float32) for n in sizes]
    whole = np.concatenate(parts)
    found = FeatureMoments.over([moments_of(part, np.arange(len(part))) for part in parts])
    axes = (0, 2, 3) if len(shape) == 3 else (0,)
    expected = whole.astype(np.float64)
    np.testing.assert_allclose(found.mean, expected.mean(axis=axes).reshape(-1), rtol=1e-12)
    spread = expected.var(axis=axes).reshape(-1) * found.number
    np.testing.assert_allclose(found.squares, spread, rtol=1e-6, atol=1e-6)
    mean, deviation = moments(whole, np.arange(len(whole)))
    np.testing.assert_allclose(found.rounded()["mean"], mean.reshape(-1), rtol=2e-7)
    np.testing.assert_allclose(found.rounded()["std"], deviation.reshape(-1), rtol=1e-6)


def test_moments_travel_as_text_without_losing_a_bit():
    found = moments_of(np.random.default_rng(0).normal(size=(50, 7)), np.arange(50))
    back = FeatureMoments.from_json(json.loads(json.dumps(found.to_json())))
    assert back.number == found.number
    np.testing.assert_array_equal(back.mean, found.mean)
    np.testing.assert_array_equal(back.squares, found.squares)


def test_a_feature_that_is_the_same_everywhere_becomes_zero(tmp_path):
    for site in range(2):
        values, outcomes = rows_of(site, 8)
        values[:, 1] = 5.5
        write(tmp_path / f"{site}.csv", values, outcomes)
    for features, _ in everything(sites_of(tmp_path)):
        assert (features[:, 1] == 0).all()
        assert np.isfinite(features).all()


# --- apart, a site has its own alone --------------------------------------------------------------


class Asked:
    """What of a scenario the data need."""

    def __init__(self, seed=0, partition=NATURAL, **data):
        self.seed, self.partition = seed, partition
        self.data = {"name": "sites", "target": "outcome", **data}


@pytest.mark.parametrize("test_fraction", [0.0, 0.3])
def test_a_site_has_its_own_samples_with_the_bits_that_they_have_together(tmp_path, test_fraction):
    folder = tables(tmp_path / "data")
    partition = {**NATURAL, "test_fraction": test_fraction}
    asked = Asked(partition=partition)
    files = [folder / f"site_{site}.csv" for site in range(3)]
    told = [json.loads(json.dumps(described(asked, str(f), n))) for n, f in enumerate(files)]
    server = data_at_server(asked, told)
    together = sites_of(folder, partition)
    agreed = json.loads(json.dumps(server.agreement.to_json()))
    assert Agreement.from_json(agreed) == together.agreement
    assert server.manifest == together.manifest | {"partition": server.manifest["partition"]}
    assert server.manifest_sha256 == together.manifest_sha256
    for site, file in enumerate(files):
        mine = data_at_site(asked, str(file), site, agreed)
        for split in ("train", "test"):
            ours, all_ = (d.clients([site], split=split) for d in (mine, together))
            for field in ("features", "targets"):
                here = getattr(ours, field)[ours.rows[0]]
                np.testing.assert_array_equal(here, getattr(all_, field)[all_.rows[0]])
        assert mine.sizes(range(3)).tolist() == together.sizes(range(3)).tolist()
        with pytest.raises(RunError, match="lie at its own site"):
            mine.clients([(site + 1) % 3])
    with pytest.raises(RunError, match="in this process lie none"):
        server.clients([0])
    assert [each.is_whole for each in (together, mine, server)] == [True, False, False]


def test_what_stands_in_for_samples_is_the_same_for_all_and_none_of_theirs(tmp_path):
    folder = tables(tmp_path / "data")
    told = [described(Asked(), str(folder / f"site_{n}.csv"), n) for n in range(3)]
    server, together = data_at_server(Asked(), told), sites_of(folder)
    real = everything(together)
    for one, other, (features, _) in zip(
        everything(server.to_try), everything(together.to_try), real, strict=True
    ):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
        assert (one[0].shape, one[0].dtype) == (features.shape, features.dtype)
        assert not np.isin(one[0], features).any()


def test_sites_that_were_pickled_open_the_same_samples(tmp_path):
    data = sites_of(tables(tmp_path / "data"))
    again = pickle.loads(pickle.dumps(data))
    assert again.manifest_sha256 == data.manifest_sha256
    for one, other in zip(everything(data), everything(again), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
    recipe = data.recipe
    values, outcomes = rows_of(50, 9)
    write(tmp_path / "data" / "site_1.csv", values, outcomes)
    fields = tuple(getattr(recipe, n) for n in DataRecipe._fields if n != "reopen")
    with pytest.raises(RunError, match="differ from those of the process"):
        reopen(fields, data.manifest_sha256)


# --- kinds of data --------------------------------------------------------------------------------


def test_whole_numbers_are_classes_over_all_sites_though_no_site_has_them_all(tmp_path):
    for site, classes in enumerate(([0, 1], [2, 3], [0, 3])):
        values, _ = rows_of(site, 10)
        write(tmp_path / f"{site}.csv", values, np.resize(classes, 10))
    assert sites_of(tmp_path).spec.num_classes == 4


def test_classes_that_no_site_has_are_asked_about(tmp_path):
    for site, classes in enumerate(([0, 1], [5, 6])):
        write(tmp_path / f"{site}.csv", rows_of(site, 10)[0], np.resize(classes, 10))
    with pytest.raises(ScenarioError, match=r"no sample of class 2 .* at all sites together"):
        sites_of(tmp_path)
    assert sites_of(tmp_path, target_type="classes").spec.num_classes == 4


def test_amounts_at_one_site_are_amounts_at_all(tmp_path):
    write(tmp_path / "a.csv", rows_of(0, 8)[0], np.arange(8))
    write(tmp_path / "b.csv", rows_of(1, 8)[0], np.arange(8) + 0.5)
    data = sites_of(tmp_path)
    assert data.spec.num_classes == 0
    assert everything(data)[0][1].tolist() == list(range(8))


def test_amounts_are_standardised_over_all_sites_also_where_they_are_whole_at_one(tmp_path):
    write(tmp_path / "a.csv", rows_of(0, 8)[0], np.arange(8))
    write(tmp_path / "b.csv", rows_of(1, 8)[0], np.arange(8) + 0.5)
    found = [targets for _, targets in everything(sites_of(tmp_path, standardise_target=True))]
    whole = np.concatenate([np.arange(8.0), np.arange(8) + 0.5])
    expected = (whole - whole.mean()) / whole.std()
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-6)


def test_truth_values_and_one_class_at_a_site(tmp_path):
    write(tmp_path / "a.csv", rows_of(0, 6)[0], ["True"] * 6)
    write(tmp_path / "b.csv", rows_of(1, 6)[0], ["False"] * 6)
    data = sites_of(tmp_path)
    assert data.manifest["data"]["label_names"] == ["false", "true"]
    assert [set(targets.tolist()) for _, targets in everything(data)] == [{1}, {0}]


def test_a_class_alone_at_all_sites_is_refused(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.csv", rows_of(0, 6)[0], ["well"] * 6)
    with pytest.raises(ScenarioError, match="'well' alone at all 2 sites"):
        sites_of(tmp_path)


def test_listed_classes_are_numbered_in_the_order_of_the_list(tmp_path):
    folder = tables(tmp_path / "data")
    names = ["sick", "unknown", "healthy"]
    data = sites_of(folder, labels=names)
    assert data.manifest["data"]["label_names"] == names
    assert data.spec.num_classes == 3
    sick = [set(rows_of(site, size)[1]) for site, size in enumerate((14, 9, 23))]
    assert all({"sick", "healthy"} == each for each in sick)
    assert set(np.concatenate([targets for _, targets in everything(data)]).tolist()) == {0, 2}


def test_pictures_of_sites_lie_in_folders_of_their_classes(tmp_path):
    from PIL import Image

    draw = np.random.default_rng(0)
    for site in range(2):
        for name in ("cat", "dog")[: 2 - site]:
            for number in range(3):
                place = tmp_path / f"site_{site}" / name / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, 255, (4, 4), dtype=np.uint8)).save(place)
    data = prepare({"name": "sites", "sites": str(tmp_path / "site_*")}, NATURAL, seed=0)
    assert data.spec.feature_shape == (1, 4, 4)
    assert data.manifest["data"]["label_names"] == ["cat", "dog"]
    assert [len(targets) for _, targets in everything(data)] == [6, 3]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("partition", "expected"),
    [
        ({"kind": "iid"}, "sites have their own samples already; use 'natural'"),
        ({"kind": "natural", "clients": 2}, r"clients = 2: .* finds 3; say 3"),
        ({"kind": "natural", "label_noise": 0.1}, "label_noise .* taken as they are"),
        ({"kind": "natural", "feature_shift": 1.0}, "feature_shift .* taken as they are"),
        ({"kind": "natural", "rotation": 30.0}, "rotation .* taken as they are"),
    ],
)
def test_a_division_of_what_is_divided_is_refused(partition, expected, tmp_path):
    folder = tables(tmp_path / "data")
    with pytest.raises(ScenarioError, match=expected):
        sites_of(folder, partition)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("nowhere/*.csv", "finds no file and no folder"),
        ("site_0.csv", "is one file, and every site has one"),
        ("site_0*", "finds one site alone"),
        ("*", r"finds files and folders \(beside\)"),
    ],
)
def test_a_pattern_that_finds_no_sites_is_refused(pattern, expected, tmp_path):
    tables(tmp_path)
    (tmp_path / "beside").mkdir()
    with pytest.raises(ScenarioError, match=expected):
        sites_of(tmp_path / pattern)


def test_a_simulation_needs_to_know_where_the_sites_are():
    with pytest.raises(ScenarioError, match="sites is missing: a simulation needs to know"):
        prepare({"name": "sites", "target": "outcome"}, NATURAL, seed=0)


@pytest.mark.parametrize("labels", [["sick"], ["sick", "sick"]])
def test_a_list_of_classes_names_two_or_more_each_once(labels, tmp_path):
    with pytest.raises(ScenarioError, match="two classes or more, each once"):
        sites_of(tables(tmp_path), labels=labels)


def test_the_server_s_test_set_has_the_columns_and_classes_of_the_sites(tmp_path):
    folder = tables(tmp_path / "data")
    values, outcomes = rows_of(9, 8)
    test = tmp_path / "test.csv"
    write(test, values[:, :2], outcomes, COLUMNS[:2])
    with pytest.raises(ScenarioError, match=r"test = .*lacks the column 'sugar', which sites have"):
        sites_of(folder, test=str(test))
    write(tmp_path / "amounts" / "a.csv", values, np.arange(8) + 0.5)
    write(tmp_path / "amounts" / "b.csv", values, np.arange(8) + 0.25)
    write(test, values, outcomes)
    with pytest.raises(ScenarioError, match=r"test = .*column 'outcome' holds text"):
        sites_of(tmp_path / "amounts", test=str(test))
    write(test, values, ["dead", *outcomes[1:]])
    with pytest.raises(ScenarioError, match=r"test = .*holds 'dead', which is none of the classes"):
        sites_of(folder, test=str(test))


# --- what a site says may be anything -------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tables(tmp_path_factory.mktemp("data"))
    return [described(Asked(), str(folder / f"site_{n}.csv"), n) for n in range(3)]


NONSENSE = [
    {"train": -1}, {"train": 1.5}, {"train": True}, {"train": 10**18}, {"train": "9"}, {"test": -3},
    {"sha256": 7}, {"sha256": "0"}, {"features": []}, {"features": [1, 2]}, {"features": None},
    {"shape": [10**6, 10**6]}, {"shape": [-3]}, {"labels": [1, "a"]}, {"labels": [[]]},
    {"labels": [1.5]}, {"labels": [1, 2]}, {"labels": [True]}, {"labels": list(range(20_000))},
    {"moments": {"features": {}}},
    {"moments": {"features": {"number": 5, "mean": [1.0], "squares": [1.0]}}},
    {"moments": {"features": {"number": 0, "mean": [0.0] * 3, "squares": [0.0] * 3}}},
    {"moments": {"features": {"number": 9, "mean": [float("nan")] * 3, "squares": [0.0] * 3}}},
    {"moments": {"features": {"number": 9, "mean": [0.0] * 3, "squares": [-1.0] * 3}}},
    {"moments": {"else": {"number": 9, "mean": [0.0], "squares": [1.0]}}},
    {"moments": 3}, {"preprocessing": 3}, {"kind": 3}, {"more": 1},
]  # fmt: skip


@pytest.mark.parametrize("nonsense", NONSENSE, ids=str)
def test_nonsense_of_a_site_is_named_as_its(nonsense, said):
    told = [said[0], {**said[1], **nonsense}, said[2]]
    with pytest.raises(ScenarioError, match="the site of partition 1") as error:
        data_at_server(Asked(), told)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", [n for n in Description.__dataclass_fields__ if n != "said"])
def test_what_a_site_does_not_say_is_named_as_its(name, said):
    told = {key: value for key, value in said[1].items() if key != name}
    with pytest.raises(ScenarioError, match="partition 1 says nothing of its data"):
        data_at_server(Asked(), [said[0], told, said[2]])


def test_sums_are_told_where_they_are_asked_for_alone(tmp_path):
    folder = tables(tmp_path / "data")
    file = str(folder / "site_0.csv")
    assert described(Asked(), file, 0)["moments"].keys() == {"features"}
    assert described(Asked(standardise=False), file, 0)["moments"] == {}
    assert described(Asked(labels=["healthy", "sick"]), file, 0)["labels"] == ()
    write(tmp_path / "amounts.csv", rows_of(0, 8)[0], np.arange(8) + 0.5)
    amounts = Asked(standardise=False, standardise_target=True)
    told = described(amounts, str(tmp_path / "amounts.csv"), 0)
    assert told["moments"].keys() == {"targets"}
