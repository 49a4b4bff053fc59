"""Federated adversarial learning against NumPy, and what its paper is about."""

import numpy as np
import pytest

from fedsim.basics.rng import generator
from fedsim.client.perturbation import starts
from fedsim.engine.inline import InlineGrid
from strategies.fal import FAL
from tests.laws import federations as fed
from tests.oracles import fal_oracle as oracle
from tests.tiers import by_turns, slow

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


@pytest.mark.parametrize("kind", ["batched", slow("vmap"), slow("loop")])
@pytest.mark.parametrize("random_start", [False, True], ids=["from the sample", "random start"])
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_three_rounds_of_fal_equal_the_oracle(norm, random_start, kind):
    attack = {"norm": norm, "radius": 0.3, "step": 0.11, "steps": 4}
    strategy = FAL(**attack, server_lr=0.7)
    held(kind, strategy, attack, random_start=random_start)


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_a_box_bounds_what_samples_become(kind):
    attack = {"norm": "inf", "radius": 0.3, "step": 0.11, "steps": 4, "box": (-9.0, 9.0)}
    held(kind, FAL(server_lr=0.7), attack)


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_three_rounds_of_trades_equal_the_oracle(kind):
    attack = {"norm": "inf", "radius": 0.3, "step": 0.11, "steps": 4}
    held(
        kind, FAL(server_lr=0.7), attack, random_start=True, loss="trades", beta=2.5,
        oracle_options={"kind": "trades", "beta": 2.5},
    )  # fmt: skip


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_three_rounds_of_both_losses_equal_the_oracle(kind):
    attack = {"norm": "2", "radius": 0.5, "step": 0.2, "steps": 3}
    held(
        kind, FAL(server_lr=0.7), attack, loss="mixed", share_adversarial=0.3,
        oracle_options={"kind": "mixed", "mix": 0.3},
    )  # fmt: skip


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_one_step_of_clients_of_equal_size_is_a_step_of_pgd_training_on_all_samples(kind):
    data = fed.InMemoryData((6, 6, 6, 6))
    attack = {"norm": "inf", "radius": 0.3, "step": 0.1, "steps": 5}
    part = {"name": "adversarial", **attack, "random_start": False}
    procedure = fed.local_sgd(local_lr=LR, batch_size=6, local_steps=1, parts=[part])
    app = fed.make_app("logistic", procedure, data, dtype="float64", kind=kind)
    start = fed.initial_arrays("logistic", dtype="float64")
    arrays, _ = fed.run_rounds(
        FAL(), InlineGrid(app, 4), start, app.layout, rounds=1, cohorts=((0, 1, 2, 3),)
    )
    rows = np.concatenate(data.clients(range(4)).rows)
    features = data.clients([0]).features[rows].reshape(24, -1).astype(np.float64)
    targets = data.clients([0]).targets[rows]
    expected = oracle.client(as_model(start), [(features, targets)], lr=LR, attack=attack)
    for name, found in as_model(arrays).items():
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-12)


def test_the_oracles_slopes_are_those_of_its_losses():
    draw = np.random.default_rng(0)
    model = {"W": draw.normal(size=(3, 4)), "b": draw.normal(size=3)}
    x, y = draw.normal(size=(5, 4)), draw.integers(3, size=5)
    moved, h = x + draw.normal(size=x.shape), 1e-6
    clean = oracle.softmax(oracle.logits_of(model, x))

    def apart(points):
        return oracle.divergence(clean, oracle.softmax(oracle.logits_of(model, points)))

    def trades(weight):
        now = {**model, "W": weight}
        p, q = (oracle.softmax(oracle.logits_of(now, z)) for z in (x, moved))
        return (oracle.losses(now, x, y) + 2.5 * oracle.divergence(p, q)).mean()

    for d in range(4):
        nudge = h * np.eye(4)[d]
        for rises, height in (
            (oracle.slope(model, x, y), lambda z: oracle.losses(model, z, y)),
            (oracle.divergence_slope(model, clean, moved), apart),
        ):
            at = moved if height is apart else x
            numeric = (height(at + nudge) - height(at - nudge)) / (2 * h)
            np.testing.assert_allclose(rises[:, d], numeric, atol=1e-7)
        for c in range(3):
            change = np.zeros((3, 4))
            change[c, d] = h
            numeric = (trades(model["W"] + change) - trades(model["W"] - change)) / (2 * h)
            found = oracle.trades_by_model(model, x, y, moved, 2.5)["W"][c, d]
            assert found == pytest.approx(numeric, abs=1e-7)
