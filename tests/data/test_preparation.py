import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.home import cache_root
from fedsim.basics.rng import generator
from fedsim.basics.samples import SampleSpec
from fedsim.data import cache
from fedsim.data.federated import (
    Arrays,
    ClientRows,
    DataRecipe,
    FederatedData,
    array_sha256,
    json_sha256,
)
from fedsim.data.partitions.statistics import draw_partition, label_counts, partition_statistics
from fedsim.data.preparation import prepare, reopen
from fedsim.data.sets.formats import DATASETS
from tests.basics.processes import QUICKLY

ROOT = Path(__file__).resolve().parents[2]
TEST_DATA = Path(os.environ.get("FEDSIM_TEST_DATA") or ROOT.parent / "shared" / "data")

DIRICHLET = {"kind": "dirichlet", "clients": 12, "alpha": 0.3}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def digits(shared_cache):
    """A function that divides the digits."""

    def build(partition=DIRICHLET, *, seed=0, cache_dir=shared_cache, **data):
        return prepare({"name": "digits", **data}, partition, seed=seed, cache_dir=cache_dir)

    return build


def synthetic(clients=30, *, seed=0, test_fraction=0.0, **arguments):
    partition = {"kind": "natural", "clients": clients, "test_fraction": test_fraction}
    return prepare({"name": "synthetic", **arguments}, partition, seed=seed)


def all_rows(data, split="train"):
    return np.concatenate(data.clients(np.arange(data.num_clients), split=split).rows)


# --- the digits, divided -----------------------------------------------------------------------


def test_digits_are_scikit_learns_scaled_to_one(digits):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pool = digits().clients([0])
    assert pool.features.dtype == np.float32
    assert pool.targets.dtype == np.int64
    assert pool.features.flags.c_contiguous
    np.testing.assert_array_equal(pool.features, (images / 16).reshape(-1, 1, 8, 8))
    np.testing.assert_array_equal(pool.targets, labels)
    assert digits().feature_shape == (1, 8, 8)
    assert digits().num_classes == 10


def test_the_held_out_set_is_stratified(digits):
    data = digits(test_fraction=0.2)
    classes = np.bincount(data.clients([0]).targets)
    held_out = np.bincount(data.test.targets)
    assert held_out.sum() == round(0.2 * 1797)
    assert (np.abs(held_out - 0.2 * classes) < 1).all()


def _fingerprints(arrays, rows=None):
    chosen = slice(None) if rows is None else rows
    return [
        (features.tobytes(), int(target))
        for features, target in zip(arrays.features[chosen], arrays.targets[chosen], strict=True)
    ]


def test_every_sample_is_held_out_or_belongs_to_one_client(digits):
    data = digits(partition={**DIRICHLET, "test_fraction": 0.25})
    pool = data.clients([])
    rows = np.concatenate([all_rows(data, "train"), all_rows(data, "test")])
    assert len(set(rows.tolist())) == len(rows)
    found = _fingerprints(pool, rows) + _fingerprints(data.test)
    assert sorted(found) == sorted(_fingerprints(pool))


def test_the_held_out_set_is_drawn_before_the_partition(digits):
    tests = [
        digits(partition, seed=3).test.features.tobytes()
        for partition in (DIRICHLET, {"kind": "iid", "clients": 5, "test_fraction": 0.5})
    ]
    assert tests[0] == tests[1]
    assert digits(seed=4).test.features.tobytes() != tests[0]


def test_sizes_are_the_training_rows_of_the_clients_asked_for(digits):
    data = digits(partition={**DIRICHLET, "test_fraction": 0.25})
    ids = [7, 0, 7, 11]
    rows = data.clients(ids).rows
    sizes = data.sizes(ids)
    assert sizes.dtype == np.int64
    assert sizes.tolist() == [len(r) for r in rows]
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[1], data.clients([0]).rows[0])


def test_local_test_splits_take_the_fraction_of_each_client_at_random(digits):
    whole = digits()
    split = digits(partition={**DIRICHLET, "test_fraction": 0.25})
    places = []
    for client_id in range(12):
        mine = whole.clients([client_id]).rows[0]
        test = split.clients([client_id], split="test").rows[0]
        train = split.clients([client_id]).rows[0]
        assert len(test) == min(int(0.25 * len(mine) + 0.5), len(mine) - 1)
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), mine)
        places.extend(np.searchsorted(mine, test) / len(mine))
    assert abs(np.mean(places) - 0.5) <= 4 * np.sqrt(1 / 12 / len(places))


def test_seeds_give_other_local_test_splits(digits):
    places = []
    for seed in (0, 1):
        data = digits({"kind": "iid", "clients": 1, "test_fraction": 0.5}, seed=seed)
        train, test = data.clients([0]).rows[0], data.clients([0], split="test").rows[0]
        places.append(np.searchsorted(np.sort(np.concatenate([train, test])), test))
    assert len(places[0]) == len(places[1])
    assert (places[0] != places[1]).any()


def test_without_a_test_fraction_local_test_splits_are_empty(digits):
    assert [len(r) for r in digits().clients([0, 1], split="test").rows] == [0, 0]


def test_the_counter_counts_the_client_data_sets_handed_out(digits):
    data = digits()
    data.sizes([1, 2, 3])
    assert data.clients_read == 0
    data.clients([1, 2])
    data.clients([2], split="test")
    assert data.clients_read == 3


@pytest.mark.parametrize("build", ["digits", "synthetic"])
def test_foreign_client_ids_and_splits_are_refused(digits, build):
    data = digits() if build == "digits" else synthetic(12)
    for ids in ([0, 12], [-1]):
        with pytest.raises(IndexError, match=rf"client {ids[-1]} does not exist: ids are 0 to 11"):
            data.clients(ids)
        with pytest.raises(IndexError, match=r"does not exist"):
            data.sizes(ids)
    with pytest.raises(ValueError, match="split = 'valid': must be 'train' or 'test'"):
        data.clients([0], split="valid")


def test_rows_are_the_callers_own_and_the_pool_is_read_only(digits):
    data = digits()
    held = data.clients([3])
    before = held.rows[0].copy()
    held.rows[0][:] = 0
    np.testing.assert_array_equal(data.clients([3]).rows[0], before)
    with pytest.raises(ValueError, match="read-only"):
        held.features[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        data.test.targets[0] = 1


# --- the manifest ------------------------------------------------------------------------------


def test_the_manifest_is_json_that_says_what_the_data_are(digits, shared_cache):
    data = digits(partition={**DIRICHLET, "test_fraction": 0.25}, seed=5)
    manifest = json.loads(json.dumps(data.manifest, allow_nan=False))
    assert manifest["data"]["name"] == "digits"
    assert manifest["data"]["samples"] == 1797
    assert manifest["held_out"]["samples"] == len(data.test.targets)
    assert manifest["partition"]["kind"] == "dirichlet"
    assert manifest["partition"]["seed"] == 5
    assert manifest["partition"]["min_size"] == 0  # defaults stand in it too
    sizes = data.sizes(np.arange(12))
    assert manifest["sizes"]["min"] == sizes.min()
    assert manifest["sizes"]["max"] == sizes.max()
    assert manifest["local_test"]["samples"] == len(all_rows(data, "test"))
    assert manifest["dropped"] == {"samples": 0, "reason": None}
    assert str(shared_cache) not in json.dumps(manifest)


def test_the_manifest_hash_is_equal_for_equal_data_wherever_they_are_cached(digits, tmp_path):
    assert digits().manifest_sha256 == digits(cache_dir=tmp_path).manifest_sha256


def test_the_manifest_hash_differs_when_anybody_holds_something_else(digits):
    variants = [
        digits(),
        digits(seed=1),
        digits({**DIRICHLET, "alpha": 0.31}),
        digits({**DIRICHLET, "clients": 13}),
        digits({**DIRICHLET, "test_fraction": 0.1}),
        digits({"kind": "iid", "clients": 12}),
        digits(test_fraction=0.3),
        synthetic(12),
        synthetic(13),
        synthetic(12, seed=1),
        synthetic(12, alpha=0.5),
        synthetic(12, test_clients=5),
        synthetic(12, test_fraction=0.5),
    ]
    assert len({data.manifest_sha256 for data in variants}) == len(variants)


def test_the_array_hash_sees_dtype_shape_and_content():
    arrays = [
        np.zeros(4, dtype=np.int64),
        np.zeros(4, dtype=np.float64),
        np.zeros((2, 2), dtype=np.int64),
        np.array([0, 0, 0, 1]),
        np.zeros(0, dtype=np.int64),
        np.zeros((0, 3), dtype=np.int64),
    ]
    assert len({array_sha256(array) for array in arrays}) == len(arrays)
    np.testing.assert_equal(
        array_sha256(np.arange(9)[::2]), array_sha256(np.array([0, 2, 4, 6, 8]))
    )


# --- the cache, and the way to other processes -------------------------------------------------


def _python(code, *arguments, stdin=b"", **environment):
    done = subprocess.run(
        [sys.executable, "-c", QUICKLY + code, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


READ_PICKLE = """
import pickle, sys
data = pickle.load(sys.stdin.buffer)
held = data.clients([3])
print(data.manifest_sha256, held.rows[0].tolist(), float(held.features[5].sum()))
"""


def _summary(data):
    held = data.clients([3])
    return f"{data.manifest_sha256} {held.rows[0].tolist()} {float(held.features[5].sum())}\n"


@pytest.mark.parametrize("build", ["digits", "synthetic"])
def test_a_pickle_is_a_recipe_of_a_few_hundred_bytes(digits, build):
    data = digits() if build == "digits" else synthetic(1_000_000)
    assert len(pickle.dumps(data)) < 800


def test_another_process_opens_the_same_data(digits):
    data = digits(seed=9)
    assert _python(READ_PICKLE, stdin=pickle.dumps(data)) == _summary(data)


def test_another_machine_without_the_cache_prepares_the_same_data_again(digits, tmp_path):
    data = digits(cache_dir=tmp_path / "here")
    sent, expected = pickle.dumps(data), _summary(data)
    (tmp_path / "here").rename(tmp_path / "gone")
    elsewhere = tmp_path / "elsewhere"
    assert _python(READ_PICKLE, stdin=sent, FEDSIM_CACHE=str(elsewhere)) == expected
    assert len(list(elsewhere.glob("partition/*/index.json"))) == 1
    assert not (tmp_path / "here").exists()


def test_data_that_differ_from_the_senders_are_refused(digits):
    data = digits()
    data.manifest_sha256 = "0" * 64
    with pytest.raises(RunError, match="'digits' prepared here differ from those of the process"):
        pickle.loads(pickle.dumps(data))


def test_large_arrays_are_mapped_and_shared(digits):
    assert isinstance(digits().clients([0]).features.base, np.memmap)
    assert isinstance(digits().test.features.base, np.memmap)


def _entry(root, make=lambda: cache.Content({"x": np.arange(20_000)}, {"note": 1}), key="a"):
    return cache.entry(root, "data", {"key": key}, make)


def _refuse():
    raise AssertionError("made again")


def test_an_entry_is_made_once_and_read_back(tmp_path):
    _entry(tmp_path)
    content = _entry(tmp_path, _refuse)
    np.testing.assert_array_equal(content.arrays["x"], np.arange(20_000))
    assert content.info == {"note": 1}


def test_another_key_is_another_entry(tmp_path):
    _entry(tmp_path)
    with pytest.raises(AssertionError, match="made again"):
        _entry(tmp_path, _refuse, key="b")


def _folder(root):
    (folder,) = (path.parent for path in root.glob("data/*/index.json"))
    return folder


@pytest.mark.parametrize(
    "damage", ["truncated", "missing", "no index", "half an index", "odd index"]
)
def test_a_torn_entry_is_made_again(tmp_path, damage):
    _entry(tmp_path)
    folder = _folder(tmp_path)
    array, index = folder / "x.npy", folder / "index.json"
    if damage == "truncated":
        array.write_bytes(array.read_bytes()[:1000])
    elif damage == "missing":
        array.unlink()
    elif damage == "no index":
        index.unlink()
    elif damage == "half an index":
        index.write_text(index.read_text()[:20])
    else:
        index.write_text('["x"]')
    np.testing.assert_array_equal(_entry(tmp_path).arrays["x"], np.arange(20_000))
    np.testing.assert_array_equal(_entry(tmp_path, _refuse).arrays["x"], np.arange(20_000))


def test_leftovers_of_a_killed_process_are_cleared_away(tmp_path):
    _entry(tmp_path)
    folder = _folder(tmp_path)
    folder.rename(folder.with_name(f".{folder.name}"))
    _entry(tmp_path)
    left = {path.name for path in folder.parent.iterdir()}
    assert left == {folder.name, f"{folder.name}.lock"}


def test_an_interrupted_write_leaves_no_entry(tmp_path):
    class Unsaveable:
        def __array__(self, dtype=None, copy=None):
            raise KeyboardInterrupt

    content = cache.Content({"x": np.arange(3), "y": Unsaveable()}, {})
    with pytest.raises(KeyboardInterrupt):
        _entry(tmp_path, lambda: content)
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [".lock"]
    np.testing.assert_array_equal(_entry(tmp_path).arrays["x"], np.arange(20_000))


def test_a_cache_that_cannot_be_written_is_named_with_a_way_out(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(RunError, match=r"cannot be written .* set FEDSIM_CACHE to a writable"):
        _entry(occupied)


@pytest.mark.parametrize(
    "changed", ["data/partitions/by_size.py", "basics/rng.py", "basics/ties.py"]
)
def test_code_that_draws_otherwise_takes_nothing_that_the_old_code_made(changed, tmp_path):
    package, code = ROOT / "fedsim", cache._code.__wrapped__  # it remembers its result
    copy = shutil.copytree(package, tmp_path / "fedsim")
    assert code(copy) == code(package)
    with (copy / changed).open("a") as file:
        file.write("# draws otherwise\n")
    assert code(copy) != code(package)


RACE = """
import sys, time
from pathlib import Path
import numpy as np
from fedsim.data import cache
root, log = Path(sys.argv[1]), Path(sys.argv[2])
def make():
    with log.open("a") as file:
        file.write("made\\n")
    time.sleep(0.3)
    return cache.Content({"x": np.arange(20_000)}, {})
while not (root / "go").exists():
    time.sleep(0.01)
print(int(cache.entry(root, "data", {}, make).arrays["x"].sum()))
"""


def test_of_many_processes_one_makes_an_entry_and_all_get_it(tmp_path):
    log = tmp_path / "log"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), str(log)], cwd=ROOT, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    (tmp_path / "go").touch()
    printed = [racer.communicate(timeout=60)[0] for racer in racers]
    assert printed == [b"%d\n" % np.arange(20_000).sum()] * 4
    assert log.read_text() == "made\n"


def test_the_default_cache_is_the_environments_then_the_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("FEDSIM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "fedsim"


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "partition", "message"),
    [
        ({"name": "digit"}, DIRICHLET, r"\[data\] name: 'digit' is not a data set; did you mean"),
        (
            {"name": "digits"},
            {"kind": "dirichlit"},
            r"\[partition\] kind: 'dirichlit' is not a par",
        ),
        (
            {"name": "digits", "test_fraction": 0.0},
            DIRICHLET,
            r"\[data\] test_fraction = 0.0: must",
        ),
        (
            {"name": "digits"},
            {"kind": "natural"},
            "does not say whose samples are whose",
        ),
        ({"name": "digits"}, {"kind": "iid", "clients": 1439}, r"use at most 1438"),
        (
            {"name": "digits"},
            {"kind": "dirichlet", "clients": 50, "min_size": 40},
            r"\[partition\] min_size = 40: 1438 samples give each of 50 clients at most 28",
        ),
        ({"name": "digits", "test_fraction": 1e-6}, DIRICHLET, r"1797 samples it holds out 0"),
        ({"name": "digits", "test_fraction": 0.9999}, DIRICHLET, r"it holds out 1797"),
        ({"name": "synthetic"}, {"kind": "iid"}, r"kind = 'iid': synthetic makes .* 'natural'"),
        ({"name": "synthetic", "alpha": -1.0}, {"kind": "natural"}, r"\[data\] alpha = -1.0: must"),
        ({"name": "synthetic", "beta": np.nan}, {"kind": "natural"}, r"\[data\] beta = nan: must"),
        ({"name": "synthetic", "dimension": 0}, {"kind": "natural"}, r"\[data\] dimension = 0"),
        ({"name": "synthetic", "classes": 1}, {"kind": "natural"}, r"\[data\] classes = 1"),
        ({"name": "synthetic", "max_samples": 0}, {"kind": "natural"}, r"\[data\] max_samples = 0"),
        ({"name": "synthetic", "test_fraction": 0}, {"kind": "natural"}, r"\[data\] test_fraction"),
        ({"name": "synthetic", "test_clients": 0}, {"kind": "natural"}, r"\[data\] test_clients"),
    ],
)
def test_impossible_scenarios_are_refused(shared_cache, data, partition, message):
    with pytest.raises(ScenarioError, match=message):
        prepare(data, partition, seed=0, cache_dir=shared_cache)


def test_every_data_set_can_be_built_from_what_it_must_be_given(tmp_path):
    (tmp_path / "train.csv").write_text("x,y\n1,0\n2,1\n")
    needed = {"folder": {"path": str(tmp_path)}, "hub": {"repository": "owner/name"}}
    for name, factory in DATASETS.items():
        assert factory(**needed.get(name, {})) is not None


def test_listing_data_sets_and_partitions_imports_nothing_heavy():
    code = (
        "import sys, fedsim.data.preparation\n"
        "import fedsim.federation.participation.kinds, fedsim.basics.import_paths\n"
        "heavy = {'torch', 'ray', 'flwr', 'datasets', 'sklearn', 'matplotlib', 'pandas', 'PIL'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    assert _python(code) == "[]\n"


# --- synthetic ---------------------------------------------------------------------------------


def _paper(seed, client_id, alpha, beta, dimension, classes, max_samples):
    """FedProx, appendix C.1, one number at a time; the order of the draws is ours."""
    draw = generator(seed, "synthetic", client_id)
    n = min(int(draw.lognormal(4, 2)) + 50, max_samples)
    u = draw.normal(0, alpha)
    big_b = draw.normal(0, beta)
    v = [draw.normal(big_b, 1) for _ in range(dimension)]
    w = [[draw.normal(u, 1) for _ in range(classes)] for _ in range(dimension)]
    b = [draw.normal(u, 1) for _ in range(classes)]
    xs, ys = [], []
    for _ in range(n):
        x = [v[j] + np.sqrt((j + 1) ** -1.2) * draw.normal() for j in range(dimension)]
        logits = np.array(
            [sum(x[j] * w[j][c] for j in range(dimension)) + b[c] for c in range(classes)]
        )
        softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        xs.append(x)
        ys.append(int(np.argmax(softmax)))
    return np.array(xs), np.array(ys)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_synthetic_clients_follow_the_paper(alpha, beta):
    law = {"alpha": alpha, "beta": beta, "dimension": 5, "classes": 3, "max_samples": 70}
    data = synthetic(20, seed=4, **law)
    held = data.clients([17, 2])
    for rows, client_id in zip(held.rows, (17, 2), strict=True):
        features, targets = _paper(4, client_id, **law)
        np.testing.assert_allclose(held.features[rows], features, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(held.targets[rows], targets)


def test_synthetic_features_have_the_papers_covariance():
    data = synthetic(1, dimension=4, classes=2, max_samples=10**6, test_fraction=0.0, seed=12)
    source = DATASETS["synthetic"](dimension=4, classes=2)
    draw = generator(0, "test")
    law = source.law(draw)
    x = source.draw(law, 40_000, draw).features.astype(np.float64)
    expected = np.diag(np.arange(1, 5) ** -1.2)
    covariance = np.cov(x.T)
    error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / 40_000)
    assert (np.abs(covariance - expected) <= 4 * error).all()
    assert data.sizes([0])[0] >= 50


def test_synthetic_sizes_are_lognormal_plus_fifty_up_to_the_bound():
    sizes = synthetic(4000, max_samples=10**9).sizes(np.arange(4000))
    assert sizes.min() >= 50
    median = np.exp(4) + 50
    below = (sizes < median).mean()
    assert abs(below - 0.5) <= 4 * np.sqrt(0.25 / 4000) + 0.01
    bounded = synthetic(4000, max_samples=200).sizes(np.arange(4000))
    np.testing.assert_array_equal(bounded, np.minimum(sizes, 200))


@given(ids=st.lists(st.integers(0, 999_999), min_size=1, max_size=4))
@settings(max_examples=20)
def test_a_synthetic_clients_data_do_not_depend_on_its_neighbours(ids):
    data = synthetic(1_000_000, max_samples=60, test_fraction=0.2)
    for split in ("train", "test"):
        together = data.clients(ids, split=split)
        assert sum(len(rows) for rows in together.rows) == len(together.targets)
        for client_id, rows in zip(ids, together.rows, strict=True):
            alone = data.clients([client_id], split=split)
            np.testing.assert_array_equal(together.features[rows], alone.features)
            np.testing.assert_array_equal(together.targets[rows], alone.targets)
    assert data.sizes(ids).tolist() == [len(r) for r in data.clients(ids).rows]


def test_alpha_changes_no_synthetic_label():
    """As with the authors' generator; see the module. Beta changes features, hence labels."""
    plain, moved, other = (
        [rows.tolist() for rows in _targets_of(synthetic(20, alpha=alpha, beta=beta))]
        for alpha, beta in ((0.0, 1.0), (50.0, 1.0), (0.0, 2.0))
    )
    assert moved == plain
    assert other != plain


def _targets_of(data):
    held = data.clients([3, 11])
    return [held.targets[rows] for rows in held.rows]


def test_a_synthetic_local_test_split_is_cut_off_the_clients_samples():
    whole, split = synthetic(5, max_samples=80), synthetic(5, max_samples=80, test_fraction=0.25)
    train, test = split.clients([3]), split.clients([3], split="test")
    everything = whole.clients([3])
    assert len(test.targets) == int(0.25 * len(everything.targets) + 0.5)
    np.testing.assert_array_equal(
        np.concatenate([train.features, test.features]), everything.features
    )


def test_the_synthetic_server_test_set_comes_from_a_bounded_number_of_clients():
    large = synthetic(1_000_000, test_clients=7)
    assert large.clients_read == 0
    small = synthetic(7, test_clients=7)
    np.testing.assert_array_equal(large.test.features, small.test.features)
    sizes = large.sizes(np.arange(7))
    assert len(large.test.targets) == np.ceil(0.2 * sizes).sum()
    assert large.manifest["held_out"]["samples"] == len(large.test.targets)


def test_the_synthetic_server_test_set_follows_the_clients_laws_and_shares_no_sample():
    data = synthetic(1, alpha=0.0, beta=0.0, dimension=3, classes=2, max_samples=4000, seed=6)
    source = DATASETS["synthetic"](alpha=0.0, beta=0.0, dimension=3, classes=2, max_samples=4000)
    draw = generator(6, "synthetic", 0)
    source.size(draw)
    law = source.law(draw)
    fresh = generator(6, "synthetic-test", 0).standard_normal((len(data.test.targets), 3))
    x = law.center + np.arange(1, 4) ** -0.6 * fresh
    np.testing.assert_allclose(data.test.features, x, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(data.test.targets, (x @ law.weights + law.bias).argmax(axis=1))
    assert not set(_fingerprints(data.test)) & set(_fingerprints(data.clients([0])))


def test_a_round_over_twenty_of_a_million_clients_touches_twenty():
    synthetic(1_000_000)  # what is imported once is not counted
    tracemalloc.start()
    data = synthetic(1_000_000)
    ids = np.arange(20) * 50_000
    data.sizes(ids)
    held = data.clients(ids)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.clients_read == 20
    # everything that exists is in proportion to the twenty clients' samples
    assert peak < 4 * held.features.nbytes * 2 + 1_000_000
    assert (
        pickle.loads(pickle.dumps(data)).clients(ids[:1]).rows[0].tolist() == held.rows[0].tolist()
    )


# --- statistics --------------------------------------------------------------------------------


class Fixed(FederatedData):
    """A federation with given labels per client."""

    def __init__(self, labels, num_classes):
        super().__init__(DataRecipe({}, {}, 0, Path(), reopen))
        self._labels = labels
        self.num_clients = len(labels)
        self.spec = SampleSpec((1,), num_classes)
        self.manifest = {"data": {"name": "fixed"}, "partition": {"kind": "given", "seed": 0}}
        self.manifest_sha256 = json_sha256(self.manifest)

    def sizes(self, client_ids):
        return np.array([len(self._labels[i]) for i in client_ids])

    def clients(self, client_ids, *, split="train"):
        chosen = [np.array(self._labels[i], dtype=np.int64) for i in client_ids]
        ends = np.cumsum([len(labels) for labels in chosen])
        rows = [np.arange(e - len(x), e) for e, x in zip(ends, chosen, strict=True)]
        targets = np.concatenate(chosen)
        return ClientRows(np.zeros((len(targets), 1), dtype=np.float32), targets, rows)

    @property
    def test(self):
        return Arrays(np.zeros((4, 1), dtype=np.float32), np.zeros(4, dtype=np.int64))


def test_statistics_of_a_small_federation_are_those_computed_by_hand():
    statistics = partition_statistics(Fixed([[0, 0, 0], [1], [0, 1, 1, 2], []], num_classes=4))
    assert statistics["clients"] == statistics["counted"] == 4
    assert statistics["complete"] is True
    assert statistics["samples"] == 8
    assert statistics["held_out"] == 4
    assert statistics["sizes"] == {"min": 0, "median": 2.0, "mean": 2.0, "max": 4, "empty": 1}
    assert [row["samples"] for row in statistics["labels"]] == [4, 3, 1, 0]
    assert [row["share"] for row in statistics["labels"]] == [0.5, 0.375, 0.125, 0.0]
    assert [row["clients"] for row in statistics["labels"]] == [2, 2, 1, 0]
    assert statistics["classes_per_client"] == {"min": 1, "median": 1.0, "mean": 5 / 3, "max": 3}
    # shares are (4, 3, 1, 0)/8; the clients' laws (1,0,0,0), (0,1,0,0), (1/4,1/2,1/4,0)
    assert statistics["total_variation"]["mean"] == pytest.approx((1 / 2 + 5 / 8 + 1 / 4) / 3)
    assert statistics["total_variation"]["max"] == pytest.approx(5 / 8)
    json.dumps(statistics, allow_nan=False)


def test_iid_clients_differ_as_much_as_chance_says_and_dirichlet_ones_more(digits):
    iid = partition_statistics(digits({"kind": "iid", "clients": 50}))["total_variation"]
    skewed = partition_statistics(digits({"kind": "dirichlet", "clients": 50, "alpha": 0.1}))
    assert iid["mean"] == pytest.approx(iid["by_chance"], abs=0.05)
    assert skewed["total_variation"]["mean"] > skewed["total_variation"]["by_chance"] + 0.3


def test_label_counts_are_those_of_the_partition(digits):
    data = digits()
    counts, complete = label_counts(data)
    assert complete
    for client_id in range(12):
        held = data.clients([client_id])
        for label in range(10):
            assert counts[client_id, label] == (held.targets[held.rows[0]] == label).sum()


def test_of_a_huge_federation_the_first_thousand_clients_are_counted_and_it_says_so():
    data = synthetic(1_000_000, max_samples=20)
    statistics = partition_statistics(data)
    assert statistics["clients"] == 1_000_000
    assert statistics["counted"] == 1000
    assert statistics["complete"] is False
    assert data.clients_read == 1000


@pytest.mark.parametrize("clients", [1, 12, 100, 1400])
def test_the_picture_is_written_for_few_and_many_clients(digits, tmp_path, clients):
    path = tmp_path / "partition.png"
    draw_partition(digits({"kind": "dirichlet", "clients": clients, "alpha": 0.1}), path)
    with Image.open(path) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}
        assert image.size == (1500, 750)
    assert {(31, 119, 180), (255, 127, 14), (23, 190, 207)} <= colors  # classes 0, 1 and 9
