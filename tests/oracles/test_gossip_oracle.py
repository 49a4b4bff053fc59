"""The gossip kernels and strategies against the oracle and the numbers of the specification."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedsim.aggregators.averaging import plain_average, rescale, variance
from fedsim.basics import rng
from fedsim.federation.topology.kinds import from_edges
from fedsim.federation.topology.named import TOPOLOGIES
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from strategies.gossip import GossipAveraging, variance_corrected_average
from strategies.variance_corrected_gossip import VarianceCorrectedGossip
from tests.oracles import gossip_oracle as oracle

DOUBLE = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def tensors(seed, neighbours, shape=(5, 3), spread=1.0):
    """A tensor and its neighbours', correlated to a varying degree."""
    draw = np.random.default_rng(seed)
    common = draw.normal(size=shape) * draw.uniform(0, 2)
    stack = (common + draw.normal(size=(neighbours + 1, *shape))) * spread + draw.normal()
    return stack[0], stack[1:], draw


# --- kernel against oracle ----------------------------------------------------------------


@given(
    st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([0.0, 0.2, 0.5, 0.98]),
    st.sampled_from(["received", "all"]), st.booleans(), st.sampled_from([1.0, 0.99, 1.01]),
)  # fmt: skip
def test_the_kernel_equals_the_oracle(seed, neighbours, beta, target, weighted, scale):
    own, received, draw = tensors(seed, neighbours)
    weights = draw.uniform(0.1, 3, size=neighbours) if weighted else None
    options = {"target": target, "weights": weights}
    expected = oracle.corrected_average(own, received, beta=beta, scale=scale, **options)
    plain = oracle.average(own, received, beta=beta, weights=weights)
    options["weights"] = None if weights is None else torch.from_numpy(weights)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        mine, theirs = torch.from_numpy(own).to(dtype), torch.from_numpy(received).to(dtype)
        found = variance_corrected_average(
            mine, theirs, self_weight=beta, target_scale=scale, **options
        )
        assert found.dtype == dtype
        np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance)
        found = plain_average(mine, theirs, self_weight=beta, weights=options["weights"])
        np.testing.assert_allclose(found.numpy(), plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_more(dtype):
    own, received, _ = tensors(1, 4, shape=(40, 30), spread=100.0)
    mine, theirs = torch.from_numpy(own).to(dtype), torch.from_numpy(received).to(dtype)
    found = variance_corrected_average(mine, theirs)
    expected = oracle.corrected_average(mine.double().numpy(), theirs.double().numpy())
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(expected).to(dtype))


@pytest.mark.gpu
def test_the_kernel_computes_the_same_on_a_gpu():
    own, received, _ = tensors(1, 4, shape=(40, 30))
    mine, theirs = torch.from_numpy(own), torch.from_numpy(received)
    theirs[2, 0, 0] = math.nan
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    there = variance_corrected_average(mine.cuda(), theirs.cuda(), weights=weights.cuda())
    here = variance_corrected_average(mine, theirs, weights=weights)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, **EXACT)


# --- the numbers of the specification, section (e) -----------------------------------------


@pytest.mark.parametrize(
    ("own", "received", "options", "mix", "numbers", "out"),
    [
        (
            (1, -1, 0, 0), [(0, 0, 1, -1)], {"target": "all"},
            (0.5, -0.5, 0.5, -0.5), (0.25, 0.5, 2**0.5), (0.707107, -0.707107, 0.707107, -0.707107),
        ),
        (
            (1, 2, 3, 4), [(2, 1, 4, 3)], {"target": "all"},
            (1.5, 1.5, 3.5, 3.5), (1, 1.25, 1.118034), (1.381966, 1.381966, 3.618034, 3.618034),
        ),
        (
            (2, 0, -2, 0), [(0, 1, 0, -1), (1, 1, -1, -1)], {},
            (1.25, 0.5, -1.25, -0.5), (0.90625, 0.75, 0.909718),
            (1.137147, 0.454859, -1.137147, -0.454859),
        ),
    ],
    ids=["uncorrelated", "correlated", "gossip form"],
)  # fmt: skip
def test_the_numbers_of_the_specification(own, received, options, mix, numbers, out):
    """Two equal weights of a set are beta = 1/2 with one neighbour and the target over all."""
    own, received = torch.tensor(own, dtype=DOUBLE), torch.tensor(received, dtype=DOUBLE)
    blended = plain_average(own, received)
    found = variance_corrected_average(own, received, **options)
    assert blended.tolist() == list(mix)
    assert float(variance(blended)) == numbers[0]
    assert float(variance(found)) == pytest.approx(numbers[1], rel=1e-14)
    assert math.sqrt(numbers[1] / numbers[0]) == pytest.approx(numbers[2], abs=5e-7)
    assert found.tolist() == pytest.approx(list(out), abs=5e-7)


def test_averaging_independent_tensors_divides_their_variance():
    draw = np.random.default_rng(0)
    eight = torch.from_numpy(draw.normal(scale=0.5, size=(9, 400, 500)))
    mean = plain_average(eight[0], eight[1:], self_weight=0.0)
    assert float(variance(mean)) == pytest.approx(0.25 / 8, rel=0.02)
    mixed = plain_average(eight[0], eight[1:])
    assert float(variance(mixed)) == pytest.approx(0.28125 * 0.25, rel=0.02)
    kept = variance_corrected_average(eight[0], eight[1:])
    assert float(variance(kept)) == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_factor_follows_the_mean_correlation(rho):
    """k tensors of equal variance and pairwise correlation rho: ((1 + (k - 1) rho) / k)^(-1/2)."""
    k = 4
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(200, k + 2)))[0]
    basis = np.linalg.qr(basis - basis.mean(axis=0))[0][:, : k + 1]  # orthonormal, of mean 0
    rows = np.sqrt(rho) * basis[:, 0] + np.sqrt(1 - rho) * basis[:, 1:].T
    stack = torch.from_numpy(rows * math.sqrt(200))
    out = variance_corrected_average(stack[0], stack[1:], self_weight=1 / k, target="all")
    mix = plain_average(stack[0], stack[1:], self_weight=1 / k)
    factor = float((variance(out) / variance(mix)).sqrt())
    assert factor == pytest.approx(((1 + (k - 1) * rho) / k) ** -0.5, rel=1e-9)


# --- edge cases -----------------------------------------------------------------------------


def test_exact_cancellation_and_constant_tensors_stay_as_averaged():
    own = torch.tensor([1.0, -2.0, 3.0])
    assert variance_corrected_average(own, -own[None]).tolist() == [0.0, 0.0, 0.0]
    constant = torch.full((2, 3), 0.1)
    assert torch.equal(variance_corrected_average(constant[0], constant[1:]), constant[0])
    zeros = torch.zeros(3, 4)
    assert torch.equal(variance_corrected_average(zeros, zeros[None]), zeros)


def test_next_to_nothing_is_not_stretched():
    """What cancellation leaves is rounding error; the limit is 1e-12 of the wanted variance."""
    left = torch.tensor([1.0, -1.0, 0.0], dtype=DOUBLE)
    assert torch.equal(rescale(1e-7 * left, 1.0), 1e-7 * left)
    assert float(variance(rescale(1e-5 * left, 1.0))) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
def test_a_single_element_is_averaged(shape):
    own, received = torch.full(shape, 1.0), torch.full((2, *shape), 4.0)
    assert torch.equal(variance_corrected_average(own, received), torch.full(shape, 2.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", [plain_average, variance_corrected_average])
def test_what_is_not_finite_is_discarded(kernel, bad):
    own, received, _ = (torch.from_numpy(t) if n < 2 else t for n, t in enumerate(tensors(3, 4)))
    broken = received.clone()
    broken[1, 2, 2] = bad
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    keep = [0, 2, 3]
    found = kernel(own, broken, weights=weights)
    assert torch.equal(found, kernel(own, received[keep], weights=weights[keep]))
    broken[:] = bad
    assert torch.equal(kernel(own, broken), own)
    assert torch.equal(kernel(own, broken[:0]), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_models_have_a_factor_of_exactly_one(dtype):
    own = torch.from_numpy(tensors(5, 1)[0]).to(dtype)
    received = own.expand(7, *own.shape)
    weights = torch.linspace(0.1, 3, 7)
    for target in ("received", "all"):
        found = variance_corrected_average(own, received, weights=weights, target=target)
        assert torch.equal(found, own)


def test_a_variance_that_is_not_finite_is_left_alone():
    huge = torch.tensor([1e200, -1e200, 0.0], dtype=DOUBLE)
    assert torch.equal(variance_corrected_average(huge, huge[None]), huge)
    assert torch.equal(rescale(huge / 1e200, math.inf), huge / 1e200)


@pytest.mark.parametrize(
    ("own", "received", "weights", "error", "message"),
    [
        (torch.ones(3).long(), torch.ones(2, 3), None, TypeError, "int64: only floating-point"),
        (torch.ones(3), torch.ones(2, 4), None, ValueError, r"\(2, 4\): must be \[neighbours, 3\]"),
        (torch.ones(3), torch.ones(2, 3), torch.ones(3), ValueError, "weights = .*one per neigh"),
        (torch.ones(3), torch.ones(2, 3), -torch.ones(2), ValueError, "weights = .*must be >= 0"),
    ],
    ids=["integers", "shape", "count", "sign"],
)  # fmt: skip
def test_what_cannot_be_averaged_is_refused(own, received, weights, error, message):
    with pytest.raises(error, match=message):
        variance_corrected_average(own, received, weights=weights)


def test_inputs_stay_as_they_were():
    own, received, _ = tensors(4, 3)
    mine, theirs = torch.from_numpy(own.copy()), torch.from_numpy(received.copy())
    variance_corrected_average(mine, theirs)
    assert np.array_equal(mine.numpy(), own)
    assert np.array_equal(theirs.numpy(), received)


# --- properties -----------------------------------------------------------------------------

SEEDS, DEGREES = st.integers(0, 2**32), st.integers(1, 8)
BETAS = st.floats(0, 1)


@given(SEEDS, DEGREES, BETAS, st.sampled_from(["received", "all"]))
def test_mean_and_variance_are_preserved_exactly(seed, neighbours, beta, target):
    own, received, draw = tensors(seed, neighbours)
    weights = draw.uniform(0.1, 2, size=neighbours)
    tau = np.average(received.var(axis=(1, 2)), weights=weights)
    tau = beta * own.var() + (1 - beta) * tau if target == "all" else tau
    mine, theirs, shares = map(torch.from_numpy, (own, received, weights))
    out = variance_corrected_average(mine, theirs, self_weight=beta, weights=shares, target=target)
    mix = plain_average(mine, theirs, self_weight=beta, weights=shares)
    assert float(variance(out)) == pytest.approx(tau, rel=1e-10)
    assert float(out.mean()) == pytest.approx(float(mix.mean()), rel=1e-10, abs=1e-10)


@given(SEEDS, DEGREES, BETAS, st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_scaling_and_shifting_commute_with_the_average(seed, neighbours, beta, a, b):
    own, received, _ = tensors(seed, neighbours)
    mine, theirs = torch.from_numpy(own), torch.from_numpy(received)
    before = variance_corrected_average(a * mine + b, a * theirs + b, self_weight=beta)
    after = a * variance_corrected_average(mine, theirs, self_weight=beta) + b
    torch.testing.assert_close(before, after, rtol=1e-8, atol=1e-8)


@given(SEEDS, DEGREES, st.randoms(use_true_random=False))
def test_neither_the_order_of_senders_nor_that_of_entries_matters(seed, neighbours, random):
    own, received, _ = tensors(seed, neighbours)
    mine, theirs = torch.from_numpy(own).reshape(-1), torch.from_numpy(received).reshape(-1, 15)
    out = variance_corrected_average(mine, theirs)
    senders, entries = list(range(neighbours)), list(range(15))
    random.shuffle(senders)
    random.shuffle(entries)
    torch.testing.assert_close(variance_corrected_average(mine, theirs[senders]), out, **EXACT)
    permuted = variance_corrected_average(mine[entries], theirs[:, entries])
    torch.testing.assert_close(permuted, out[entries], **EXACT)


@given(SEEDS, DEGREES, BETAS)
def test_the_factor_is_never_below_one_when_the_target_is_over_all(seed, neighbours, beta):
    own, received, draw = tensors(seed, neighbours)
    mine, theirs = torch.from_numpy(own), torch.from_numpy(received)
    weights = torch.from_numpy(draw.uniform(0.1, 2, size=neighbours))
    mix = plain_average(mine, theirs, self_weight=beta, weights=weights)
    assume(float(variance(mix)) > 1e-9)
    out = variance_corrected_average(mine, theirs, self_weight=beta, weights=weights, target="all")
    assert float(variance(out) / variance(mix)) >= 1 - 1e-12


# --- strategies -----------------------------------------------------------------------------

NODES = 6
EDGES = [(0, 1), (0, 2), (0, 3), (1, 2), (3, 4)]  # degrees 3, 2, 2, 2, 1 and an island, 5
GRAPH = [{b if a == node else a for a, b in EDGES if node in (a, b)} for node in range(NODES)]
SHAPES = {"w": (4, 3), "b": (4,), "v": (2, 4)}
LAYOUT = Layout.from_named({name: torch.zeros(shape).double() for name, shape in SHAPES.items()})
SEED = 3


def named(row):
    return {name: tensor.numpy() for name, tensor in LAYOUT.unflatten(row).items()}


def flat(models):
    return np.stack([np.concatenate([m[n].reshape(-1) for n in SHAPES]) for m in models])


def built(cls, layout=LAYOUT, **options):
    strategy = cls(**options)
    strategy.declare_layout(layout)
    strategy.declare_seed(SEED)
    return strategy


def replies(strategy, state, updates, layout=LAYOUT):
    """What the nodes in `updates` (by node, a flat update) return."""
    nodes = np.array(sorted(updates), dtype=np.int64)
    sent = strategy.broadcast(state, None, nodes)[1].params
    moves = [torch.as_tensor(updates[node]) for node in nodes.tolist()]
    none = torch.zeros(len(nodes), dtype=torch.int64)
    return Replies(
        server_round=state.tick + 1,
        layout=layout,
        client_ids=nodes,
        params=sent + torch.stack(moves) if moves else sent,
        reference=sent,
        buffers={},
        extra={},
        num_examples=none,
        metrics={},
        staleness=none,
    )


def play(strategy, cohorts, *, starts=None, params=None):
    """Rounds of made-up training; yields (updates, state, params, metrics, state before)."""
    params = torch.linspace(-1, 1, LAYOUT.dim).double() if params is None else params
    state = strategy.init(params, NODES)
    for server_round, cohort in enumerate(cohorts, start=1):
        draw = np.random.default_rng(server_round)
        moves = 0.3 * draw.normal(size=(NODES, LAYOUT.dim))
        online = np.array(cohort, dtype=np.int64)
        strategy._session = SimpleNamespace(participants=online)  # as configure_train leaves it
        chosen = strategy.select(state, online)
        updates = {node: moves[node] for node in chosen.tolist()}
        before = state
        params, state, metrics = strategy.server_update(
            before, params, replies(strategy, before, updates)
        )
        yield updates, before, state, params, metrics


def lost_messages(server_round, rate):
    """The messages that a round loses, by the keys that their draws are documented to have."""
    return {
        (sender, receiver)
        for sender in range(NODES)
        for receiver, number in zip(
            sorted(GRAPH[sender]),
            rng.generator(SEED, "message loss", server_round, sender).random(len(GRAPH[sender])),
            strict=True,
        )
        if number < rate
    }


COHORTS = ([0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [1, 2, 3, 4], [4], [], [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("loss", [0.0, 0.4], ids=["reliable", "lossy"])
@pytest.mark.parametrize(
    ("cls", "options", "corrected"),
    [
        (GossipAveraging, {}, ()),
        (GossipAveraging, {"self_weight": 0.2}, ()),
        (GossipAveraging, {"mixing": "metropolis"}, ()),
        (VarianceCorrectedGossip, {}, ("w", "v")),
        (VarianceCorrectedGossip, {"correct": "all"}, ("w", "b", "v")),
        (VarianceCorrectedGossip, {"target": "all", "self_weight": 0.3}, ("w", "v")),
        (VarianceCorrectedGossip, {"mixing": "metropolis", "target": "all"}, ("w", "v")),
        (VarianceCorrectedGossip, {"mixing": "metropolis", "target_scale": 1.1}, ("w", "v")),
    ],
    ids=str,
)
def test_synchronous_rounds_equal_the_oracle(cls, options, corrected, loss):
    """Six rounds: own starts, unequal degrees, an island, absent nodes, lost messages."""
    strategy = built(cls, topology=from_edges(EDGES), message_loss=loss, **options)
    models = None
    for number, (updates, before, state, params, _) in enumerate(play(strategy, COHORTS), start=1):
        models = [named(row) for row in before.models] if models is None else models
        models = oracle.synchronous_round(
            models, {node: named(torch.from_numpy(row)) for node, row in updates.items()}, GRAPH,
            beta=options.get("self_weight", 0.5), mixing=options.get("mixing", "uniform"),
            corrected=corrected, target=options.get("target", "received"),
            scale=options.get("target_scale", 1.0), lost=lost_messages(number, loss),
        )  # fmt: skip
        np.testing.assert_allclose(state.models.numpy(), flat(models), **EXACT)
        np.testing.assert_allclose(params.numpy(), flat(models).mean(axis=0), **EXACT)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("cls", "options", "corrected"),
    [
        (GossipAveraging, {"self_weight": 0.3}, ()),
        (VarianceCorrectedGossip, {}, ("w", "v")),
        (VarianceCorrectedGossip, {"target": "all", "correct": "all"}, ("w", "b", "v")),
    ],
    ids=str,
)
def test_buffered_ticks_equal_the_oracle(cls, options, corrected, ratio):
    strategy = built(
        cls, topology=from_edges(EDGES), protocol="buffered", interval=(1, 3), buffer_ratio=ratio,
        **options,
    )  # fmt: skip
    draw = np.random.default_rng(7)
    cohorts = [np.flatnonzero(draw.random(NODES) < 0.8) for _ in range(15)]
    played = list(play(strategy, cohorts))
    first = [named(row) for row in played[0][1].models]
    ticks = [
        ({n: named(torch.from_numpy(u)) for n, u in updates.items()}, cohort.tolist())
        for (updates, *_), cohort in zip(played, cohorts, strict=True)
    ]
    found = oracle.buffered_ticks(
        first, ticks, GRAPH, beta=options.get("self_weight", 0.5), ratio=ratio,
        corrected=corrected, target=options.get("target", "received"),
    )  # fmt: skip
    idle = 0
    for (models, averaged), (updates, _, state, _, metrics) in zip(found, played, strict=True):
        np.testing.assert_allclose(state.models.numpy(), flat(models), **EXACT)
        assert metrics["averaged"] == len(averaged)
        idle += len(set(averaged) - set(updates))
    assert idle, "nobody averaged without training, which the protocol allows"


def unchanged(cls, rounds, nodes=16, **options):
    """The mean variance over the nodes relative to the start, round by round, without training."""
    layout = Layout.from_named({"w": torch.zeros(50, 40).double(), "b": torch.zeros(50).double()})
    strategy = built(cls, layout, topology=TOPOLOGIES["regular"](degree=4), **options)
    state = strategy.init(torch.from_numpy(np.random.default_rng(0).normal(size=2050)), nodes)
    ratios, stay = [], dict.fromkeys(range(nodes), np.zeros(layout.dim))
    for _ in range(rounds):
        _, state, metrics = strategy.server_update(
            state, torch.zeros(layout.dim).double(), replies(strategy, state, stay, layout)
        )
        ratios.append(metrics["variance_ratio/w"])
    return ratios, metrics


def test_without_training_plain_gossip_loses_the_variance_and_the_corrected_one_keeps_it():
    """Independent starts on a connected regular graph: 1 / N against 1 (e7)."""
    plain, metrics = unchanged(GossipAveraging, 60)
    kept, _ = unchanged(VarianceCorrectedGossip, 60)
    print(f"e7: plain {plain[-1]:.5f} (1/16 = {1 / 16}), corrected {kept[-1]:.6f}")
    assert plain[-1] == pytest.approx(1 / 16, rel=0.1)
    assert metrics["consensus_distance"] < 1e-3
    assert kept[-1] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("scale", [1.01, 0.99])
def test_a_target_off_by_a_per_cent_compounds(scale):
    ratios, _ = unchanged(VarianceCorrectedGossip, 60, target_scale=scale)
    print(f"e7: target_scale {scale}: {ratios[-1]:.5f}, {scale}^60 = {scale**60:.5f}")
    assert ratios == pytest.approx([scale ** (t + 1) for t in range(60)], rel=1e-9)


def test_only_the_listed_tensors_differ_from_plain_averaging():
    plain, corrected = (
        built(cls, topology=from_edges(EDGES)) for cls in (GossipAveraging, VarianceCorrectedGossip)
    )
    (*_, one), (*_, other) = play(plain, [range(NODES)]), play(corrected, [range(NODES)])
    part = LAYOUT.slices["b"]
    assert torch.equal(one[2].models[:, part], other[2].models[:, part])
    online = torch.tensor([len(near) > 0 for near in GRAPH])
    for name in ("w", "v"):
        part = LAYOUT.slices[name]
        differs = (one[2].models[:, part] != other[2].models[:, part]).any(dim=1)
        assert torch.equal(differs, online)


@pytest.mark.parametrize("protocol", ["synchronous", "buffered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_identical_models_the_correction_changes_nothing(dtype, protocol):
    """The same update at every node: both stay with what one node alone would compute."""
    layout = Layout.from_named({n: torch.zeros(s, dtype=dtype) for n, s in SHAPES.items()})
    start = torch.linspace(-1, 1, layout.dim, dtype=dtype)
    found = []
    for cls in (GossipAveraging, VarianceCorrectedGossip):
        strategy = built(
            cls, layout, topology=from_edges(EDGES), start="shared", protocol=protocol,
            interval=(1, 1),
        )  # fmt: skip
        state, params = strategy.init(start, NODES), start
        for number in range(4):
            move = torch.full((layout.dim,), 0.1 * number, dtype=dtype)
            updates = dict.fromkeys(range(NODES), move)
            params, state, _ = strategy.server_update(
                state, params, replies(strategy, state, updates, layout)
            )
        found.append(state.models)
    tolerance = {torch.float32: 0.0, torch.float64: 1e-15}[dtype]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(found[1], params.expand(NODES, -1), rtol=0, atol=tolerance)
