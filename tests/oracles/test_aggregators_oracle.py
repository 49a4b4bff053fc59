"""Every robust rule and what comes before it against the papers, on random and hostile updates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim import aggregators
from fedsim.aggregators import Recipe, Round
from fedsim.aggregators.updates import Updates
from tests.oracles import robust_oracle as oracle
from tests.property.kinds import KINDS

DIM = 9


def random_updates(clients, seed, dim=DIM):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(clients, dim)))


def attacked(clients, num_byzantine, seed, size):
    """Updates of which f are copies of one that is far away, as colluding attackers send."""
    rows = random_updates(clients, seed) + 1
    rows[:num_byzantine] = size * random_updates(1, seed + 1)
    return rows


def given_round(num_byzantine, clients, seed=0, centre=None, examples=None):
    centre = torch.zeros(DIM, dtype=torch.float64) if centre is None else centre
    return Round(num_byzantine, np.random.default_rng(seed), centre, examples)


def aggregate(rows, num_byzantine, **recipe):
    made = Recipe(num_byzantine=num_byzantine, **recipe)
    assert made.check(len(rows)) == num_byzantine
    return made.aggregate(Updates.of(rows), given_round(num_byzantine, len(rows)))


def assert_near(found, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


ORACLES = {
    ("coordinate_median", "paper"): lambda rows, f: oracle.coordinate_median(rows),
    ("coordinate_median", "flag"): lambda rows, f: oracle.lower_median(rows),
    ("trimmed_mean", "paper"): oracle.trimmed_mean,
    ("krum", "paper"): lambda rows, f: oracle.multi_krum(rows, f, 1),
    ("multi_krum", "paper"): oracle.multi_krum,
    ("multi_krum", "flag"): oracle.flag_multi_krum,
    ("bulyan", "paper"): oracle.bulyan,
    ("bulyan", "flag"): oracle.flag_bulyan,
    ("meamed", "paper"): oracle.meamed,
    ("meamed", "flag"): oracle.flag_meamed,
    ("phocas", "paper"): oracle.phocas,
    ("unit_mean", "paper"): lambda rows, f: oracle.unit_mean(rows),
}
each_rule = pytest.mark.parametrize(("rule", "variant"), ORACLES)


@each_rule
@given(seed=st.integers(0, 2**32), f=st.integers(1, 3), more=st.integers(3, 6))
def test_random_updates_give_the_papers_aggregate(rule, variant, seed, f, more):
    rows = random_updates(4 * f + more, seed)
    found = aggregate(rows, f, rule=rule, variant=variant)
    assert_near(found, ORACLES[rule, variant](rows.numpy(), f))


TIED = (
    "duplicates", "mirrored", "lattice", "equidistant", "clusters", "one_dimension",
    "whole_numbers",
)  # fmt: skip


@each_rule
@pytest.mark.parametrize("kind", TIED)
def test_ties_are_broken_as_specified(rule, variant, kind):
    """The oracles break ties by the same text and not by the same code."""
    for seed in range(6):
        draw = np.random.default_rng(seed)
        f = 1 + seed % 2
        rows = KINDS[kind](draw, 4 * f + 3 + seed // 2, 5)
        found = aggregate(torch.from_numpy(rows), f, rule=rule, variant=variant)
        assert_near(found, ORACLES[rule, variant](rows, f), 1e-11)


@pytest.mark.parametrize("kind", TIED)
def test_equally_near_updates_are_mixed_as_specified(kind):
    for seed in range(6):
        draw = np.random.default_rng(seed)
        rows = KINDS[kind](draw, 5 + seed, 5)
        found = aggregate(torch.from_numpy(rows), 2, rule="trimmed_mean", before=["nnm"])
        mixed = oracle.nearest_neighbour_mixing(rows, 2)
        assert_near(found, oracle.trimmed_mean(mixed, 2), 1e-11)


@each_rule
@pytest.mark.parametrize("size", [1.0, 1e9])
def test_colluding_updates_give_it_too(rule, variant, size):
    rows = attacked(15, 3, 5, size)
    found = aggregate(rows, 3, rule=rule, variant=variant)
    assert_near(found, ORACLES[rule, variant](rows.numpy(), 3))


@pytest.mark.parametrize("rule", ["trimmed_mean", "meamed", "phocas", "bulyan"])
def test_the_kernel_is_the_rule_in_the_updates_dtype(rule):
    rows = random_updates(11, 1).float()
    found = getattr(aggregators, rule)(rows, num_byzantine=2)
    assert found.dtype == torch.float32
    assert_near(found, ORACLES[rule, "paper"](rows.numpy(), 2), 1e-6)
    broken = torch.cat([rows, torch.full((1, DIM), math.nan)])
    assert torch.equal(getattr(aggregators, rule)(broken, num_byzantine=2), found)
    assert not getattr(aggregators, rule)(rows[:0], num_byzantine=0).any()


@pytest.mark.parametrize("rule", ["trimmed_mean", "meamed", "phocas", "bulyan", "multi_krum"])
def test_without_byzantine_updates_every_rule_is_the_mean(rule):
    for clients in (1, 2, 5):
        rows = random_updates(clients, 3)
        assert_near(getattr(aggregators, rule)(rows, num_byzantine=0), rows.mean(dim=0))


@pytest.mark.parametrize(
    ("rule", "variant", "clients", "f"),
    [
        ("krum", "paper", 3, 0), ("krum", "byzfl", 3, 1), ("krum", "flower", 3, 0),
        ("bulyan", "paper", 7, 1), ("bulyan", "paper", 11, 2), ("bulyan", "paper", 15, 3),
    ],
)  # fmt: skip
def test_neither_rows_nor_columns_nor_rounding_decide_between_the_two_nearest(
    rule, variant, clients, f
):
    """With one neighbour they always have equal scores: Krum of three, the last steps of Bulyan."""
    examples = torch.ones(clients, dtype=torch.float64)
    made = Recipe(rule=rule, variant=variant)

    def result(rows):
        return made.aggregate(Updates(rows), given_round(f, clients, examples=examples))

    for seed in range(60):
        draw = np.random.default_rng(seed)
        rows = random_updates(clients, seed)
        order, columns = draw.permutation(clients), draw.permutation(DIM)
        rounded = rows * torch.from_numpy(1 + 1e-15 * draw.uniform(-1, 1, size=rows.shape))
        found = result(rows)
        assert_near(result(rows[order]), found)
        assert_near(result(rows[:, columns]), found[columns])
        assert_near(result(3 * rows), 3 * found)
        assert_near(result(rounded), found)


# --- the geometric median -------------------------------------------------------------------------


def assert_is_least(rows, found, weights=None):
    """No point near by, and none of the updates, has a smaller sum of distances; and it is flat."""
    rows, found = rows.numpy(), np.asarray(found)
    apart = rows - found
    lengths = np.linalg.norm(apart, axis=1)
    shares = np.ones(len(rows)) if weights is None else weights.numpy()
    away = lengths > 1e-9 * np.median(np.linalg.norm(rows, axis=1))
    pull = (shares[away, None] * apart[away] / lengths[away, None]).sum(axis=0)
    held = shares[~away].sum()  # an update that is the median holds against a pull up to its weight
    assert np.linalg.norm(pull) <= held + 1e-10 * shares.sum()


@given(
    seed=st.integers(0, 2**32),
    clients=st.integers(3, 20),
    dim=st.integers(2, 30),
    power=st.floats(-3, 9),
)
def test_nothing_is_nearer_to_all_than_the_geometric_median(seed, clients, dim, power):
    rows = random_updates(clients, seed, dim)
    rows[: clients // 3] *= 10**power
    assert_is_least(rows, aggregators.geometric_median(rows))


@given(seed=st.integers(0, 2**32), clients=st.integers(3, 12))
def test_weights_count_as_copies(seed, clients):
    rows = random_updates(clients, seed)
    copies = torch.from_numpy(np.random.default_rng(seed).integers(1, 4, size=clients))
    weighted = aggregators.geometric_median(rows, weights=copies)
    assert_is_least(rows, weighted, copies.double())
    assert_near(weighted, aggregators.geometric_median(rows.repeat_interleave(copies, dim=0)), 1e-9)


def test_the_geometric_median_by_hand():
    """Fermat's point of a triangle with an angle of 120 degrees is that corner; of a square's
    corners, the middle; of an equilateral triangle, its centre."""
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]).double()
    assert_near(aggregators.geometric_median(square), [1, 1])
    wide = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.6, 0.5]]).double()
    assert_near(aggregators.geometric_median(wide), [0, 0])
    even = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]]).double()
    assert_near(aggregators.geometric_median(even), [0.5, math.sqrt(0.75) / 3])
    line = torch.tensor([[0.0], [7.0], [1.0], [90.0], [2.0]]).double()
    assert_near(aggregators.geometric_median(line), [2])


@pytest.mark.parametrize("steps", [[0, 1], [5, 0, 1, -90], [2, 2, 0, 0], [0, 7, 7, 0, 9, -9]])
def test_of_a_segment_of_medians_it_is_the_middle(steps):
    start, way = random_updates(2, 4)
    rows = start + torch.tensor(steps).double()[:, None] * way
    middle = start + way * float(np.median(steps))
    assert_near(aggregators.geometric_median(rows), middle, 1e-14)
    assert_near(aggregators.geometric_median(rows.flip(0)), middle, 1e-14)


def test_a_flat_valley_is_followed_to_its_lowest_point():
    """x, -x, y and -y almost on a line: the sum is least at zero and hardly larger beside it."""
    rows = torch.tensor([[0.0785, 0.4911], [0.2528, 1.4248]]).double()
    assert_near(aggregators.geometric_median(torch.cat([rows, -rows])), [0, 0], 1e-9)


@pytest.mark.parametrize("size", [1e12, 1e200, 1e307])
def test_a_minority_cannot_take_the_geometric_median_away(size):
    rows = attacked(11, 5, 7, size)
    honest = rows[5:].numpy()
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    found = aggregators.geometric_median(rows)
    assert np.linalg.norm(found.numpy() - honest.mean(axis=0)) < 12 * spread
    if size < 1e100:
        assert_is_least(rows, found)


def test_copies_of_one_update_are_their_own_geometric_median():
    rows = random_updates(1, 2).expand(6, -1)
    assert torch.equal(aggregators.geometric_median(rows), rows[0])
    with_others = torch.cat([rows, random_updates(5, 3)])
    assert_near(aggregators.geometric_median(with_others), rows[0], 1e-15)


def test_weights_that_are_none_are_refused():
    with pytest.raises(ValueError, match="weights: must be > 0, one per update"):
        aggregators.geometric_median(random_updates(3, 0), weights=torch.tensor([1.0, 0.0, 1.0]))


# --- centred clipping -----------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), radius=st.floats(0.1, 5), iterations=st.integers(1, 4))
def test_centred_clipping_equals_the_paper(seed, radius, iterations):
    rows, centre = random_updates(7, seed), random_updates(1, seed + 1)[0]
    found = aggregators.centred_clipping(rows, radius=radius, iterations=iterations, centre=centre)
    expected = oracle.centred_clipping(rows.numpy(), radius, iterations, centre.numpy())
    assert_near(found, expected)


def test_by_default_it_clips_to_the_median_distance():
    rows = random_updates(7, 4)
    found = aggregate(rows, 2, rule="centred_clipping")
    radius = np.median(np.linalg.norm(rows, axis=1))
    assert_near(found, oracle.centred_clipping(rows.numpy(), radius, 1, np.zeros(DIM)))


# --- what comes before ----------------------------------------------------------------------------

BEFORE = {
    "nnm": ({}, lambda rows, f: oracle.nearest_neighbour_mixing(rows, f)),
    "clipping": ({"clip_norm": 2.0}, lambda rows, f: oracle.clipping(rows, 2.0)),
    "arc": ({}, oracle.adaptive_clipping),
    "bucketing": (
        {"bucket_size": 3},
        lambda rows, f: np.array([
            rows[part].mean(axis=0)
            for part in np.split(np.random.default_rng(0).permutation(len(rows)), [3, 6, 9, 12, 15])
            if len(part)
        ]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", ["coordinate_median", "multi_krum", "mean", "phocas"])
@pytest.mark.parametrize("name", BEFORE)
def test_a_rule_sees_what_comes_before(name, rule):
    """Bucketing leaves 6 of 17 updates: too few for Krum with f = 2."""
    options, made = BEFORE[name]
    f = 1 if name == "bucketing" else 2
    f = 0 if rule == "mean" else f
    rows = random_updates(17, 6)
    mixed = made(rows.numpy(), f)
    expected = mixed.mean(axis=0) if rule == "mean" else ORACLES[rule, "paper"](mixed, f)
    assert_near(aggregate(rows, f, rule=rule, before=[name], **options), expected)


def test_a_bucket_has_the_examples_of_all_who_are_in_it():
    """Flower's Multi-Krum weighs by examples."""
    rows, examples = random_updates(9, 6), torch.arange(1.0, 10).double()
    recipe = {"rule": "multi_krum", "variant": "flower", "num_selected": 5}
    made = Recipe(num_byzantine=0, before=["bucketing"], **recipe)
    found = made.aggregate(Updates(rows), given_round(0, 9, examples=examples))
    order = np.random.default_rng(0).permutation(9)
    buckets = [order[:2], order[2:4], order[4:6], order[6:8], order[8:]]
    means = torch.stack([rows[bucket].mean(dim=0) for bucket in buckets])
    sums = torch.stack([examples[bucket].sum() for bucket in buckets])
    assert_near(found, sums @ means / sums.sum())


def test_several_things_come_before_in_their_order():
    rows = random_updates(9, 8)
    clipped = oracle.nearest_neighbour_mixing(oracle.clipping(rows.numpy(), 2.0), 2)
    found = aggregate(rows, 2, rule="phocas", before=["clipping", "nnm"], clip_norm=2.0)
    assert_near(found, oracle.phocas(clipped, 2))
    mixed = oracle.clipping(oracle.nearest_neighbour_mixing(rows.numpy(), 2), 0.5)
    found = aggregate(rows, 2, rule="phocas", before=["nnm", "clipping"], clip_norm=0.5)
    assert_near(found, oracle.phocas(mixed, 2))


@pytest.mark.parametrize("rule", ["geometric_median", "centred_clipping", "unit_mean", "bulyan"])
def test_mixed_updates_are_updates_to_every_rule(rule):
    rows = random_updates(11, 9)
    found = aggregate(rows, 2, rule=rule, before=["nnm"])
    mixed = torch.from_numpy(oracle.nearest_neighbour_mixing(rows.numpy(), 2))
    assert_near(found, aggregate(mixed, 2, rule=rule), 1e-9)


def test_updates_are_read_in_blocks_and_from_a_reference():
    """20000 columns are three blocks; each client started from a model of its own."""
    rows, start = random_updates(11, 2, 20_000), random_updates(11, 3, 20_000)
    for name in ("geometric_median", "bulyan", "centred_clipping", "phocas"):
        made = Recipe(rule=name, num_byzantine=2, before=["nnm"])
        centre = torch.ones(20_000, dtype=torch.float64)
        whole, parts = (
            made.aggregate(updates, given_round(2, 11, centre=centre))
            for updates in (Updates(rows - start), Updates(rows, start))
        )
        assert_near(parts, whole, 1e-11)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clients", "recipe", "words"),
    [
        (4, {"rule": "phocas", "num_byzantine": 2}, r"2 num_byzantine \+ 1 = 5; use at most 1"),
        (6, {"rule": "krum", "num_byzantine": 2}, r"2 num_byzantine \+ 3 = 7; use at most 1"),
        (10, {"rule": "bulyan", "num_byzantine": 2}, r"4 num_byzantine \+ 3 = 11; use at most 1"),
        (
            9,
            {"rule": "phocas", "num_byzantine": 3, "before": ["bucketing"]},
            r"with 5 updates.* = 7; use at most 2 \(of 9 updates\)",
        ),
    ],
)  # fmt: skip
def test_an_impossible_f_is_refused_with_the_bound(clients, recipe, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**recipe).check(clients)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"rule": "median"}, "rule = 'median': must be mean or coordinate_median or"),
        ({"rule": "phocas", "variant": "flower"}, "is not defined; allowed: paper"),
        ({"num_byzantine": -1}, "num_byzantine = -1: must be >= 0"),
        ({"rule": "krum", "num_selected": 2}, "num_selected = 2: is without effect with rule"),
        ({"clip_radius": 2.0}, "clip_radius = 2.0: is without effect with rule = 'trimmed_mean'"),
        ({"bucket_size": 3}, r"bucket_size = 3: is without effect with before = \[\]"),
        ({"before": ["nmm"]}, "before = 'nmm': must be nnm or bucketing"),
        ({"rule": "centred_clipping", "clip_radius": 0.0}, "clip_radius = 0.0: must be > 0"),
        (
            {"rule": "mean", "num_byzantine": 1},
            "a mean bears none, whatever comes before it; use at most 0",
        ),
    ],
)
def test_impossible_recipes_are_refused(recipe, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**recipe)


@pytest.mark.parametrize(
    ("recipe", "bears"),
    [
        ({"rule": "mean"}, 0),
        ({"rule": "mean", "before": ["nnm"]}, 0),
        ({"rule": "phocas"}, 9),
        ({"rule": "krum"}, 8),
        ({"rule": "krum", "variant": "byzfl"}, 9),
        ({"rule": "bulyan"}, 4),
        ({"rule": "bulyan", "before": ["bucketing"]}, 1),
    ],
)
def test_by_default_f_is_the_most_that_20_updates_bear(recipe, bears):
    assert Recipe(**recipe).check(20) == bears
    Recipe(**recipe, num_byzantine=bears).check(20)
    with pytest.raises(ValueError, match="num_byzantine"):
        Recipe(**recipe, num_byzantine=bears + 1).check(20)
