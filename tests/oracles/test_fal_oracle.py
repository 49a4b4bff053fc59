"""Federated adversarial learning against NumPy, and what its paper is about."""

import numpy as np
import pytest

from fedsim.basics.rng import generator
from fedsim.client.perturbation import starts
from fedsim.engine.inline import InlineGrid
from strategies.fal import FAL
from tests.laws import federations as fed
from tests.oracles import fal_oracle as oracle

COHORTS = ((0, 3, 5), (1, 2, 3, 4, 5), (0, 3, 7))
DATA = fed.InMemoryData()
LR, BATCH, EPOCHS = 0.2, 8, 2


def steps_of(client):
    return EPOCHS * -(-fed.SIZES[client] // BATCH)


def batches_of(server_round, client):
    return list(fed.batches(DATA, client, server_round, BATCH, steps_of(client)))


def starts_of(norm, radius):
    def drawn(server_round, client):
        random = generator(fed.SEED, "adversarial start", server_round, client)
        every = [starts(random, BATCH, fed.SHAPE, norm) for _ in range(steps_of(client))]
        return [radius * each.reshape(BATCH, -1).astype(np.float64) for each in every]

    return drawn


def as_model(record):
    weight, bias = (record[f"output.{n}"].numpy() for n in ("weight", "bias"))
    return {"W": weight.reshape(fed.CLASSES, -1), "b": bias.reshape(-1)}


def run(kind, strategy, **part):
    parts = [{"name": "adversarial", **part}]
    procedure = fed.local_sgd(local_lr=LR, batch_size=BATCH, local_epochs=EPOCHS, parts=parts)
    app = fed.make_app("logistic", procedure, DATA, dtype="float64", kind=kind)
    start = fed.initial_arrays("logistic", dtype="float64")
    arrays, _ = fed.run_rounds(
        strategy, InlineGrid(app, 8), start, app.layout, rounds=3, cohorts=COHORTS
    )
    return as_model(start), as_model(arrays)


def held(kind, strategy, attack, *, random_start=False, oracle_options=None, **part):
    start, found = run(kind, strategy, random_start=random_start, **attack, **part)
    model = oracle.fal(
        start,
        COHORTS,
        batches_of,
        fed.SIZES,
        lr=LR,
        attack=attack,
        server_lr=0.7,
        starts_of=starts_of(attack["norm"], attack["radius"]) if random_start else None,
        **(oracle_options or {}),
    )
    for name in found:
        np.testing.assert_allclose(found[name], model[name], rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["batched", "vmap", "loop"])
@pytest.mark.parametrize("random_start", [False, True], ids=["from the sample", "random start"])
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_three_rounds_of_fal_equal_the_oracle(norm, random_start, kind):
    attack = {"norm": norm, "radius": 0.3, "step": 0.11, "steps": 4}
    strategy = FAL(**attack, server_lr=0.7)
    held(kind, strategy, attack, random_start=random_start)


@pytest.mark.parametrize("kind", ["batched", "vmap", "loop"])
def test_a_box_bounds_what_samples_become(kind):
    attack = {"norm": "inf", "radius": 0.3, "step": 0.11, "steps": 4, "box": (-9.0, 9.0)}
    held(kind, FAL(server_lr=0.7), attack)


@pytest.mark.parametrize("kind", ["batched", "vmap", "loop"])
def test_three_rounds_of_trades_equal_the_oracle(kind):
    attack = {"norm": "inf", "radius": 0.3, "step": 0.11, "steps": 4}
    held(
        kind, FAL(server_lr=0.7), attack, random_start=True, loss="trades", beta=2.5,
        oracle_options={"kind": "trades", "beta": 2.5},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["batched", "vmap", "loop"])
def test_three_rounds_of_both_losses_equal_the_oracle(kind):
    attack = {"norm": "2", "radius": 0.5, "step": 0.2, "steps": 3}
    held(
        kind, FAL(server_lr=0.7), attack, loss="mixed", share_adversarial=0.3,
        oracle_options={"kind": "mixed", "mix": 0.3},
    )  # fmt: skip
