import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from strategies.fedld import FedLD, margin_penalty, principal_gradient_aggregate
from tests.oracles import fedld_oracle as oracle

ROOT5 = np.sqrt(5)
PAIR = [(2, 1), (2, -1)]
THREE = [(3, 1, 0), (2, -1, 0), (-1, 0, 1)]
DIAGONAL = [(3, 0, 0), (0, 2, 0), (0, 0, 1)]
LINE = [(3, 0), (1, 0), (-2, 0)]
# rows, keep, eigenvalues, aggregate
NUMBERS = [
    (PAIR, 0.8, (4, 1), (0.8 * ROOT5, 0)),
    (PAIR, 1.0, (4, 1), (1.788854, 0)),
    (THREE, 0.8, (4.719416, 0.641334, 0.305917), (1.092506, 0.178151, -0.076318)),
    (THREE, 1.0, (4.719416, 0.641334, 0.305917), (1.102527, 0.168892, 0.045513)),
    (DIAGONAL, 0.8, (3, 4 / 3, 1 / 3), (9 / 14, 4 / 21, 0)),
    (DIAGONAL, 1.0, (3, 4 / 3, 1 / 3), (0.642857, 0.190476, 0.023810)),
    (LINE, 0.8, (14 / 3, 0, 0), (2 / 3, 0)),
    ([(3, 4)] * 5, 0.8, (25, 0, 0, 0, 0), (3, 4)),
]
IDS = [
    f"{len(rows)}x{len(rows[0])}-{keep}-{number}" for number, (rows, keep, *_) in enumerate(NUMBERS)
]


def draw(seed, clients, dim):
    return np.random.default_rng(seed).normal(size=(clients, dim))


def kernel(updates, keep=0.8, dtype=torch.float64):
    rows = torch.tensor(np.asarray(updates), dtype=dtype)
    found = principal_gradient_aggregate(rows, keep=keep)
    assert (found.dtype, found.shape) == (dtype, rows.shape[1:])
    return found.numpy()


# --- numbers of the specification -------------------------------------------------------------


@pytest.mark.parametrize(("rows", "keep", "values", "expected"), NUMBERS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_printed_aggregates(rows, keep, values, expected, dtype):
    np.testing.assert_allclose(oracle.principal_gradients(rows)[0], values, atol=1e-6)
    np.testing.assert_allclose(oracle.aggregate(rows, keep), expected, atol=1e-6)
    np.testing.assert_allclose(kernel(rows, keep, dtype), expected, atol=1e-6)


def test_four_of_five_directions_are_kept_unless_told_otherwise():
    rows = np.diag([5.0, 4, 3, 2, 1])
    found = principal_gradient_aggregate(torch.from_numpy(rows)).numpy()
    assert np.count_nonzero(found) == 4
    np.testing.assert_allclose(found, oracle.aggregate(rows, 0.8), rtol=0, atol=1e-14)


def test_the_printed_revised_update():
    assert oracle.revised(PAIR, 1.0)[0] == pytest.approx([1.788854, 0.447214], abs=1e-6)


@pytest.mark.parametrize(("clients", "kept"), [(5, 4), (10, 8), (12, 9), (1, 1), (2, 1)])
def test_the_printed_numbers_of_directions_kept(clients, kept):
    """A diagonal of unequal entries keeps a coordinate per direction."""
    rows = np.diag(np.arange(clients, 0, -1.0))
    assert np.count_nonzero(kernel(rows)) == kept


def test_printed_losses():
    z, y = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    assert oracle.cross_entropy(z, y) == pytest.approx(0.693147, abs=1e-6)
    assert 0.1 * float(margin_penalty(torch.zeros(4, 2))) == pytest.approx(0.109861, abs=1e-6)
    assert oracle.cross_entropy(z, y) + 0.1 * oracle.penalty(z) == pytest.approx(0.803008, abs=1e-6)

    z, y = np.array([(2.0, 0), (0, 1), (-1, 1)]), np.array([0, 1, 0])
    assert oracle.cross_entropy(z, y) == pytest.approx(0.855706, abs=1e-6)
    assert (oracle.softmax(z) ** 2).sum() == pytest.approx(2.186802, abs=1e-6)
    logits = torch.tensor(z, requires_grad=True)
    found = 0.1 * margin_penalty(logits)
    assert found.item() == pytest.approx(0.115902, abs=1e-6)
    assert oracle.cross_entropy(z, y) + found.item() == pytest.approx(0.971608, abs=1e-6)
    (gradient,) = torch.autograd.grad(found, logits)
    rows = [(0.005018, -0.005018), (-0.005702, 0.005702), (-0.005018, 0.005018)]
    np.testing.assert_allclose(gradient.numpy(), rows, atol=1e-6)
    for space, printed in (("probability", 0.054623), ("logit", 0.113373)):
        sample = margin_penalty(torch.tensor(z), space=space, reduction="sample")
        assert 0.1 * float(sample) == pytest.approx(printed, abs=1e-6)


# --- against the oracle -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.4, 0.8, 0.9, 1.0])
@pytest.mark.parametrize(("clients", "dim"), [(1, 5), (2, 1), (3, 40), (5, 3), (12, 200)])
def test_the_aggregate_equals_the_oracles(clients, dim, keep):
    rows = draw((clients, dim), clients, dim)
    expected = oracle.aggregate(rows, keep)
    np.testing.assert_allclose(kernel(rows, keep), expected, rtol=0, atol=1e-12)
    single = rows.astype(np.float32)
    np.testing.assert_allclose(
        kernel(single, keep, torch.float32), oracle.aggregate(single, keep), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_penalty_equals_the_oracles_with_and_without_padding(space, reduction, dtype):
    z = 3 * draw(1, 7, 4)
    expected = oracle.penalty(z.astype(np.float32).astype(np.float64), space, reduction)
    logits = torch.tensor(z, dtype=torch.float32).to(dtype)
    plain = margin_penalty(logits, space=space, reduction=reduction)
    assert plain.dtype == dtype
    assert float(plain) == pytest.approx(expected, rel=1e-6)
    padded = torch.cat([logits, torch.full((2, 4), 1e30, dtype=dtype)])
    weights = torch.tensor([1.0] * 7 + [0.0] * 2, dtype=dtype)
    found = margin_penalty(padded, space=space, reduction=reduction, weights=weights)
    assert float(found) == pytest.approx(float(plain), rel=1e-6)


def test_the_penaltys_gradient_equals_the_derived_one():
    z = draw(2, 6, 5)
    logits = torch.tensor(z, requires_grad=True)
    (found,) = torch.autograd.grad(margin_penalty(logits), logits)
    np.testing.assert_allclose(found.numpy(), oracle.penalty_gradient(z), rtol=0, atol=1e-14)


LAYOUT = Layout.from_named({n: torch.zeros(s).double() for n, s in (("w", 6), ("b", 1), ("u", 4))})


def replies(params, updates, server_round=1, layout=LAYOUT):
    named = [updates[spec.name] for spec in layout.trainable]
    rows = params + torch.from_numpy(np.concatenate(named, axis=1))
    count = len(rows)
    return Replies(
        server_round=server_round,
        layout=layout,
        client_ids=np.arange(count),
        params=rows,
        reference=params,
        buffers={},
        extra={},
        num_examples=torch.arange(1, count + 1),
        metrics={},
        staleness=torch.zeros(count, dtype=torch.int64),
    )


def test_four_rounds_equal_the_oracle_with_gates_that_open_at_different_times():
    """Tensor u does not move for two rounds, b has one element, the cohort changes in size."""
    rounds = []
    for number, clients in enumerate((5, 3, 1, 6)):
        updates = {"w": draw((7, number), clients, 6), "b": draw((8, number), clients, 1)}
        updates["u"] = draw((9, number), clients, 4) * (number >= 2)
        rounds.append(updates)
    start = {"w": draw(3, 1, 6)[0], "b": draw(4, 1, 1)[0], "u": draw(5, 1, 4)[0]}
    strategy = FedLD()
    strategy.declare_layout(LAYOUT)
    params = torch.from_numpy(np.concatenate(list(start.values())))
    state = strategy.init(params, 8)
    for number, updates in enumerate(rounds):
        before = params.clone()
        params, state, metrics = strategy.server_update(state, params, replies(params, updates))
        mean = np.concatenate([updates[n].mean(axis=0) for n in ("w", "b", "u")])
        length = np.linalg.norm((params - before).numpy())
        assert metrics == {"norm_ratio": pytest.approx(length / np.linalg.norm(mean), rel=1e-12)}
        expected = oracle.server(start, rounds[: number + 1])
        flat = np.concatenate([expected[n] for n in ("w", "b", "u")])
        np.testing.assert_allclose(params.numpy(), flat, rtol=0, atol=1e-12)
        assert state.moved.tolist() == [True, True, number >= 2]
        assert not torch.equal(before, params)


# --- edge cases -------------------------------------------------------------------------------


def test_a_row_that_is_not_finite_is_dropped_and_the_rest_counted_anew():
    rows = draw(6, 5, 7)
    for bad in (np.nan, np.inf):
        broken = np.insert(rows, 2, np.full(7, bad), axis=0)
        np.testing.assert_array_equal(kernel(broken), kernel(rows))


def test_nothing_but_zero_gives_zero():
    assert not kernel(np.zeros((4, 3))).any()
    assert not kernel(np.zeros((0, 3))).any()
    assert not kernel(np.full((2, 3), np.nan)).any()


def test_a_client_without_update_counts_in_the_mean_and_adds_nothing():
    rows = draw(7, 4, 6)
    with_zero = np.concatenate([rows, np.zeros((1, 6))])
    np.testing.assert_allclose(kernel(with_zero), oracle.aggregate(with_zero), rtol=0, atol=1e-13)


def test_clients_at_right_angles_do_not_follow_rounding():
    """What is 0 along the axes is next to 0 in turned coordinates."""
    for seed in range(5):
        turn = np.linalg.qr(draw(seed, 3, 3))[0]
        found = kernel(np.array(DIAGONAL) @ turn, 1.0)
        expected = np.array([9 / 14, 4 / 21, 1 / 42]) @ turn
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_tensor_of_two_elements_has_directions():
    layout = Layout.from_named({"w": torch.zeros(2).double()})
    strategy, params = FedLD(), torch.zeros(2, dtype=torch.float64)
    strategy.declare_layout(layout)
    state = strategy.init(params, 2)._replace(moved=torch.ones(1, dtype=torch.bool))
    moved, _, _ = strategy.server_update(
        state, params, replies(params, {"w": np.array(PAIR, dtype=float)}, layout=layout)
    )
    np.testing.assert_allclose(moved.numpy(), (0.8 * ROOT5, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_client_that_leans_by_next_to_nothing_counts_wholly(turn):
    """The sign of a projection survives, not its size."""
    rows = np.array([(3.0, 0.0), (turn * 2e-8, 2.0)])
    found = kernel(rows, 0.5)  # the first direction
    np.testing.assert_allclose(found, [(3 + turn * 2) / 2 * 9 / 13, 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found, oracle.aggregate(rows, 0.5), rtol=0, atol=1e-12)


@given(st.integers(0, 2**16), st.floats(-6, -2))
def test_short_updates_at_right_angles_to_long_ones_have_no_sign_of_rounding(seed, power):
    """On a common axis of random direction each has a projection of zero, or of a rounding."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.normal(size=(6, 6)))[0]
    lengths = np.array([1.0, 0.7, 10**power, 0.6 * 10**power])
    rows = lengths[:, None] * turn[:4]
    found = kernel(rows, 1.0)
    expected = (lengths**3 / (lengths**2).sum() / 4) @ turn[:4]  # each has its own direction
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_a_tensor_whose_updates_cancel_but_for_rounding_has_not_moved():
    strategy, params = FedLD(), torch.zeros(11, dtype=torch.float64)
    strategy.declare_layout(LAYOUT)
    row = draw(1, 1, 11)
    rows = np.concatenate([1.7 * row, 0.1 * row, -(1.7 * row + 0.1 * row)])
    updates = {"w": rows[:, :6], "b": rows[:, 6:7], "u": rows[:, 7:]}
    state = strategy.init(params, 3)
    _, state, _ = strategy.server_update(state, params, replies(params, updates))
    assert not state.moved.any()


def test_more_clients_than_dimensions_do_not_follow_rounding():
    """Directions beyond the rank are rounding errors of length next to nothing."""
    rows = draw(8, 12, 3)
    np.testing.assert_allclose(kernel(rows, 1.0), oracle.aggregate(rows, 1.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_directions_up_to_the_specifications_share_of_the_largest_eigenvalue_are_left_out(
    dtype, limit
):
    for share, coordinates in ((0.7 * limit, 1), (1.4 * limit, 2)):
        rows = np.diag([1.0, np.sqrt(share)])
        assert np.count_nonzero(kernel(rows, 1.0, dtype)) == coordinates


@pytest.mark.parametrize(
    ("argument", "value"), [("keep", 0.0), ("keep", 1.1), ("server_lr", 0.0), ("server_lr", np.inf)]
)
def test_impossible_hyperparameters_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"{argument} = .*: must be"):
        FedLD(**{argument: value})


def test_all_directions_may_be_kept_by_the_strategy():
    strategy, params = FedLD(keep=1.0), torch.zeros(11, dtype=torch.float64)
    strategy.declare_layout(LAYOUT)
    state = strategy.init(params, 3)._replace(moved=torch.ones(3, dtype=torch.bool))
    updates = {"w": draw(1, 3, 6), "b": draw(2, 3, 1), "u": draw(3, 3, 4)}
    moved, _, _ = strategy.server_update(state, params, replies(params, updates))
    expected = [oracle.aggregate(updates["w"], 1.0), updates["b"].mean(axis=0)]
    expected.append(oracle.aggregate(updates["u"], 1.0))
    np.testing.assert_allclose(moved.numpy(), np.concatenate(expected), rtol=0, atol=1e-12)


# --- laws of the specification (e) --------------------------------------------------------------

MATRICES = st.tuples(st.integers(0, 2**16), st.integers(2, 9), st.integers(2, 12))


@given(MATRICES, st.sampled_from([0.5, 0.8, 1.0]), st.floats(-5, 5))
def test_it_commutes_with_rotation_scale_and_permutation(shape, keep, factor):
    seed, clients, dim = shape
    rows, random = draw(seed, clients, dim), np.random.default_rng(seed + 1)
    found = kernel(rows, keep)
    turn = np.linalg.qr(random.normal(size=(dim, dim)))[0]
    np.testing.assert_allclose(kernel(rows @ turn, keep), found @ turn, rtol=0, atol=1e-9)
    np.testing.assert_allclose(kernel(factor * rows, keep), factor * found, rtol=0, atol=1e-9)
    np.testing.assert_allclose(kernel(random.permutation(rows), keep), found, rtol=0, atol=1e-9)


@given(MATRICES, st.sampled_from([0.5, 0.8, 1.0]))
def test_calibration_changes_nothing_and_updates_only_shrink(shape, keep):
    seed, clients, dim = shape
    rows = draw(seed, clients, dim)
    revised = oracle.revised(rows, keep)
    np.testing.assert_allclose(revised, oracle.revised(rows, keep, calibrate=False), atol=1e-9)
    values, principal = oracle.principal_gradients(rows)
    gram = principal @ principal.T
    np.testing.assert_allclose(gram, np.diag(clients * values), rtol=0, atol=1e-8)
    kept = max(1, int(keep * clients + 1e-9))
    rank = (values > 1e-10 * values[0]).sum()
    factor = np.sqrt(((values / values.sum())[: min(kept, rank)] ** 2).sum())
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(np.linalg.norm(revised, axis=1), lengths * factor, rtol=1e-8)
    assert np.linalg.norm(kernel(rows, keep)) <= lengths.mean() * factor + 1e-9
    # the aggregate lies in the span of the kept directions
    basis = np.linalg.qr(principal[: min(kept, rank)].T)[0]
    found = kernel(rows, keep)
    np.testing.assert_allclose(basis @ (basis.T @ found), found, rtol=0, atol=1e-8)


@given(st.integers(0, 2**16), st.integers(1, 8))
def test_updates_along_one_line_give_their_mean(seed, clients):
    random = np.random.default_rng(seed)
    rows = np.outer(random.normal(size=clients), random.normal(size=5))
    np.testing.assert_allclose(kernel(rows), rows.mean(axis=0), rtol=0, atol=1e-12)


def test_the_number_of_examples_has_no_effect():
    strategy = FedLD()
    strategy.declare_layout(LAYOUT)
    params = torch.zeros(11, dtype=torch.float64)
    state = strategy.init(params, 4)
    state = state._replace(moved=torch.ones(3, dtype=torch.bool))
    updates = {"w": draw(1, 4, 6), "b": draw(2, 4, 1), "u": draw(3, 4, 4)}
    one = replies(params, updates)
    other = dataclasses.replace(one, num_examples=one.num_examples * 7 + 3)
    assert torch.equal(
        strategy.server_update(state, params, one)[0],
        strategy.server_update(state, params, other)[0],
    )


@given(st.integers(0, 2**16), st.integers(1, 20), st.integers(2, 6))
def test_the_penalty_is_bounded_and_flat_at_uniform_and_at_certain_rows(seed, batch, classes):
    logits = torch.tensor(5 * draw(seed, batch, classes))
    found = float(margin_penalty(logits))
    assert np.log(1 + batch / classes) - 1e-12 <= found <= np.log(1 + batch) + 1e-12
    for flat in (torch.zeros(batch, classes).double(), 1e4 * torch.eye(classes).double()):
        flat.requires_grad_()
        (gradient,) = torch.autograd.grad(margin_penalty(flat), flat)
        assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize(("name", "value"), [("space", "probabilty"), ("reduction", "Batch")])
def test_the_penalty_refuses_choices_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} = '{value}': must be"):
        margin_penalty(torch.zeros(2, 2), **{name: value})


def test_the_loss_decomposition_telescopes():
    """F(mean) = local loss + distribution-shift loss + aggregation loss, on quadratics."""
    random = np.random.default_rng(3)
    centres, models = random.normal(size=(4, 3)), random.normal(size=(4, 3))

    def local(i, theta):
        return 0.5 * ((theta - centres[i]) ** 2).sum()

    def pooled(theta):
        return np.mean([local(i, theta) for i in range(4)])

    mean = models.mean(axis=0)
    terms = [
        np.mean([local(i, models[i]) for i in range(4)]),
        np.mean([pooled(models[i]) - local(i, models[i]) for i in range(4)]),
        pooled(mean) - np.mean([pooled(m) for m in models]),
    ]
    assert sum(terms) == pytest.approx(pooled(mean), abs=1e-12)
