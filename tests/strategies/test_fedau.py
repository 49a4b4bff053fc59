import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.inline import InlineGrid
from fedsim.messages.failures import Failure
from fedsim.messages.layout import Layout
from fedsim.messages.replies import Replies
from fedsim.scenario.choice import Choice
from fedsim.scenario.signatures import check_value
from strategies.average_all import AverageAll
from strategies.fedau import FedAU
from strategies.fedavg import FedAvg
from tests.laws import federations as fed
from tests.oracles import fedau_oracle as oracle
from tests.oracles import sgd_oracle

DIM, CLIENTS = 3, 6
LAYOUT = Layout.from_named({"w": torch.zeros(DIM, dtype=torch.float64)})
START = torch.linspace(-1, 1, DIM, dtype=torch.float64)
# who takes part, and of them who fails
ROUNDS = [
    ((0, 1, 2, 5), ()),
    ((1, 3), (3,)),
    ((), ()),
    ((0, 2, 3, 4), (0, 4)),
    ((4,), (4,)),
    ((0, 1, 3, 5), ()),
    ((0, 4), ()),
]


def replies(params, updates, *, server_round=1, failed=()):
    """Replies of the clients that `updates` holds; `failed` are named among the failures."""
    rows = [params + torch.as_tensor(update).to(params.dtype) for update in updates.values()]
    return Replies(
        server_round=server_round,
        layout=LAYOUT,
        client_ids=np.array(list(updates), dtype=np.int64),
        params=torch.stack(rows) if rows else params.new_zeros((0, len(params))),
        reference=params,
        buffers={},
        extra={},
        num_examples=torch.arange(1, len(rows) + 1),
        metrics={},
        staleness=torch.zeros(len(rows), dtype=torch.int64),
        failures=tuple(Failure(n, server_round, "raised", "no battery") for n in failed),
    )


def made_up(server_round, clients, seed=0):
    draw = np.random.default_rng((seed, server_round)).normal(size=(20, DIM))
    return {n: draw[n] for n in clients}


@pytest.mark.parametrize("cutoff", ["none", 3, 1])
@pytest.mark.parametrize("server_lr", [1.0, 0.3])
def test_rounds_with_absences_and_failures_equal_the_oracle(cutoff, server_lr):
    strategy = FedAU(cutoff=cutoff, server_lr=server_lr)
    bound = np.inf if cutoff == "none" else cutoff
    params, x = START, START.numpy()
    state = strategy.init(params, CLIENTS)
    known = [oracle.Client() for _ in range(CLIENTS)]
    for server_round, (cohort, failed) in enumerate(ROUNDS, start=1):
        updates = made_up(server_round, [n for n in cohort if n not in failed])
        answered = replies(params, updates, server_round=server_round, failed=failed)
        params, state, metrics = strategy.server_update(state, params, answered)
        weights = [client.weight for client in known]
        x = oracle.fedau(x, updates, weights, clients=CLIENTS, lr=server_lr)
        for n, client in enumerate(known):
            client.count(n in updates, bound)
        np.testing.assert_allclose(params.numpy(), x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state.weights, [c.weight for c in known], rtol=0, atol=1e-12)
        assert state.intervals.tolist() == [len(client.closed) for client in known]
        assert state.open.tolist() == [client.open for client in known]
        assert metrics == pytest.approx(
            {
                "effective_participation": sum(weights[n] for n in updates) / CLIENTS,
                "weight_mean": np.mean(weights),
                "weight_max": max(weights),
            }
        )


def test_rounds_of_training_with_a_client_that_always_fails_equal_the_oracle():
    """Client 2 returns NaN whenever it is asked: it is refused, named, and counts as absent."""
    data = fed.InMemoryData(broken=(2,))
    procedure = fed.make_procedure("local_sgd", local_lr=0.3, batch_size=256)
    app = fed.make_app("logistic", procedure, data, dtype="float64")
    start = fed.initial_arrays("logistic", dtype="float64")
    cohorts = ((0, 2, 3, 5), (1, 2, 3, 4), (0, 7), (2, 4, 6, 7), (0, 3, 5, 6))
    strategy = FedAU(cutoff=3)
    arrays, records = fed.run_rounds(
        strategy, InlineGrid(app, 8), start, app.layout, rounds=5, cohorts=cohorts
    )
    x = {"W": start["output.weight"].numpy(), "b": start["output.bias"].numpy()}
    known = [oracle.Client() for _ in range(8)]
    for cohort, record in zip(cohorts, records[1:], strict=True):
        present = [n for n in cohort if n != 2]
        found = data.clients(present)
        weights, updates = [client.weight for client in known], {}
        for n, rows in zip(present, found.rows, strict=True):
            mine = found.features[rows].reshape(len(rows), -1).astype(float), found.targets[rows]
            trained, _, _ = sgd_oracle.client_update(x, [mine], sgd_oracle.no_memory(), lr=0.3)
            updates[n] = {name: trained[name] - x[name] for name in x}
        x = {
            name: oracle.fedau(
                x[name], {n: u[name] for n, u in updates.items()}, weights, clients=8
            )
            for name in x
        }
        for n, client in enumerate(known):
            client.count(n in present, 3)
        expected = sum(weights[n] for n in present) / 8
        assert record["server/effective_participation"] == pytest.approx(expected, abs=1e-12)
        assert record["clients/failed"] == (2 in cohort)
    np.testing.assert_allclose(arrays["output.weight"].numpy(), x["W"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(arrays["output.bias"].numpy(), x["b"], rtol=0, atol=1e-12)
    assert strategy.state.weights.tolist() == [client.weight for client in known]
    assert float(strategy.state.weights[2]) == 3  # it was never there: intervals of the cutoff


def test_the_step_of_the_specifications_example():
    """Two clients, one present with weight 3 and update 1."""
    strategy = FedAU(cutoff="none")
    x = torch.zeros(1, dtype=torch.float64)
    state = strategy.init(x, 2)._replace(weights=torch.tensor([3.0, 1.0]).double())
    one = replies(x, {0: [1.0]})
    moved, _, _ = strategy.server_update(state, x, one)
    assert moved.tolist() == [1.5]
    participating = FedAvg(weighted=False)
    assert participating.server_update(participating.init(x, 2), x, one)[0].tolist() == [1.0]
    assert AverageAll().server_update(AverageAll().init(x, 2), x, one)[0].tolist() == [0.5]


def test_a_round_without_replies_counts_and_leaves_the_model_alone():
    strategy = FedAU(cutoff=2)
    state = strategy.init(START, 3)
    params, state, metrics = strategy.server_update(state, START, replies(START, {}))
    assert torch.equal(params, START)
    assert state.open.tolist() == [1, 1, 1]
    assert metrics["effective_participation"] == 0
    params, state, _ = strategy.server_update(state, params, replies(START, {}, failed=(1,)))
    assert torch.equal(params, START)
    assert state.weights.tolist() == [2, 2, 2]


def test_a_client_that_appears_after_a_long_absence_counts_once_at_first():
    strategy = FedAU(cutoff="none")
    state = strategy.init(START, 2)
    for _ in range(9):
        _, state, _ = strategy.server_update(state, START, replies(START, {}))
    update = replies(START, {1: np.ones(DIM)})
    moved, state, _ = strategy.server_update(state, START, update)
    assert torch.equal(moved, START + 0.5)
    assert state.weights.tolist() == [1, 10]


def test_a_client_that_joins_late_counts_from_the_round_of_its_first_reply():
    strategy = FedAU(cutoff="none")
    state = strategy.init(START, 2)
    for _ in range(4):
        _, state, _ = strategy.server_update(state, START, replies(START, {0: np.zeros(DIM)}))
    joined = replies(START, {0: np.ones(DIM), 3: np.ones(DIM)})
    assert strategy.buffer_weights(state, joined).tolist() == [1, 1]
    moved, after, metrics = strategy.server_update(state, START, joined)
    torch.testing.assert_close(moved, START + 2 / 4, rtol=0, atol=1e-15)  # N is 4 by now
    assert len(state.weights) == 2
    assert [t.dtype for t in after] == [t.dtype for t in state]
    assert after.intervals.tolist() == [5, 0, 0, 1]
    assert after.open.tolist() == [0, 5, 1, 0]  # nobody has heard of client 2, who is numbered
    assert metrics["effective_participation"] == 0.5


def test_a_federation_of_one_client_enrols_nobody():
    strategy = FedAU(cutoff="none")
    state = strategy.init(START, 1)
    for answered in (replies(START, {0: np.ones(DIM)}), replies(START, {})):
        _, state, _ = strategy.server_update(state, START, answered)
    assert [part.tolist() for part in state] == [[1], [1], [1]]


def test_nodes_that_are_still_to_come_leave_the_model_alone():
    for name in ("fedau", "average_all", "known_participation", "mifa", "fedvarp"):
        strategy = Choice("strategies", {"name": name}).make()
        state = strategy.init(START, 0)
        params, state, _ = strategy.server_update(state, START, replies(START, {}))
        assert torch.equal(params, START), name


@given(seed=st.integers(0, 999), rate=st.floats(0.1, 1))
def test_a_cutoff_of_one_is_average_all_to_the_bit(seed, rate):
    took_part = np.random.default_rng(seed).random((5, 8)) < rate
    ends = []
    for strategy in (FedAU(cutoff=1, server_lr=0.7), AverageAll(server_lr=0.7)):
        params = torch.linspace(-1, 1, DIM)
        state = strategy.init(params, 7)  # the eighth may join
        for t, row in enumerate(took_part):
            answered = replies(params, made_up(t, np.flatnonzero(row), seed))
            weights = strategy.buffer_weights(state, answered)
            assert (weights == 1).all()
            params, state, _ = strategy.server_update(state, params, answered)
        ends.append(params)
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cutoff", ["none", 50, 2, 1])
def test_with_everybody_it_is_uniform_averaging_to_the_bit(cutoff, dtype):
    ends = []
    for strategy in (FedAU(cutoff=cutoff, server_lr=0.7), FedAvg(weighted=False, server_lr=0.7)):
        params = torch.linspace(-1, 1, DIM, dtype=dtype)
        state = strategy.init(params, 7)
        for t in range(6):
            params, state, _ = strategy.server_update(
                state, params, replies(params, made_up(t, range(7)))
            )
        ends.append(params)
    assert torch.equal(*ends)


def test_given_the_weights_the_step_is_linear_in_the_updates():
    strategy = FedAU()
    weights = torch.tensor([1.0, 2.5, 7.0, 1.0, 4.0, 3.0]).double()
    state = strategy.init(START, CLIENTS)._replace(weights=weights)
    zero = torch.zeros_like(START)
    one, other = made_up(1, (0, 2, 5)), made_up(2, (0, 2, 5))
    both = {n: 3 * one[n] - other[n] for n in one}
    steps = [strategy.server_update(state, zero, replies(zero, u))[0] for u in (one, other, both)]
    torch.testing.assert_close(3 * steps[0] - steps[1], steps[2], rtol=0, atol=1e-14)


def test_buffers_are_averaged_with_the_weights():
    strategy = FedAU()
    state = strategy.init(START, 3)._replace(weights=torch.tensor([2.0, 5.0, 3.0]).double())
    answered = replies(START, made_up(1, (0, 2)))
    assert strategy.buffer_weights(state, answered).tolist() == [2, 3]


@pytest.mark.parametrize("cutoff", [0, -3, 2.5, "never", None])
def test_an_impossible_cutoff_is_refused(cutoff):
    with pytest.raises(ValueError, match=r'cutoff = .*: must be an integer >= 1, or "none"'):
        FedAU(cutoff=cutoff)


@pytest.mark.parametrize("name", ["fedau", "average_all", "known_participation", "mifa", "fedvarp"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_server_step_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ValueError, match=r"server_lr = .*: must be > 0 and finite"):
        Choice("strategies", {"name": name, "server_lr": value}).make()


def test_a_scenario_may_leave_out_the_cutoff_by_name():
    annotation = FedAU.__init__.__annotations__["cutoff"]
    assert check_value(annotation, "none") == "none"
    assert check_value(annotation, 50) == 50
    with pytest.raises(ValueError, match=r'must be int \| "none"'):
        check_value(annotation, "never")
