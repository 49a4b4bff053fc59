"""What `fedsim partition` says and draws of owners, of targets of numbers, of skewed features."""

import itertools

import numpy as np
import pytest
from PIL import Image

from fedsim.data.partitions.statistics import draw_partition, label_names, partition_statistics
from fedsim.data.preparation import prepare
from tests.data.partitions.test_division import hospitals, mine, numbers


@pytest.fixture
def build(tmp_path):
    def build(data, **partition):
        return prepare(data, partition, seed=0, cache_dir=tmp_path)

    return build


def test_tenths_of_targets_are_named_by_where_they_begin_and_end(build):
    data = build(mine(numbers), kind="iid", clients=4)
    statistics = partition_statistics(data)
    held = data.clients(range(4))
    targets = np.sort(held.targets[np.concatenate(held.rows)].reshape(-1))
    assert statistics["label_kind"] == "tenth"
    ends = [tuple(map(float, row["name"].split(" to "))) for row in statistics["labels"]]
    assert ends[0][0] == pytest.approx(targets[0], rel=1e-3)
    assert ends[-1][1] == pytest.approx(targets[-1], rel=1e-3)
    assert all(low <= high for low, high in ends)
    assert all(one[1] <= two[0] + 1e-3 for one, two in itertools.pairwise(ends))


def test_classes_have_the_data_sets_names_where_it_has_any(build):
    cancer = build({"name": "breast_cancer"}, kind="iid", clients=3)
    assert label_names(cancer, 3) == ["malignant", "benign"]
    assert label_names(build({"name": "digits"}, kind="iid", clients=3), 3)[9] == "9"


def test_owners_skew_and_dropped_samples_are_told(build):
    data = build(mine(hospitals), kind="natural", clients=3, feature_shift=0.5)
    statistics = partition_statistics(data)
    assert statistics["feature_skew"] == {"feature_shift": 0.5}
    assert statistics["owners"]["with_a_client"] == 3
    assert statistics["dropped"]["samples"] > 0
    plain = partition_statistics(build(mine(hospitals), kind="iid", clients=3))
    assert plain["feature_skew"] == {}
    assert plain["owners"] is None


def test_clients_of_whom_none_holds_a_sample_can_be_counted(build, tmp_path):
    path = tmp_path / "who.csv"
    path.write_text("client\n" + "10500\n" * 300)
    data = build(mine(numbers), kind="file", path=str(path))
    statistics = partition_statistics(data)  # of more than 10,000 clients the first are counted
    assert statistics["sizes"]["empty"] == statistics["counted"] == 1000
    assert statistics["samples"] == 0


@pytest.mark.parametrize(
    ("loader", "partition"),
    [
        (hospitals, {"kind": "natural"}),
        (hospitals, {"kind": "grouped", "clients": 2}),
        (numbers, {"kind": "dirichlet", "clients": 70, "rotation": 0.0}),
        (hospitals, {"kind": "flower:IidPartitioner", "clients": 4}),
    ],
)
def test_every_partition_can_be_drawn(build, tmp_path, loader, partition):
    draw_partition(build(mine(loader), **partition), tmp_path / "who.png")
    with Image.open(tmp_path / "who.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}
    # tenths have an order and so a sequential map; classes have colours that only differ
    assert ((31, 119, 180) in colors) == (loader is hospitals)
    assert ((68, 1, 84) in colors) == (loader is numbers)


def test_the_command_prints_all_that(build, tmp_path, monkeypatch):
    from fedsim.cli.partition import _partition_outcome
    from fedsim.scenario.load import load

    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    file = tmp_path / "mine.toml"
    file.write_text(
        '[data]\nname = "tests.data.partitions.test_division:hospitals"\n'
        '[partition]\nkind = "natural"\n'
        "clients = 3\nfeature_noise = 0.1\ntest_fraction = 0.2\n"
    )
    lines = "\n".join(_partition_outcome(load(file), None).lines)
    for words in (
        "owners were not drawn", "clients are", "feature_noise 0.1", "in local test splits",
        "3 of 5 have a client",
    ):  # fmt: skip
        assert words in lines
    file.write_text('[data]\nname = "diabetes"\n[partition]\nkind = "iid"\n')
    lines = "\n".join(_partition_outcome(load(file), None).lines)
    assert "tenth" in lines
    assert "classes" not in lines
