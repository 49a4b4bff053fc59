"""FedSAM, FedLC, FedRS, FedNTD and MOON against NumPy, in every executor."""

import numpy as np
import pytest
import torch

from fedsim.engine.inline import InlineGrid
from strategies.fedlc import FedLC
from strategies.fedntd import FedNTD
from strategies.fedrs import FedRS
from strategies.fedsam import FedSAM
from strategies.moon import MOON
from tests.laws import federations as fed
from tests.oracles import objectives_oracle as oracle
from tests.oracles.test_drift_oracle import (
    BATCH,
    CLASSES,
    COHORTS,
    DATA,
    FEATURES,
    LR,
    batches_of,
    gradient,
    run,
)
from tests.tiers import by_turns

KINDS = ("batched", "vmap", "loop")


def expected(start, gradient_of):
    return oracle.averaged(start, COHORTS, batches_of, fed.SIZES, gradient_of, lr=LR)


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_three_rounds_of_fedsam_equal_the_oracle(kind):
    start, found, _, _ = run("fedsam", FedSAM(rho=0.6), arguments={"rho": 0.6}, kind=kind)
    there = oracle.sharpness_aware(gradient, 0.6)
    model = expected(start, lambda *_: there)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    assert np.abs(model - expected(start, lambda *_: gradient)).max() > 1e-3


def counts_of(client):
    found = DATA.clients([client])
    return np.bincount(found.targets[found.rows[0]], minlength=CLASSES)


@pytest.mark.parametrize("kind", by_turns(KINDS))
@pytest.mark.parametrize(
    ("name", "strategy", "adjustment", "key"),
    [
        ("fedlc", FedLC(tau=0.7), oracle.calibrated, "tau"),
        ("fedrs", FedRS(alpha=0.7), oracle.restricted, "alpha"),
    ],
    ids=["fedlc", "fedrs"],
)
def test_three_rounds_with_other_logits_equal_the_oracle(name, strategy, adjustment, key, kind):
    start, found, _, _ = run(name, strategy, arguments={key: 0.7}, kind=kind)
    assert (counts_of(0) == 0).any()  # a client without some classes takes part

    def gradient_of(server_round, client, received):
        adjust = adjustment(counts_of(client), 0.7)
        return lambda w, x, y: oracle.softmax_gradient(w, x, y, CLASSES, adjust)

    model = expected(start, gradient_of)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    assert np.abs(model - expected(start, lambda *_: gradient)).max() > 1e-3


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_three_rounds_of_fedntd_equal_the_oracle(kind):
    keys = {"beta": 1.5, "tau": 2.0}
    start, found, _, _ = run("fedntd", FedNTD(**keys), arguments=keys, kind=kind)

    def gradient_of(server_round, client, received):
        return lambda w, x, y: (
            gradient(w, x, y) + oracle.not_true_gradient(w, received, x, y, CLASSES, **keys)
        )

    model = expected(start, gradient_of)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    assert np.abs(model - expected(start, lambda *_: gradient)).max() > 1e-3


SIZES = (FEATURES, 9, CLASSES)  # of the MLP


@pytest.mark.parametrize("kind", by_turns(KINDS))
def test_four_rounds_of_moon_equal_the_oracle(kind):
    keys = {"mu": 2.0, "temperature": 0.5}
    procedure = fed.make_procedure(
        "local_sgd",
        local_lr=LR,
        batch_size=BATCH,
        local_epochs=2,
        parts=fed.parts_for("moon", **keys),
    )
    app = fed.make_app("mlp", procedure, DATA, dtype="float64", kind=kind)
    grid = InlineGrid(app, 8)
    cohorts = (*COHORTS, (0, 1, 3, 5, 7))
    arrays, _ = fed.run_rounds(
        MOON(**keys), grid, fed.initial_arrays("mlp", dtype="float64"), app.layout, rounds=4,
        cohorts=cohorts,
    )  # fmt: skip
    found, start = (
        app.layout.flatten({n: torch.from_numpy(a.numpy()) for n, a in each.items()}).numpy()
        for each in (arrays, fed.initial_arrays("mlp", dtype="float64"))
    )
    options = {"lr": LR, "tau": 0.5}
    model, last = oracle.moon(start, cohorts, batches_of, fed.SIZES, SIZES, mu=2.0, **options)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-10)
    clients, tensors = grid.store.export()
    kept = app.layout.flatten({n.partition("/")[2]: t for n, t in tensors.items()}).numpy()
    for client, mine in zip(clients, kept, strict=True):
        np.testing.assert_allclose(mine, last[client], rtol=0, atol=1e-10)
    plain, _ = oracle.moon(start, cohorts, batches_of, fed.SIZES, SIZES, mu=0.0, **options)
    assert np.abs(model - plain).max() > 1e-3
