"""What a division makes of a rule: splits, natural owners, features that differ by client."""

import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from fedsim.basics.errors import ScenarioError
from fedsim.basics.rng import generator
from fedsim.basics.samples import SampleSpec
from fedsim.data.partitions.skew import FeatureSkew, rotated, rotation_angles, skewed
from fedsim.data.partitions.statistics import label_counts
from fedsim.data.preparation import prepare
from fedsim.data.sets.user import DataSet
from fedsim.runs import world
from fedsim.scenario.load import load

DIGITS = {"name": "digits"}
HOSPITALS = ("Aarhus", "Bari", "Cádiz", "Dresden", "Evora")


def hospitals():
    """A data set of the user's own with five owners, of whom one has a single sample."""
    draw = generator(0, "hospitals")
    owners = np.array([*(["Cádiz"] * 30), *(["Aarhus"] * 50), "Evora", *(["Bari"] * 20)])
    owners = np.append(owners, ["Dresden"] * 99)[draw.permutation(200)]
    features = draw.standard_normal((200, 4)) * [1, 10, 0, 3] + [0, 100, 5, -2]
    return DataSet(features, draw.integers(0, 3, 200), owners, test_fraction=0.1)


def numbers():
    """A data set whose targets are numbers."""
    draw = generator(1, "numbers")
    features = draw.standard_normal((300, 3))
    return DataSet(features, features @ np.array([1.0, -2.0, 0.5]))


def texts():
    """A data set of tokens."""
    draw = generator(2, "texts")
    return DataSet(draw.integers(0, 9, (80, 5)), draw.integers(0, 9, 80), vocabulary=9)


def mine(loader):
    return {"name": f"{__name__}:{loader.__name__}"}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def build(shared_cache):
    def build(data, seed=0, **partition):
        return prepare(data, partition, seed=seed, cache_dir=shared_cache)

    return build


def held(data, client_id, split="train"):
    found = data.clients([client_id], split=split)
    return found.features[found.rows[0]], found.targets[found.rows[0]]


# --- every rule, whole -------------------------------------------------------------------------

RULES = {
    "iid": {}, "sizes": {"law": "power"}, "dirichlet": {"alpha": 0.1},
    "dirichlet_client": {"alpha": 0.1, "law": "linear"}, "pathological": {"clients": 3},
    "label_quantity": {}, "shards": {"shards_per_client": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", RULES)
def test_every_sample_is_held_out_with_one_client_or_counted_as_dropped(build, kind):
    data = build(DIGITS, kind=kind, test_fraction=0.3, **{"clients": 12, **RULES[kind]})
    ids = np.arange(data.num_clients)
    rows = np.concatenate([*data.clients(ids).rows, *data.clients(ids, split="test").rows])
    assert len(set(rows.tolist())) == len(rows)
    dropped = data.manifest["dropped"]
    assert len(rows) + dropped["samples"] + len(data.test.targets) == 1797
    assert (dropped["reason"] is None) == (dropped["samples"] == 0)
    assert (kind == "pathological") == bool(dropped["samples"])  # of 10 classes 3 clients have 6
    assert data.manifest["clients"] == data.num_clients


# --- natural owners ----------------------------------------------------------------------------


def test_owners_are_clients_in_the_order_of_their_names_and_named_in_the_manifest(build):
    data = build(mine(hospitals), kind="natural", test_fraction=0.2)
    raw = hospitals()
    owners = data.manifest["owners"]
    assert owners["in_data"] == 5
    assert owners["of_first_clients"] == sorted(HOSPITALS)[: data.num_clients]
    for client_id, name in enumerate(owners["of_first_clients"]):
        rows = np.concatenate(
            [data.clients([client_id], split=s).rows[0] for s in ("train", "test")]
        )
        assert (raw.groups[rows] == name).all()
    assert data.manifest["dropped"]["samples"] == 0
    assert pickle.loads(pickle.dumps(data)).num_clients == data.num_clients


def test_owners_without_a_client_are_dropped_and_counted(build):
    data = build(mine(hospitals), kind="natural", clients=2)
    dropped = data.manifest["dropped"]
    assert data.num_clients == 2
    assert data.sizes([0, 1]).sum() + dropped["samples"] + len(data.test.targets) == 200
    assert "owners were not drawn" in dropped["reason"]
    assert data.manifest["owners"]["with_a_client"] == 2


def test_grouped_owners_are_listed_by_client(build):
    data = build(mine(hospitals), kind="grouped", clients=2)
    lists = data.manifest["owners"]["of_first_clients"]
    assert sorted(", ".join(lists).split(", ")) == sorted(HOSPITALS)


SCENARIO = """
rounds = 1
[data]
name = "tests.data.partitions.test_division:hospitals"
[partition]
kind = "natural"
test_fraction = 0.3
[engine]
kind = "inline"
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.clients=6", "[evaluation] clients = 6 with 5 clients: at most 5 can evaluate"),
        ("engine.min_replies=6", "[engine] min_replies = 6: a round has at most 5 replies"),
        ("participation={kind='uniform', cohort_size=6}", "cohort_size = 6"),
        ("attack={kind='uniform', num_byzantine=6}", "num_byzantine = 6: must be in 0..5"),
        ("attack={kind='uniform', clients=[5]}", "there is no client 5; allowed: 0..4"),
    ],
)
def test_what_so_many_clients_cannot_do_is_refused_once_their_number_is_known(
    tmp_path, override, message
):
    (tmp_path / "mine.toml").write_text(SCENARIO)
    scenario = load(tmp_path / "mine.toml", [override])
    with pytest.raises(ScenarioError) as caught, scenario.named_in_refusals():
        world.build(scenario)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.toml'}: [")


def test_a_scenario_that_leaves_the_number_of_clients_to_the_data_is_built(tmp_path):
    (tmp_path / "mine.toml").write_text(SCENARIO)
    made = world.build(load(tmp_path / "mine.toml", ["evaluation.clients=5"]))
    assert made.data.num_clients == 5


# --- clients that share parts ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "natural"])
def test_clients_that_share_parts_hold_what_the_part_holds_and_the_manifest_counts_shares(
    build, kind
):
    data = DIGITS if kind != "natural" else mine(hospitals)
    keys = {"kind": kind, "test_fraction": 0.2}
    parts = build(data, clients=4, **keys)
    shared = build(data, clients=1_000_003, parts=4, **keys)
    ids = np.array([0, 1, 2, 3, 4, 7, 999_999, 1_000_002])
    for split in ("train", "test"):
        own, theirs = parts.clients(ids % 4, split=split), shared.clients(ids, split=split)
        for one, other in zip(own.rows, theirs.rows, strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(shared.sizes(ids), parts.sizes(ids % 4))
    assert ids.tolist() == [0, 1, 2, 3, 4, 7, 999_999, 1_000_002]  # the caller's, untouched
    assert shared.num_clients == shared.manifest["clients"] == 1_000_003
    sizes = parts.sizes(range(4)) + [len(r) for r in parts.clients(range(4), split="test").rows]
    said = shared.manifest["shared"]
    assert said["parts"] == 4
    assert said["clients_per_part"] == {"min": 250_000, "max": 250_001}
    assert said["samples_held_by_several_clients"] == sizes.sum()
    assert said["shares"] == sum(sizes[c % 4] for c in range(1_000_003))
    assert shared.manifest["local_test"]["samples"] == sum(
        len(parts.clients([p], split="test").rows[0]) * (250_001 if p < 3 else 250_000)
        for p in range(4)
    )
    assert shared.manifest_sha256 != parts.manifest_sha256
    assert "shared" not in parts.manifest
    again = pickle.loads(pickle.dumps(shared))
    assert (again.num_clients, again.sizes([999_999])) == (1_000_003, parts.sizes([3]))


def test_as_many_parts_as_clients_share_nothing(build):
    plain, parts = (build(DIGITS, kind="iid", clients=5, **k) for k in ({}, {"parts": 5}))
    assert parts.manifest["shared"]["samples_held_by_several_clients"] == 0
    assert parts.manifest["sizes"] == plain.manifest["sizes"]


def test_labels_of_shared_parts_are_counted_for_every_client(build):
    shared = build(DIGITS, kind="dirichlet", clients=1000, parts=7)
    counts = label_counts(shared, whole=True).counts
    np.testing.assert_array_equal(counts[7:], counts[:-7])
    np.testing.assert_array_equal(counts.sum(axis=1), shared.sizes(range(1000)))


@pytest.mark.parametrize(
    ("data", "keys", "message"),
    [
        (DIGITS, {"kind": "iid", "clients": 5, "parts": 6}, "parts = 6: must be from 1 to clients"),
        (DIGITS, {"kind": "iid", "parts": 0}, "parts = 0: must be from 1 to clients = 10"),
        (DIGITS, {"kind": "iid", "clients": 9999, "parts": 5000}, "use at most"),
        (None, {"kind": "natural", "parts": 2}, "parts = 2: says who shares samples"),
        (None, {"kind": "natural", "parts": 9, "clients": 99}, "use at most"),
        ({"name": "synthetic"}, {"kind": "natural", "clients": 9, "parts": 3}, "made on demand"),
    ],
)
def test_parts_that_cannot_be_are_refused(build, data, keys, message):
    with pytest.raises(ScenarioError, match=re.escape(message)):
        build(data or mine(hospitals), **keys)


def test_a_scenario_without_parts_keeps_its_hash_and_one_with_parts_has_another(tmp_path):
    (tmp_path / "mine.toml").write_text(SCENARIO)
    plain = load(tmp_path / "mine.toml")
    document = plain.resolved()
    del document["partition"]["parts"]
    assert plain.from_resolved(document, "x").sha256 == plain.sha256
    shared = load(tmp_path / "mine.toml", ["partition.clients=50", "partition.parts=5"])
    assert shared.sha256 != load(tmp_path / "mine.toml", ["partition.clients=50"]).sha256


# --- skew of features --------------------------------------------------------------------------


def test_angles_are_evenly_spread_over_both_sides_or_as_listed():
    assert rotation_angles(45.0, 4).tolist() == [-45.0, -15.0, 15.0, 45.0]
    assert rotation_angles(45.0, 1).tolist() == [0.0]
    assert rotation_angles((1.0, 90.0), 2).tolist() == [1.0, 90.0]


@pytest.mark.parametrize("shape", [(3, 9, 9), (2, 3, 8, 8), (2, 1, 7, 12)])
@pytest.mark.parametrize("degrees", [17.0, -30.0, 90.0, 180.0, 290.0])
def test_images_turn_counter_clockwise_around_their_centre_as_scipy_turns_them(shape, degrees):
    images = generator(3, "t").random(shape)
    fill = np.full((1,) * (len(shape) - 1), 0.25)
    # within the circle that stays inside: at the border the two libraries fade out differently
    down, right = np.indices(shape[-2:])
    radius = np.hypot(down - (shape[-2] - 1) / 2, right - (shape[-1] - 1) / 2)
    inside = radius <= min(shape[-2:]) / 2 - 1
    oracle = ndimage.rotate(
        images, degrees, axes=(-1, -2), reshape=False, order=1, mode="constant", cval=0.25
    )
    turned = rotated(images, degrees, fill)
    np.testing.assert_allclose(turned[..., inside], oracle[..., inside], atol=1e-9)
    if degrees == 90.0 and shape[-2] == shape[-1]:
        np.testing.assert_allclose(turned, np.rot90(images, axes=(-2, -1)), atol=1e-9)


def test_what_turns_into_the_image_from_outside_is_its_channels_least_value(build):
    plain = build(DIGITS, kind="iid", clients=2)
    turned = build(DIGITS, kind="iid", clients=2, rotation=[0.0, 45.0])
    np.testing.assert_array_equal(held(plain, 0)[0], held(turned, 0)[0])
    expected = ndimage.rotate(
        held(plain, 1)[0], 45, axes=(-1, -2), reshape=False, order=1, cval=0.0
    )
    np.testing.assert_allclose(
        held(turned, 1)[0][..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-6
    )
    assert held(turned, 1)[0][..., 0, 0].max() == 0


def test_noise_has_the_variance_of_the_papers_parties(build):
    plain = build(DIGITS, kind="iid", clients=5, test_fraction=0.4)
    noisy = build(DIGITS, kind="iid", clients=5, test_fraction=0.4, feature_noise=0.6)
    for client_id in range(5):
        for split in ("train", "test"):
            noise = held(noisy, client_id, split)[0] - held(plain, client_id, split)[0]
            variance = 0.6 * (client_id + 1) / 5  # party i of N: sigma i / N, i = 1...N
            count = noise.size
            assert abs(noise.mean()) <= 4 * math.sqrt(variance / count)
            assert abs(noise.var() - variance) <= 4 * variance * math.sqrt(2 / count)
    first, second = (held(noisy, c)[0][:20] - held(plain, c)[0][:20] for c in (0, 1))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


def test_a_shift_and_a_factor_per_site_are_the_same_for_all_samples_and_splits_of_it(build):
    raw = hospitals()
    keys = {"kind": "iid", "clients": 4, "test_fraction": 0.3}
    plain = build(mine(hospitals), **keys)
    shifted = build(mine(hospitals), feature_shift=0.5, **keys)
    scaled = build(mine(hospitals), feature_scale=0.4, **keys)
    rows = np.concatenate(
        [r for s in ("train", "test") for r in plain.clients(range(4), split=s).rows]
    )
    pool = np.asarray(raw.features, dtype=np.float32)[rows].astype(np.float64)
    mean, deviation = pool.mean(axis=0), pool.std(axis=0)
    shifts, factors = [], []
    for client_id in range(4):
        seen = {}
        for split in ("train", "test"):
            before = held(plain, client_id, split)[0].astype(np.float64)
            moved = (held(shifted, client_id, split)[0] - before)[:, deviation > 0]
            units = moved / deviation[deviation > 0]
            np.testing.assert_allclose(units, units[:1].repeat(len(units), 0), atol=1e-5)
            stretched = (held(scaled, client_id, split)[0] - mean)[:, deviation > 0]
            ratio = stretched / (before - mean)[:, deviation > 0]
            np.testing.assert_allclose(ratio, np.tile(np.median(ratio, 0), (len(ratio), 1)), 1e-3)
            seen[split] = (units[0], np.median(ratio, axis=0))
        np.testing.assert_allclose(seen["train"][0], seen["test"][0], atol=1e-5)
        np.testing.assert_allclose(seen["train"][1], seen["test"][1], rtol=1e-4)
        shifts.append(seen["train"][0])
        factors.append(np.log(seen["train"][1]))
        np.testing.assert_array_equal(held(shifted, client_id)[0][:, 2], 5)  # it does not vary
    assert len({tuple(np.round(shift, 6)) for shift in shifts}) == 4
    assert 0.5 / 3 < np.std(shifts) < 0.5 * 3
    assert 0.4 / 3 < np.std(factors) < 0.4 * 3


def test_shifts_and_factors_have_the_spread_that_is_asked_for():
    clients = 4000
    pool = np.tile(np.array([[-1.0], [1.0]], dtype=np.float32), (clients, 2))
    offsets, rows = np.arange(clients + 1) * 2, np.arange(2 * clients)
    for key, value in (("feature_shift", 0.7), ("feature_scale", 0.3)):
        made = skewed(pool, offsets, rows, FeatureSkew(**{key: value}), 5).reshape(clients, 2, 2)
        found = made.mean(axis=1) if key == "feature_shift" else np.log(np.ptp(made, axis=1) / 2)
        error = value / math.sqrt(2 * found.size)
        assert abs(found.std() - value) <= 4 * error
        assert abs(found.mean()) <= 4 * value / math.sqrt(found.size)


def test_skew_of_images_is_per_channel_and_not_per_pixel(build):
    plain, shifted = (
        build(DIGITS, kind="iid", clients=3, **k) for k in ({}, {"feature_shift": 1.0})
    )
    moved = held(shifted, 0)[0] - held(plain, 0)[0]
    assert np.ptp(moved) < 1e-5
    assert abs(moved.mean()) > 1e-3


@pytest.mark.parametrize(
    "skew",
    [{"rotation": 30.0}, {"feature_noise": 0.1}, {"feature_shift": 1.0}, {"feature_scale": 1.0}],
)
def test_skew_changes_the_clients_samples_alone_and_is_part_of_the_manifest(build, skew):
    keys = {"kind": "dirichlet", "clients": 6, "test_fraction": 0.2}
    plain, other = build(DIGITS, **keys), build(DIGITS, **keys, **skew)
    np.testing.assert_array_equal(plain.test.features, other.test.features)
    for client_id in range(6):
        for split in ("train", "test"):
            one, two = (d.clients([client_id], split=split) for d in (plain, other))
            np.testing.assert_array_equal(one.rows[0], two.rows[0])
            np.testing.assert_array_equal(held(plain, client_id)[1], held(other, client_id)[1])
    assert plain.manifest_sha256 != other.manifest_sha256
    assert plain.manifest["sha256"]["features"] == other.manifest["sha256"]["features"]
    again = build(DIGITS, seed=1, **keys, **skew)
    assert (
        again.manifest["sha256"]["client_features"] != other.manifest["sha256"]["client_features"]
    )
    assert other.clients([0]).features.dtype == np.float32


@given(seed=st.integers(0, 2**40), clients=st.integers(1, 6))
def test_what_happens_to_a_client_depends_on_seed_and_client_and_not_on_the_others(seed, clients):
    pool = generator(seed, "pool").standard_normal((24, 3)).astype(np.float32)
    rows = np.arange(24)
    skew = FeatureSkew(feature_shift=0.5, feature_scale=0.5)
    few = np.array([0, 4, 24])
    many = np.array([0, 4, *np.linspace(4, 24, clients + 1)[1:].astype(int)])
    one, two = (skewed(pool, offsets, rows, skew, seed) for offsets in (few, many))
    np.testing.assert_array_equal(one[:4], two[:4])


@pytest.mark.parametrize(
    ("data", "keys", "message"),
    [
        (numbers, {"label_noise": 0.1}, r"\[partition\] label_noise: the targets are numbers"),
        (numbers, {"rotation": 5.0}, r"rotation = 5.0: only images .* shape \(3,\); leave it out"),
        (texts, {"feature_noise": 0.1}, "feature_noise: the features are tokens and not numbers"),
    ],
)
def test_skew_that_the_data_cannot_have_is_refused(build, data, keys, message):
    with pytest.raises(ScenarioError, match=message):
        build(mine(data), kind="iid", clients=4, **keys)


@pytest.mark.parametrize("key", ["label_noise", "rotation", "feature_noise", "feature_shift"])
def test_generated_clients_differ_by_their_own_keys(key):
    with pytest.raises(
        ScenarioError, match=rf"{key} with \[data\] name = \"synthetic\": its alpha"
    ):
        prepare({"name": "synthetic"}, {"kind": "natural", "clients": 3, key: 0.5}, seed=0)


def test_targets_that_are_numbers_are_divided_by_their_tenths(build):
    data = build(mine(numbers), kind="shards", clients=12, shards_per_client=1)
    targets = [held(data, client_id)[1] for client_id in range(12)]
    spans = sorted((t.min(), t.max()) for t in targets)
    # a shard spans one tenth, or the border of two: never the whole range
    assert max(high - low for low, high in spans) < np.ptp(np.concatenate(targets)) / 1.5
    assert data.manifest["held_out"]["drawn"] == "stratified by tenth of the targets"


def test_an_unused_spec_is_checked_before_anything_is_drawn():
    FeatureSkew(feature_noise=1.0).check_samples(SampleSpec((4,), 2))
    with pytest.raises(ScenarioError, match="rotation"):
        FeatureSkew(rotation=(1.0,)).check_samples(SampleSpec((4,), 2))
