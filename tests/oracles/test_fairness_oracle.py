"""q-FedAvg and AFL against NumPy, in every executor."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics.errors import RunError
from strategies.afl import AFL, on_simplex
from strategies.qfedavg import QFedAvg, fair_weights
from tests.laws import federations as fed
from tests.oracles import fairness_oracle as oracle
from tests.oracles import sgd_oracle
from tests.oracles.test_drift_oracle import COHORTS, DATA, LR, as_model, batches_of, gradient, run
from tests.tiers import by_turns

KINDS = ("batched", "vmap", "loop")


def loss_of(w, client):
    found = DATA.clients([client])
    rows = found.rows[0]
    features = found.features[rows].reshape(len(rows), -1).astype(np.float64)
    return sgd_oracle.loss(as_model(w), features, found.targets[rows])


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize("q", [0.5, 2.0])
def test_three_rounds_of_qfedavg_equal_the_oracle(q, kind):
    start, found, records, _ = run("qfedavg", QFedAvg(q=q, lipschitz=5.0), kind=kind)
    options = {"lr": LR, "q": q, "lipschitz": 5.0}
    model = oracle.qfedavg(start, COHORTS, batches_of, loss_of, gradient, **options)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    before = oracle.qfedavg(start, COHORTS[:-1], batches_of, loss_of, gradient, **options)
    losses = [loss_of(before, k) for k in COHORTS[-1]]
    assert records[-1]["server/loss_mean"] == pytest.approx(np.mean(losses), abs=1e-11)
    assert records[-1]["server/loss_max"] == pytest.approx(max(losses), abs=1e-11)
    assert records[-1]["server/loss_std"] == pytest.approx(np.std(losses), abs=1e-11)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_three_rounds_of_afl_equal_the_oracle(kind):
    strategy = AFL(mixture_lr=0.07)
    start, found, records, _ = run("afl", strategy, kind=kind)
    options = {"clients": 8, "lr": LR, "mixture_lr": 0.07}
    model, mixture = oracle.afl(start, COHORTS, batches_of, loss_of, gradient, **options)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    np.testing.assert_allclose(strategy.state.mixture.numpy(), mixture, rtol=0, atol=1e-11)
    assert records[-1]["server/mixture_max"] == pytest.approx(mixture.max(), abs=1e-11)
    before, _ = oracle.afl(start, COHORTS[:-1], batches_of, loss_of, gradient, **options)
    losses = [loss_of(before, k) for k in COHORTS[-1]]
    assert records[-1]["server/loss_mean"] == pytest.approx(np.mean(losses), abs=1e-11)
    assert records[-1]["server/loss_max"] == pytest.approx(max(losses), abs=1e-11)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_the_nearest_point_of_the_simplex(values):
    found = on_simplex(torch.tensor(values, dtype=torch.float64)).numpy()
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found, oracle.on_simplex(np.array(values)), rtol=0, atol=1e-12)


def test_a_loss_of_nothing_has_a_finite_weight():
    losses, squares = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    weights, size = fair_weights(losses, squares, q=0.5, lipschitz=1.0)
    assert bool(weights.isfinite().all())
    assert 0 < size < float("inf")


def test_clients_without_the_part_are_named_with_the_remedy():
    for strategy in (QFedAvg(), AFL()):
        with pytest.raises(RunError, match=r'give them the part: .* name = "received_loss"'):
            run("fedavg", strategy)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: QFedAvg(q=-1.0), "^q = -1.0: must be >= 0"),
        (lambda: QFedAvg(lipschitz=0.0), "^lipschitz = 0.0: must be > 0"),
        (lambda: AFL(mixture_lr=-0.1), "^mixture_lr = -0.1: must be >= 0"),
        (lambda: AFL(server_lr=0.0), "^server_lr = 0.0: must be > 0"),
    ],
)
def test_impossible_numbers_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_client_without_samples_has_no_loss():
    procedure = fed.make_procedure(parts=fed.parts_for("qfedavg"))
    data = fed.InMemoryData((*fed.SIZES, 0))
    for kind in KINDS:
        executor = fed.make_executor("mlp", procedure, data, kind=kind)
        found = executor.train(fed.job(executor, (5, len(fed.SIZES)))).extra["received_loss"]
        assert found[1] == 0 < found[0]
