"""Well-known data sets, read from tiny files with their real columns and types."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.data.reading.characters import CHARACTERS, UNKNOWN
from tests.basics.processes import QUICKLY
from tests.data.tables import IID, load, pictures, png, write

ROOT = Path(__file__).resolve().parents[3]
TEST_DATA = Path(os.environ.get("FEDSIM_TEST_DATA") or ROOT.parent / "shared" / "data")

DIGITS = [str(digit) for digit in range(10)]
CLOTHES = [
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
    "Bag", "Ankle boot",
]  # fmt: skip
ANIMALS = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
LETTERS = [*DIGITS, *map(chr, range(65, 91)), *map(chr, range(97, 123))]


def write_mnist(folder, labels=DIGITS):
    types = {"image": "image", "label": labels}
    for name, seed, count in (
        ("train-00000-of-00002", 0, 25), ("train-00001-of-00002", 1, 15),
        ("test-00000-of-00001", 2, 10),
    ):  # fmt: skip
        columns = {"image": pictures(count, seed), "label": np.arange(count) % 10}
        write(folder / f"{name}.parquet", columns, types)


def write_cifar(folder, types):
    for split, seed, count in (("train", 0, 12), ("test", 1, 6)):
        columns = {"img": pictures(count, seed, (32, 32, 3))}
        for name, kind in list(types.items())[1:]:
            columns[name] = np.arange(count) % len(kind)
        write(folder / f"{split}-00000-of-00001.parquet", columns, types)


def write_femnist(folder):
    columns = {
        "image": pictures(30, 0),
        "writer_id": [f"f{n % 3:04}_14" for n in range(30)],
        "hsf_id": [n % 8 for n in range(30)],
        "character": [n % 6 + 55 for n in range(30)],
    }
    types = {"image": "image", "writer_id": "string", "hsf_id": "int64", "character": LETTERS}
    write(folder / "train-00000-of-00001.parquet", columns, types)


TEXT = "".join(np.random.default_rng(0).choice([*CHARACTERS, "~", "#", "é"], 400))


def write_shakespeare(folder, rows=((0, 200), (1, 40))):
    roles = [role for role, count in rows for _ in range(count)]
    starts = [start for _, count in rows for start in range(count)]
    columns = {
        "character_id": [f"PLAY_{'AB'[role]}" for role in roles],
        "x": [TEXT[start : start + 80] for start in starts],
        "y": [TEXT[start + 80] for start in starts],
    }
    write(
        folder / "train-00000-of-00001.parquet",
        columns,
        {"character_id": "string", "x": "string", "y": "string"},
    )
    return columns


@pytest.fixture
def mnist_folder(tmp_path):
    write_mnist(tmp_path / "mnist")
    return tmp_path / "mnist"


def _mnist(folder, cache_dir, partition=IID):
    return load(cache_dir, partition, name="mnist", path=str(folder))


def _normalised(images, mean, std):
    scaled = images.astype(np.float64) / 255
    channels_first = scaled[:, None] if scaled.ndim == 3 else scaled.transpose(0, 3, 1, 2)
    return (channels_first - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))


# --- what each is made of ----------------------------------------------------------------------


def test_mnist_is_decoded_scaled_and_normalised(mnist_folder, tmp_path):
    data = _mnist(mnist_folder, tmp_path / "cache")
    pool = data.clients([0])
    images = np.concatenate([pictures(25, 0), pictures(15, 1)])
    assert pool.features.dtype == np.float32
    np.testing.assert_allclose(
        pool.features, _normalised(images, 0.1307, 0.3081), rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(pool.targets, [*(np.arange(25) % 10), *(np.arange(15) % 10)])
    assert data.spec == ((1, 28, 28), 10, (), 0)
    assert data.sizes([0, 1, 2, 3]).tolist() == [10] * 4
    np.testing.assert_allclose(
        data.test.features, _normalised(pictures(10, 2), 0.1307, 0.3081), rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(data.test.targets, np.arange(10))
    assert data.manifest["held_out"]["drawn"] == "official test split"


def test_fashion_mnist_has_constants_and_names_of_its_own(tmp_path):
    write_mnist(tmp_path / "f", CLOTHES)
    data = load(tmp_path / "cache", name="fashion_mnist", path=str(tmp_path / "f"))
    images = np.concatenate([pictures(25, 0), pictures(15, 1)])
    np.testing.assert_allclose(
        data.clients([0]).features, _normalised(images, 0.2860, 0.3530), rtol=0, atol=1e-6
    )
    assert data.manifest["data"]["label_names"] == CLOTHES


def test_cifar10_has_three_channels(tmp_path):
    write_cifar(tmp_path / "c", {"img": "image", "label": ANIMALS})
    data = load(tmp_path / "cache", name="cifar10", path=str(tmp_path / "c"))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    for found, seed, count in ((data.clients([0]), 0, 12), (data.test, 1, 6)):
        expected = _normalised(pictures(count, seed, (32, 32, 3)), mean, std)
        np.testing.assert_allclose(found.features, expected, rtol=0, atol=1e-5)
    assert data.spec == ((3, 32, 32), 10, (), 0)
    with pytest.raises(
        ScenarioError, match=r"features: 'image' is not a column .*; did you mean 'img'\?"
    ):
        load(tmp_path / "cache", name="cifar10", path=str(tmp_path / "c"), image="image")


def test_cifar100_has_fine_and_coarse_labels(tmp_path):
    fine, coarse = [f"fine {n}" for n in range(100)], [f"coarse {n}" for n in range(20)]
    types = {"img": "image", "fine_label": fine, "coarse_label": coarse}
    write_cifar(tmp_path / "c", types)
    made = [
        load(tmp_path / "cache", name="cifar100", path=str(tmp_path / "c"), **choice)
        for choice in ({}, {"labels": "coarse"})
    ]
    assert [data.num_classes for data in made] == [100, 20]
    assert made[0].manifest["data"]["columns"]["target"] == "fine_label"
    assert made[1].manifest["data"]["label_names"] == coarse


def test_femnists_writers_are_its_natural_owners(tmp_path):
    write_femnist(tmp_path / "f")
    data = load(
        tmp_path / "cache", {"kind": "natural"}, name="femnist", path=str(tmp_path / "f"),
        test_fraction=0.2,
    )  # fmt: skip
    assert data.spec == ((1, 28, 28), 62, (), 0)
    pool = data.clients([0, 1, 2])
    np.testing.assert_allclose(
        pool.features, pictures(30, 0)[:, None].astype(np.float64) / 255, rtol=0, atol=1e-6
    )
    assert [set(rows % 3) for rows in pool.rows] == [{0}, {1}, {2}]
    assert sum(map(len, pool.rows)) == 24
    # one of each of the five characters of six samples, and one more of the sixth
    assert np.bincount(data.test.targets)[55:].tolist() == [1] * 6
    assert data.manifest["owners"]["of_first_clients"] == ["f0000_14", "f0001_14", "f0002_14"]


def test_shakespeare_is_characters_of_leafs_vocabulary(tmp_path):
    columns = write_shakespeare(tmp_path / "s")
    data = load(tmp_path / "cache", name="shakespeare", path=str(tmp_path / "s"))
    assert data.spec == ((80,), 81, (), 81)
    assert len(CHARACTERS) == len(set(CHARACTERS)) == UNKNOWN == 80
    pool = data.clients([0])
    assert pool.features.dtype == np.int64
    np.testing.assert_array_equal(pool.features[:100], _windows(TEXT)[:100])
    following = [CHARACTERS.find(c) % 81 for c in columns["y"]]  # -1 % 81 is 80
    np.testing.assert_array_equal(pool.targets, [*following[:100], *following[200:]])
    assert data.manifest["data"]["vocabulary"] == 81
    unknown = sum(x.count(c) for x in columns["x"] for c in "~#é")
    assert data.manifest["data"]["unknown_characters"] == unknown


def test_no_held_out_text_of_a_role_is_in_what_is_trained_on(tmp_path):
    write_shakespeare(tmp_path / "s")
    natural = {"kind": "natural"}
    data = load(tmp_path / "c", natural, name="shakespeare", path=str(tmp_path / "s"))
    # role A: 200 windows, the last 20 held out, the 80 before them left out; B has too little text
    assert data.sizes([0, 1]).tolist() == [100, 40]
    assert len(data.test.targets) == 20
    assert data.manifest["data"]["left_out"]["samples"] == 80
    windows = _windows(TEXT)
    np.testing.assert_array_equal(data.clients([0]).features[:100], windows[:100])
    # the first held-out text begins after the last target that is trained on
    np.testing.assert_array_equal(data.test.features, windows[180:200])
    assert data.manifest["held_out"]["drawn"] == "the end of each owner's text"


def _windows(text):
    tokens = [CHARACTERS.index(c) if c in CHARACTERS else UNKNOWN for c in text]
    return np.lib.stride_tricks.sliding_window_view(tokens, 80)


def test_shakespeare_reads_the_hubs_csv_too(tmp_path):
    columns = write_shakespeare(tmp_path / "s", rows=((0, 130), (1, 110)))
    datasets.Dataset.from_dict(columns).to_csv(tmp_path / "csv" / "shakespeare.csv")
    read = [
        load(tmp_path / "cache", name="shakespeare", path=str(tmp_path / folder))
        for folder in ("s", "csv")
    ]
    np.testing.assert_array_equal(read[0].test.features, read[1].test.features)
    assert read[0].manifest["sha256"] == read[1].manifest["sha256"]


# --- folders ------------------------------------------------------------------------------------


def _refuse(*_, **__):
    raise AssertionError("read again")


def test_images_are_decoded_once_and_shared_by_all_partitions(mnist_folder, tmp_path, monkeypatch):
    first = _mnist(mnist_folder, tmp_path / "cache")
    monkeypatch.setattr("datasets.load_dataset", _refuse)
    second = _mnist(mnist_folder, tmp_path / "cache", {"kind": "iid", "clients": 5})
    assert second.num_clients == 5
    np.testing.assert_array_equal(first.clients([0]).features, second.clients([0]).features)
    assert len(list((tmp_path / "cache").glob("data/*/index.json"))) == 1


def test_a_changed_file_is_read_again(mnist_folder, tmp_path):
    before = _mnist(mnist_folder, tmp_path / "cache")
    columns = {"image": pictures(10, 3), "label": np.arange(10)}
    write(
        mnist_folder / "test-00000-of-00001.parquet", columns, {"image": "image", "label": DIGITS}
    )
    after = _mnist(mnist_folder, tmp_path / "cache")
    assert before.manifest_sha256 != after.manifest_sha256


def test_the_manifest_says_what_was_read_and_names_no_folder(mnist_folder, tmp_path):
    manifest = _mnist(mnist_folder, tmp_path / "cache").manifest
    assert manifest["data"]["files"] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "test-00000-of-00001.parquet",
    ]
    assert manifest["data"]["columns"] == {"features": ["image"], "target": "label"}
    assert manifest["data"]["label_names"] == DIGITS
    assert manifest["data"]["preprocessing"] == {
        "scaled_to": [0, 1], "channels": "grey", "mean": [0.1307], "std": [0.3081],
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_relative_path_means_the_same_folder_in_another_process(
    mnist_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = _mnist("mnist", tmp_path / "cache")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{QUICKLY}import pickle, sys; print(pickle.load(sys.stdin.buffer).test[1])",
        ],
        input=pickle.dumps(data),
        capture_output=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.stdout.decode() == f"{data.test[1]}\n", done.stderr.decode()


def test_no_script_in_a_data_folder_is_run(mnist_folder, tmp_path):
    trap = tmp_path / "trap"
    for name in ("mnist.py", "dataset.py", f"{mnist_folder.name}.py", "__init__.py"):
        (mnist_folder / name).write_text(f"open({str(trap)!r}, 'w')\n")
    _mnist(mnist_folder, tmp_path / "cache")
    assert not trap.exists()


def test_a_missing_folder_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ScenarioError, match=r"no such folder or file; give the .* leave path out"):
        _mnist(tmp_path / "nowhere", tmp_path / "cache")


def test_a_folder_above_the_right_one_is_refused_with_the_right_one(mnist_folder, tmp_path):
    with pytest.raises(ScenarioError, match=rf"to train on.*; did you mean '{mnist_folder}'\?$"):
        _mnist(tmp_path, tmp_path / "cache")


def test_a_folder_without_a_test_split_is_refused(mnist_folder, tmp_path):
    (mnist_folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ScenarioError, match=r"holds no parquet files of the split 'test'"):
        _mnist(mnist_folder, tmp_path / "cache")


SECOND = "train-00001-of-00002.parquet"
TYPES = {"image": "image", "label": "int64"}


def _other_column(folder):
    for path in folder.glob("*.parquet"):
        write(
            path, {"image": pictures(2, 0), "labels": [0, 1]}, {"image": "image", "labels": "int64"}
        )


def _rewritten(folder, images, labels):
    for path in folder.glob("*.parquet"):
        write(path, {"image": pictures(2, 0), "label": [0, 1]}, TYPES)
    datasets.Dataset.from_dict(
        {"image": [i and {"bytes": i, "path": None} for i in images], "label": labels},
        datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    ).to_parquet(folder / SECOND)


def _other_size(folder):
    _rewritten(folder, [png(p) for p in pictures(3, 0, (8, 8))], [0, 1, 2])


def _other_label(folder):
    _rewritten(folder, [png(p) for p in pictures(3, 0)], [0, 1, 10])


def _no_image(folder):
    _rewritten(folder, [png(pictures(1, 0)[0]), None], [0, 1])


def _torn_image(folder):
    _rewritten(folder, [png(pictures(1, 0)[0]), b"not a PNG"], [0, 1])


def _cut_image(folder):
    whole = png(pictures(1, 0)[0])
    _rewritten(folder, [whole, whole[:-300]], [0, 1])


def _torn_file(folder):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _other_column,
            r"target: 'label' is not a column .*; did you mean 'labels'\?",
        ),
        (_other_size, rf"{SECOND}, row 0: the image is 8x8, expected 28x28"),
        (_other_label, rf"{SECOND}, row 2, column 'label' is 10, expected classes from 0 to 9"),
        (_no_image, rf"{SECOND}, row 1: the image is missing"),
        (_torn_image, rf"{SECOND}, row 1: the image cannot be decoded: it is in no known format"),
        (_cut_image, rf"{SECOND}, row 1: the image cannot be decoded"),
        (_torn_file, rf"{SECOND} cannot be read"),
    ],
)
def test_damaged_files_are_refused_with_the_place(mnist_folder, tmp_path, damage, message):
    damage(mnist_folder)
    with pytest.raises(ScenarioError, match=message):
        _mnist(mnist_folder, tmp_path / "cache")


# --- the Hub ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repository", "write_files"),
    [
        ("mnist", "ylecun/mnist", write_mnist),
        ("fashion_mnist", "zalando-datasets/fashion_mnist", write_mnist),
        ("femnist", "flwrlabs/femnist", write_femnist),
        ("shakespeare", "flwrlabs/shakespeare", write_shakespeare),
        (
            "cifar10",
            "uoft-cs/cifar10",
            lambda folder: write_cifar(folder, {"img": "image", "label": ANIMALS}),
        ),
    ],
)
def test_the_hubs_repository_gives_what_its_files_give(
    name, repository, write_files, tmp_path, monkeypatch
):
    # `datasets` takes a folder of a repository's name for the repository itself
    write_files(tmp_path / repository)
    monkeypatch.chdir(tmp_path)
    local = load(tmp_path / "cache", name=name, path=str(tmp_path / repository))
    (tmp_path / "arrow").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    remote = load(tmp_path / "hub", name=name)
    assert remote.manifest["data"]["hub"] == repository
    assert remote.manifest_sha256 == local.manifest_sha256


@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_without_a_network_the_error_says_what_to_do(name, tmp_path, monkeypatch):
    for module in (datasets.config, huggingface_hub.constants):  # or it asks for half a minute
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    with pytest.raises(RunError, match=r"Hub \(.*\); connect to the network once, or set \[data\]"):
        load(tmp_path, name=name)


# --- the real ones ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_mnist_has_its_known_shape_and_moments(tmp_path):
    folder = TEST_DATA / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST parquet folder at {folder}; set FEDSIM_TEST_DATA")
    data = _mnist(folder, tmp_path, {"kind": "dirichlet", "clients": 100, "alpha": 0.1})
    pool = data.clients([0])
    assert pool.features.shape == (60_000, 1, 28, 28)
    assert data.test.features.shape == (10_000, 1, 28, 28)
    assert np.bincount(pool.targets).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert np.bincount(data.test.targets).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert abs(pool.features.mean(dtype=np.float64)) < 1e-3
    assert abs(pool.features.std(dtype=np.float64) - 1) < 1e-3
    rows = np.concatenate(data.clients(np.arange(100)).rows)
    assert sorted(rows.tolist()) == list(range(60_000))


@pytest.mark.slow
def test_cifar10s_constants_are_those_of_its_images(tmp_path):
    folder = TEST_DATA / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no CIFAR-10 parquet folder at {folder}; set FEDSIM_TEST_DATA")
    data = load(tmp_path, name="cifar10", path=str(folder), image="image")
    pool = data.clients([0])
    assert pool.features.shape[1:] == (3, 32, 32)
    # a subset of the training images: each mean is that of tens of thousands of images
    assert (np.abs(pool.features.mean(axis=(0, 2, 3), dtype=np.float64)) < 0.02).all()
    assert (np.abs(pool.features.std(axis=(0, 2, 3), dtype=np.float64) - 1) < 0.02).all()
