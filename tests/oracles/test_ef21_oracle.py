"""EF21, EF21-W and compressed updates against NumPy; what the papers say of them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.parts.ef21 import EF21Memory
from fedsim.client.compression import Outcome
from fedsim.client.compressors import compressor
from fedsim.engine.inline import InlineGrid
from fedsim.messages.codecs import decoded
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from strategies.ef21 import EF21, step_size
from tests.laws import federations as fed
from tests.oracles import ef21_oracle as oracle
from tests.oracles.test_drift_oracle import DATA, batches_of, flat, gradient
from tests.tiers import by_turns

COHORTS = ((0, 3, 5), (1, 2, 3, 4, 5), (0, 3, 7))
LR, DIM = 0.2, 51


def update(client, model, t):
    """What two epochs of the client move the model by."""
    w = model.copy()
    for batch in batches_of(t + 1, client):
        w = w - LR * gradient(w, *batch)
    return w - model


def run(strategy, parts, *, kind=None, cohorts=COHORTS):
    procedure = fed.local_sgd(local_lr=LR, batch_size=8, local_epochs=2, parts=parts)
    app = fed.make_app("logistic", procedure, DATA, dtype="float64", kind=kind)
    grid = InlineGrid(app, 8)
    start = fed.initial_arrays("logistic", dtype="float64")
    arrays, _ = fed.run_rounds(strategy, grid, start, app.layout, rounds=3, cohorts=cohorts)
    return flat(start), flat(arrays), grid.store.export()


def kept(exported, part, vector):
    clients, tensors = exported
    start = f"{part}/{vector}."
    rows = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    whole = torch.cat([rows["output.weight"].flatten(1), rows["output.bias"]], dim=1).numpy()
    return dict(zip(clients, whole, strict=True))


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
@pytest.mark.parametrize("constants", [None, tuple(range(1, 9))], ids=["EF21", "EF21-W"])
def test_three_rounds_of_ef21_with_absences_equal_the_oracle(constants, kind):
    strategy = EF21(share=5 / DIM, server_lr=0.7, client_smoothness=constants)
    start, found, exported = run(strategy, fed.parts_for("ef21", share=5 / DIM), kind=kind)
    weights = np.ones(8) / 8 if constants is None else np.array(constants) / sum(constants)
    model, own = oracle.ef21(
        start, 3, lambda i, x, t: -update(i, x, t), weights,
        lambda v: oracle.top_k(v, 5), 0.7, present=COHORTS,
    )  # fmt: skip
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    # client and server remember the same, bit for bit
    mine = kept(exported, "EF21Memory", "memory")
    assert sorted(mine) == [0, 1, 2, 3, 4, 5, 7]
    for client, memory in mine.items():
        np.testing.assert_allclose(memory, -own[client], rtol=0, atol=1e-11)
        assert np.array_equal(memory, strategy.state.memories[client].numpy())
    assert not strategy.state.memories[6].any()
    assert strategy.state.since.tolist() == [3, 2, 2, 3, 2, 2, 0, 3]


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
@pytest.mark.parametrize("name", ["top_k", "sign"])
def test_three_rounds_of_error_feedback_equal_the_oracle(name, kind):
    part = {"name": name, **({"share": 5 / DIM} if name == "top_k" else {})}
    start, found, exported = run(fed.make_strategy("fedavg"), [part], kind=kind)
    compress = oracle.scaled_sign if name == "sign" else lambda v: oracle.top_k(v, 5)
    model, errors = oracle.error_feedback(start, COHORTS, update, compress, fed.SIZES)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    mine = kept(exported, {"top_k": "TopKUpdate", "sign": "SignUpdate"}[name], "error")
    for client, error in mine.items():
        np.testing.assert_allclose(error, errors[client], rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
@pytest.mark.parametrize("part", ["top_k", "random_k"])
def test_with_all_entries_the_bits_are_those_without_compression(part, kind):
    whole = [{"name": part, "share": 1.0, "error_feedback": True}]
    for strategy in ("fedavg", "fedadam"):
        _, found, _ = run(fed.make_strategy(strategy), whole, kind=kind)
        _, plain, _ = run(fed.make_strategy(strategy), [], kind=kind)
        assert np.array_equal(found, plain)


def test_with_everybody_and_all_entries_it_is_distributed_gradient_descent():
    everybody = (tuple(range(8)),)
    strategy = EF21(share=1.0)
    _, found, _ = run(strategy, fed.parts_for("ef21", share=1.0), cohorts=everybody)
    _, plain, _ = run(fed.make_strategy("fedavg", weighted=False), [], cohorts=everybody)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-13)


# --- quadratics, without engine -------------------------------------------------------------------


def federation(gradients, x, rounds, gamma, *, present=None, constants=None, **compression):
    """EF21 of ours on given gradients; yields (x, the server's g, clients' memories) per round."""
    n, dim = len(gradients), len(x)
    strategy = EF21(client_smoothness=constants, **compression)
    part = EF21Memory(**compression)
    layout = Layout.from_named({"w": torch.zeros(dim, dtype=torch.float64)})
    params = torch.tensor(x, dtype=torch.float64)
    strategy.declare_layout(layout)
    state, memories = strategy.init(params, n), {}
    for t in range(rounds):
        cohort = np.array(range(n) if present is None else present[t], dtype=np.int64)
        _, own = strategy.broadcast(state, params, cohort)
        # one full step of size gamma at every client
        trained = [params - gamma * torch.from_numpy(gradients[i](params.numpy())) for i in cohort]
        replies = Replies(
            t + 1, layout, cohort, torch.stack(trained), params, {}, {},
            torch.ones(len(cohort), dtype=torch.int64), {},
            torch.zeros(len(cohort), dtype=torch.int64),
        )  # fmt: skip
        encoded = fed.encoded_by(part, params, replies, own, memories)
        replies = fed.with_encoded(replies, encoded)
        params, state, _ = strategy.server_update(state, params, replies)
        yield params.numpy(), state.memories.numpy(), memories, replies


def quadratics(seed, *, n=20, dim=20, heavy=100.0):
    """Wishart-like curvatures with largest eigenvalue 1, one of them `heavy` times as large."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(n):
        a = draw.normal(size=(dim, dim))
        a = a.T @ a
        a = a / np.linalg.eigvalsh(a)[-1] * (heavy if i == 0 else 1.0) + 0.3 * np.eye(dim)
        found.append((a, draw.normal(size=dim)))
    return found


def slopes(found):
    return [lambda x, a=a, b=b: a @ (x - b) for a, b in found]


def constants_of(found):
    each = [float(np.linalg.eigvalsh(a)[-1]) for a, _ in found]
    return float(np.linalg.eigvalsh(np.mean([a for a, _ in found], axis=0))[-1]), each


def test_the_lyapunov_function_falls_under_the_step_of_the_theory():
    """Psi = f - f* + gamma / (2 theta) * G, G = mean |g_i - grad f_i|^2 weighted as in (d)."""
    found = quadratics(3)
    smooth, each = constants_of(found)
    gamma = step_size(smooth, each, 1 / 20)
    theta = 1 - np.sqrt(1 - 1 / 20)
    weights = np.array(each) / sum(each)
    own, x = np.zeros((20, 20)), np.zeros(20)
    compress = compressor("top_k", share=1 / 20, levels=1)
    best = np.linalg.solve(sum(a for a, _ in found), sum(a @ b for a, b in found))

    def value(x):
        return np.mean([(x - b) @ a @ (x - b) / 2 for a, b in found])

    psi = []
    for _ in range(60):
        wanted = [slope(x) for slope in slopes(found)]
        for i, v in enumerate(wanted):
            base = torch.from_numpy(own[i])
            sent = compress.encode(base, torch.from_numpy(v), None, feedback=True)
            own[i] = decoded(base, sent).numpy()
        gap = sum(
            ((own[i] - v) ** 2).sum() / (20**2 * w)
            for i, (v, w) in enumerate(zip(wanted, weights, strict=True))
        )
        psi.append(value(x) - value(best) + gamma / (2 * theta) * gap)
        x = x - gamma * own.mean(axis=0)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(psi))
    assert psi[-1] < psi[0]


def test_weights_change_nothing_with_top_k_and_something_with_powers_of_two():
    found = quadratics(1)
    smooth, each = constants_of(found)
    gamma = step_size(smooth, each, 1 / 20)

    def end(constants, **compression):
        *_, last = federation(
            slopes(found), np.zeros(20), 12, gamma, constants=constants, **compression
        )
        return last[0]

    np.testing.assert_allclose(end(None, share=1 / 20), end(each, share=1 / 20), rtol=0, atol=1e-11)
    powers = [end(constants, compressor="natural") for constants in (None, each)]
    assert np.abs(powers[0] - powers[1]).max() > 1e-6


def test_the_server_remembers_what_clients_remember_and_the_absent_send_nothing():
    found = quadratics(2)
    draw = np.random.default_rng(0)
    present = [sorted(draw.choice(20, size=7, replace=False)) for _ in range(12)]
    before = np.zeros((20, 20))
    for t, (_, server, clients, replies) in enumerate(
        federation(slopes(found), np.zeros(20), 12, 1e-3, present=present, share=0.1)
    ):
        for client, memory in clients.items():
            assert np.array_equal(memory["memory"].numpy(), server[client])
        absent = sorted(set(range(20)) - set(present[t]))
        assert np.array_equal(server[absent], before[absent])
        assert len(replies.encoded["memory.sparse.values"]) == 7
        before = server.copy()


def test_with_everybody_partial_participation_is_the_whole():
    found = quadratics(4)
    ends = [
        list(federation(slopes(found), np.zeros(20), 5, 1e-3, present=present, share=0.1))[-1][0]
        for present in (None, [range(20)] * 5)
    ]
    assert np.array_equal(*ends)


# --- the numbers of the specification -------------------------------------------------------------

THREE = [np.array(a, dtype=float) for a in ((-3, 2, 2), (2, -3, 2), (2, 2, -3))]


def three_slopes():
    return [lambda x, a=a: 2 * a * (a @ x) + x / 2 for a in THREE]


def test_why_error_feedback_is_needed():
    """Averaged largest entries point the wrong way, and EF21 ends at the optimum, 0."""
    top = compressor("top_k", share=1 / 3, levels=1)

    def naive(x):
        nothing = torch.zeros(3, dtype=torch.float64)
        sent = [
            decoded(nothing, top.encode(nothing, torch.from_numpy(s(x)), None, feedback=False))
            for s in three_slopes()
        ]
        return torch.stack(sent).mean(dim=0).numpy()

    one = np.ones(3)
    np.testing.assert_allclose(naive(one), -11 / 6 * one, rtol=1e-14)
    np.testing.assert_allclose(
        np.mean([s(one) for s in three_slopes()], 0), 7 / 6 * one, rtol=1e-14
    )
    x = y = np.ones(3)
    for _ in range(60):
        x = x - 0.05 * naive(x)
        y = y - 0.05 * np.mean([s(y) for s in three_slopes()], axis=0)
    assert np.linalg.norm(x) == pytest.approx(np.sqrt(3) * (1 + 11 * 0.05 / 6) ** 60, rel=1e-12)
    assert np.linalg.norm(x) == pytest.approx(334, abs=0.5)
    assert np.linalg.norm(y) == pytest.approx(0.047, abs=5e-4)

    end, _ = oracle.ef21(
        np.ones(3), 4000, lambda i, x, t: three_slopes()[i](x), np.ones(3) / 3,
        lambda v: oracle.top_k(v, 1), 0.005,
    )  # fmt: skip
    assert np.linalg.norm(end) < 1e-9
    *_, last = federation(three_slopes(), np.ones(3), 300, 0.005, share=1 / 3)
    end, _ = oracle.ef21(
        np.ones(3), 300, lambda i, x, t: three_slopes()[i](x), np.ones(3) / 3,
        lambda v: oracle.top_k(v, 1), 0.005,
    )  # fmt: skip
    assert np.linalg.norm(last[0]) == pytest.approx(np.linalg.norm(end), rel=1e-6)


@pytest.mark.parametrize(("p", "ratio"), [(1.0, 38.5), (0.5, 96.3), (0.1, 713)])
def test_the_step_sizes_are_those_of_the_specification(p, ratio):
    xi = 1 / step_size(1.0, [1.0], 0.05, rate=p) - 1
    assert xi == pytest.approx(ratio, abs=0.05 if ratio < 700 else 0.5)
    assert step_size(1.0, [1.0], 0.05, rate=p) == pytest.approx(
        oracle.theory(1.0, [1.0], 0.05, mean="arithmetic", p=p), rel=1e-13
    )
    # the paper's closed form
    if p == 1:
        assert xi == pytest.approx((1 + np.sqrt(0.95)) / 0.05 - 1, rel=1e-12)


def test_the_reloaded_step_is_as_much_longer_as_the_constants_differ():
    """The specification's figures: L 5.34, L_QM 22.6, L_AM 6.01, alpha 0.05."""
    each = [1.0102] * 19 + [101.0]
    assert np.mean(each) == pytest.approx(6.01, abs=0.005)
    assert np.sqrt(np.mean(np.square(each))) == pytest.approx(22.6, abs=0.05)
    old = step_size(5.34, each, 0.05, rule="original")
    new = step_size(5.34, each, 0.05)
    assert old == pytest.approx(1.14e-3, abs=5e-6)
    assert new == pytest.approx(4.23e-3, abs=5e-6)
    # four clients, one of them a hundred times as steep (Example 2.1 of the paper)
    four = [1.0, 1.0, 1.0, 100.0]
    assert np.sqrt(np.mean(np.square(four))) == pytest.approx(50.007, abs=5e-4)
    assert np.mean(four) == 25.75


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.01, 1))
def test_the_reloaded_step_is_never_the_shorter_one(each, alpha):
    smooth = sum(each) / len(each)
    new, old = (step_size(smooth, each, alpha, rule=r) for r in ("reloaded", "original"))
    assert new >= old * (1 - 1e-12)
    assert new <= 1 / smooth * (1 + 1e-12)


def specified():
    """Curvatures as section (f) has them: A^T A scaled to 1, plus 0.01 I; one 100 times as steep.

    Returns (curvatures `[20, 20, 20]`, slopes at 0 `[20, 20]`).
    """
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((20, 20, 20)), draw.standard_normal((20, 20))
    found = [each.T @ each for each in a]
    found = [each / np.linalg.eigvalsh(each)[-1] + 0.01 * np.eye(20) for each in found]
    found[0] = 100 * found[0]
    return np.stack(found), -b


def rounds_to(curvatures, slopes_at_0, gamma):
    """EF21 with one entry of 20: the rounds until |grad f|^2 is a hundredth; NumPy."""
    x, rows, own = np.zeros(20), np.arange(20), np.zeros((20, 20))
    first = (slopes_at_0.mean(axis=0) ** 2).sum()
    for t in range(20_000):
        each = curvatures @ x + slopes_at_0
        if (each.mean(axis=0) ** 2).sum() <= first / 100:
            return t
        residual = each - own
        largest = np.abs(residual).argmax(axis=1)
        own[rows, largest] += residual[rows, largest]
        x = x - gamma * own.mean(axis=0)
    raise AssertionError("never")


def test_the_longer_step_takes_as_many_rounds_less():
    """Section (f): 5100 rounds under the old step and 1372 under the new one.

    How it draws is not said; of another draw the rounds are others, their ratio is not.
    """
    curvatures, slopes_at_0 = specified()
    each = [float(np.linalg.eigvalsh(a)[-1]) for a in curvatures]
    smooth = float(np.linalg.eigvalsh(curvatures.mean(axis=0))[-1])
    assert smooth == pytest.approx(5.34, abs=0.01)
    assert np.mean(each) == pytest.approx(6.01, abs=0.005)
    assert np.sqrt(np.mean(np.square(each))) == pytest.approx(22.6, abs=0.05)
    steps = [step_size(smooth, each, 1 / 20, rule=rule) for rule in ("original", "reloaded")]
    assert steps == [pytest.approx(1.14e-3, abs=5e-6), pytest.approx(4.23e-3, abs=5e-6)]
    old, new = (rounds_to(curvatures, slopes_at_0, gamma) for gamma in steps)
    assert old / new == pytest.approx(5100 / 1372, rel=0.02)
    assert (old, new) == (pytest.approx(5100, rel=0.05), pytest.approx(1372, rel=0.05))
    # where constants are equal there is nothing to gain
    one, other = (step_size(1.0, [1.01] * 20, 1 / 20, rule=r) for r in ("original", "reloaded"))
    assert one == pytest.approx(other, rel=1e-12)


# --- a reply that is lost -------------------------------------------------------------------------


def told(part, kept, since, server_round, trained):
    outcome = Outcome(
        server_round, torch.zeros(4, dtype=torch.float64), trained, kept,
        {"ef21.since": torch.tensor(since), "ef21.scale": torch.tensor(1.0)},
        np.random.default_rng(0),
    )  # fmt: skip
    return part.compressed(outcome)


def begun(part):
    first = part.initial_state({"w": torch.zeros(4, dtype=torch.float64)})
    return {n.partition(".")[0]: t for n, t in first.items()}


def test_a_client_whose_reply_was_lost_goes_on_from_what_the_server_remembers():
    part = EF21Memory(share=0.25)
    wanted = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    first = told(part, begun(part), 0, 1, wanted)
    assert first.kept["memory"].tolist() == [4, 0, 0, 0]
    second = told(part, first.kept, 1, 2, wanted)
    assert second.kept["memory"].tolist() == [4, 3, 0, 0]
    # the second reply is lost, the server still remembers round 1; then the next is lost, too
    third = told(part, second.kept, 1, 3, wanted)
    fourth = told(part, third.kept, 1, 4, wanted)
    for again in (third, fourth):
        assert again.kept["memory"].tolist() == [4, 3, 0, 0]
        assert again.encoded["since"].tolist() == [1]
    # a client that forgot everything says that it starts from 0, and so does the server
    forgot = told(part, begun(part), 4, 5, wanted)
    assert forgot.encoded["since"].tolist() == [0]
    assert forgot.kept["memory"].tolist() == [4, 0, 0, 0]


def test_the_server_forgets_with_a_client_that_did():
    strategy = EF21(share=0.25)
    layout = Layout.from_named({"w": torch.zeros(4, dtype=torch.float64)})
    params = torch.zeros(4, dtype=torch.float64)
    strategy.declare_layout(layout)
    state, part = strategy.init(params, 1), EF21Memory(share=0.25)
    wanted, mine = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), begun(part)
    for server_round in (1, 2, 3):
        if server_round == 3:
            mine = begun(part)  # its state is lost
        made = told(part, mine, int(state.since[0]), server_round, wanted)
        mine = made.kept
        replies = Replies(
            server_round, layout, np.array([0]), params[None], params, {}, {},
            torch.ones(1, dtype=torch.int64), {}, torch.zeros(1, dtype=torch.int64),
            encoded={f"memory.{n}": t[None] for n, t in made.encoded.items()},
        )  # fmt: skip
        _, state, _ = strategy.server_update(state, params, replies)
        assert torch.equal(state.memories[0], mine["memory"])
    assert state.memories[0].tolist() == [4, 0, 0, 0]


def test_a_client_that_writes_against_another_round_changes_nothing_and_stops_nobody(caplog):
    found = quadratics(1)
    *_, (params, server, _, replies) = federation(slopes(found), np.zeros(20), 2, 1e-3, share=0.1)
    strategy = EF21(share=0.1)
    strategy.declare_layout(replies.layout)
    state = strategy.init(torch.from_numpy(params), 20)
    since = torch.full((20,), 2)
    state = state._replace(memories=torch.from_numpy(server.copy()), since=since.clone())
    encoded = dict(replies.encoded)
    told = torch.full_like(encoded["memory.since"], 2)
    told[7] = 1
    encoded["memory.since"] = told
    encoded["memory.sparse.values"] = encoded["memory.sparse.values"] + 1
    replies = dataclasses.replace(replies, server_round=3, encoded=encoded)
    with caplog.at_level("WARNING", logger="fedsim"):
        _, after, _ = strategy.server_update(state, torch.from_numpy(params.copy()), replies)
    assert torch.equal(after.memories[7], state.memories[7])
    assert after.since.tolist() == [2 if client == 7 else 3 for client in range(20)]
    assert not torch.equal(after.memories[6], state.memories[6])
    assert ["client 7, round 3" in r.getMessage() for r in caplog.records] == [True]
