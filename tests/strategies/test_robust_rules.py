"""Robust, UnitMean, CoordinateMedian and MultiKrum as strategies: what becomes of a round."""

import functools

import numpy as np
import pytest
import torch

from fedsim.aggregators import rules
from fedsim.basics.errors import RunError
from fedsim.engine.inline import InlineGrid
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from fedsim.strategy.declarations import NoState
from strategies.coordinate_median import CoordinateMedian
from strategies.multi_krum import MultiKrum
from strategies.robust import Robust
from strategies.unit_mean import UnitMean
from tests.laws import federations as fed
from tests.oracles import robust_oracle as oracle

DIM = 6
LAYOUT = Layout.from_named({"w": torch.zeros(DIM, dtype=torch.float64)})
START = torch.linspace(-1, 1, DIM, dtype=torch.float64)


def replies(params, updates, server_round=1):
    return Replies(
        server_round=server_round,
        layout=LAYOUT,
        client_ids=np.arange(len(updates)),
        params=params + updates,
        reference=params,
        buffers={},
        extra={},
        num_examples=torch.arange(len(updates)),
        metrics={},
        staleness=torch.zeros(len(updates), dtype=torch.int64),
    )


def updates_of(server_round, clients=7):
    draw = np.random.default_rng(server_round)
    return torch.from_numpy(draw.normal(size=(clients, DIM)))


def median_length(updates):
    return np.median(np.linalg.norm(updates, axis=1))


STEPS = {
    "unit_mean": (UnitMean, {}, oracle.unit_mean),
    "unit_mean, median": (
        UnitMean,
        {"scale": "median"},
        lambda updates: median_length(updates) * oracle.unit_mean(updates),
    ),
    "coordinate_median": (CoordinateMedian, {}, oracle.coordinate_median),
    "multi_krum": (MultiKrum, {}, lambda updates: oracle.multi_krum(updates, 2)),
    "multi_krum, f": (
        MultiKrum,
        {"num_byzantine": 1},
        lambda updates: oracle.multi_krum(updates, 1),
    ),
    "krum": (
        MultiKrum,
        {"num_byzantine": 1, "num_selected": 1},
        lambda updates: oracle.multi_krum(updates, 1, 1),
    ),
    "trimmed_mean": (Robust, {}, lambda updates: oracle.trimmed_mean(updates, 3)),
    "bulyan": (Robust, {"rule": "bulyan"}, lambda updates: oracle.bulyan(updates, 1)),
    "nnm, phocas": (
        Robust,
        {"rule": "phocas", "before": ["nnm"], "num_byzantine": 2},
        lambda updates: oracle.phocas(oracle.nearest_neighbour_mixing(updates, 2), 2),
    ),
    "flag's krum": (
        Robust,
        {"rule": "multi_krum", "variant": "flag", "num_byzantine": 1},
        lambda updates: oracle.flag_multi_krum(updates, 1),
    ),
}


@pytest.mark.parametrize("server_lr", [1.0, 0.3])
@pytest.mark.parametrize("name", STEPS)
def test_three_rounds_equal_the_oracle(name, server_lr):
    build, options, aggregate = STEPS[name]
    strategy = build(server_lr=server_lr, **options)
    params, state, model = START, strategy.init(START, 9), START.numpy()
    for server_round in (1, 2, 3):
        updates = updates_of(server_round)
        sent = replies(params, updates, server_round)
        params, state, _ = strategy.server_update(state, params, sent)
        model = model + server_lr * aggregate(updates.numpy())
    np.testing.assert_allclose(params.numpy(), model, rtol=0, atol=1e-13)


def test_centred_clipping_remembers_the_update_of_the_round_before():
    strategy = Robust(rule="centred_clipping", clip_radius=0.7, clip_iterations=2, server_lr=0.5)
    params, state, centre = START, strategy.init(START, 9), np.zeros(DIM)
    model = START.numpy()
    for server_round in (1, 2, 3):
        updates = updates_of(server_round)
        params, state, _ = strategy.server_update(state, params, replies(params, updates))
        centre = oracle.centred_clipping(updates.numpy(), 0.7, 2, centre)
        model = model + 0.5 * centre
    np.testing.assert_allclose(params.numpy(), model, rtol=0, atol=1e-13)
    np.testing.assert_allclose(state.centre.numpy(), centre, rtol=0, atol=1e-13)


def test_flowers_krum_weighs_by_examples():
    strategy = Robust(rule="multi_krum", variant="flower", num_byzantine=1, num_selected=7)
    updates = updates_of(1)
    moved, _, _ = strategy.server_update(strategy.init(START, 7), START, replies(START, updates))
    expected = np.average(updates.numpy(), axis=0, weights=np.arange(7))
    np.testing.assert_allclose((moved - START).numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        ({"rule": "coordinate_median"}, CoordinateMedian()),
        ({"rule": "multi_krum", "num_byzantine": 2}, MultiKrum(num_byzantine=2)),
        ({"rule": "unit_mean"}, UnitMean()),
    ],
)
def test_a_rule_has_the_bits_of_the_strategy_of_its_name(rule, other):
    sent = replies(START.float(), updates_of(1, 8).float())
    strategy = Robust(**rule)
    moved, _, _ = strategy.server_update(strategy.init(START, 8), START.float(), sent)
    expected, _, _ = other.server_update(NoState(), START.float(), sent)
    assert torch.equal(moved, expected)


def test_buckets_are_drawn_anew_in_every_round_and_from_the_seed():
    def moved(server_round, seed):
        strategy = Robust(before=["bucketing"], num_byzantine=1)
        strategy.declare_seed(seed)
        sent = replies(START, updates_of(1, 9), server_round)
        return strategy.server_update(strategy.init(START, 9), START, sent)[0]

    assert torch.equal(moved(1, 3), moved(1, 3))
    assert not torch.equal(moved(1, 3), moved(2, 3))
    assert not torch.equal(moved(1, 3), moved(1, 4))


SMALL = [
    UnitMean, CoordinateMedian, MultiKrum, Robust,
    *(functools.partial(Robust, rule=rule, before=["nnm"]) for rule in rules()),
    functools.partial(Robust, rule="bulyan", before=["bucketing", "arc", "clipping"]),
]  # fmt: skip


@pytest.mark.parametrize("build", SMALL, ids=lambda build: repr(getattr(build, "keywords", build)))
def test_cohorts_of_any_size_serve_and_nobody_leaves_the_model_as_it_is(build):
    strategy = build()
    for clients in range(10):
        state = strategy.init(START, max(1, clients))
        sent = replies(START, updates_of(1, clients))
        moved, _, metrics = strategy.server_update(state, START, sent)
        assert torch.equal(moved, START) == (clients == 0)
        assert torch.isfinite(moved).all()
        assert clients or metrics == {}


@pytest.mark.parametrize("build", [UnitMean, CoordinateMedian, MultiKrum])
def test_single_precision_models_stay_so(build):
    start = START.float()
    sent = replies(start, updates_of(1).float())
    moved, _, _ = build().server_update(NoState(), start, sent)
    assert moved.dtype == torch.float32


@pytest.mark.parametrize(("clients", "tolerated"), [(1, 0), (4, 0), (5, 1), (6, 1), (7, 2), (9, 3)])
def test_multi_krum_tolerates_by_default_what_the_cohort_bears(clients, tolerated):
    sent = replies(START, updates_of(1, clients))
    _, _, metrics = MultiKrum().server_update(NoState(), START, sent)
    assert metrics == {"num_byzantine": tolerated}


@pytest.mark.parametrize("build", [CoordinateMedian, MultiKrum])
def test_far_away_attackers_move_the_model_nowhere(build):
    updates = updates_of(1, 9) * 0.1 + 1
    updates[[2, 5]] = -1e9
    moved, _, _ = build().server_update(NoState(), START, replies(START, updates))
    assert ((moved - START) - 1).abs().max() < 0.4


def test_a_cohort_too_small_for_multi_krum_names_the_numbers():
    strategy = MultiKrum(num_byzantine=2)
    few = replies(START, updates_of(1, 6), server_round=4)
    with pytest.raises(RunError, match=r"round 4: num_byzantine = 2 with 6 updates.* = 7; use at"):
        strategy.server_update(strategy.init(START, 20), START, few)


def test_robust_rules_refuse_what_they_cannot_bear_at_the_start_and_in_a_round():
    strategy = Robust(rule="bulyan", num_byzantine=2)
    with pytest.raises(ValueError, match=r"4 num_byzantine \+ 3 = 11; use at most 1"):
        strategy.check(100, 10)
    few = replies(START, updates_of(1, 10), server_round=4)
    with pytest.raises(RunError, match=r"round 4: num_byzantine = 2 with 10 updates.* = 11"):
        strategy.server_update(strategy.init(START, 20), START, few)


def test_a_federation_too_small_for_multi_krum_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"num_byzantine = 2 with 6 updates: must be such"):
        MultiKrum(num_byzantine=2).check(100, 6)
    with pytest.raises(ValueError, match=r"num_selected = 7: must be in 1..6"):
        MultiKrum(num_selected=7).check(100, 6)
    MultiKrum(num_byzantine=2).check(7, 7)
    MultiKrum().check(1, 1)


@pytest.mark.parametrize(
    ("build", "arguments", "words"),
    [
        (UnitMean, {"server_lr": 0.0}, "server_lr = 0.0: must be > 0 and finite"),
        (UnitMean, {"scale": "subspace"}, "scale = 'subspace': must be workers or median"),
        (CoordinateMedian, {"server_lr": -1.0}, "server_lr = -1.0: must be > 0 and finite"),
        (MultiKrum, {"num_byzantine": -1}, "num_byzantine = -1: must be >= 0"),
        (MultiKrum, {"num_selected": 0}, "num_selected = 0: must be >= 1"),
        (Robust, {"server_lr": 0.0}, "server_lr = 0.0: must be > 0 and finite"),
        (Robust, {"rule": "phocas", "variant": "flag"}, "is not defined; allowed: paper"),
        (Robust, {"num_selected": 3}, "num_selected = 3: is without effect"),
        (MultiKrum, {"server_lr": float("inf")}, "server_lr = inf: must be > 0 and finite"),
    ],
)
def test_impossible_settings_are_refused(build, arguments, words):
    with pytest.raises(ValueError, match=words):
        build(**arguments)


class Attacked(InlineGrid):
    """Two of eight clients reply models that are far away."""

    def send_and_receive(self, messages, *, timeout=None):
        received = super().send_and_receive(messages, timeout=timeout)
        received.params[[2, 6]] += 1e4
        return received


def test_over_a_grid_attackers_move_the_mean_alone():
    app, start = fed.make_app("logistic"), fed.initial_arrays()
    moved = {}
    for name in ("fedavg", "unit_mean", "coordinate_median", "multi_krum", "robust"):
        grid = Attacked(app, 8)
        arrays, _ = fed.run_rounds(fed.make_strategy(name), grid, start, app.layout, rounds=3)
        moved[name] = fed.largest_difference(arrays, start)
    assert moved.pop("fedavg") > 1e3
    assert max(moved.values()) < 3
