"""Personal layers against FedPer in NumPy: three rounds, clients of unequal size, absences."""

import numpy as np
import pytest

from fedsim.engine.inline import InlineGrid
from tests.laws import federations as fed
from tests.oracles import fedper_oracle as oracle

NAMES = {"V": "hidden1.weight", "c": "hidden1.bias", "W": "output.weight", "b": "output.bias"}
COHORTS = ((0, 3, 5), (1, 2, 3, 4, 5), (0, 3, 7))
LR, STEPS = 0.3, 3


@pytest.fixture(scope="module")
def expected():
    data = fed.InMemoryData()
    found = data.clients(range(8))
    samples = [
        (found.features[rows].reshape(len(rows), -1).astype(float), found.targets[rows])
        for rows in found.rows
    ]
    state = fed.make_task("personal_output", dtype="float64").build_model(fed.SEED).state_dict()
    start = {name: state[known].numpy() for name, known in NAMES.items()}
    return samples, start, oracle.rounds(start, samples, COHORTS, lr=LR, steps=STEPS)


@pytest.mark.parametrize("kind", ["loop", "batched", "vmap"])
def test_three_rounds_with_absences_equal_the_oracle(kind, expected):
    _, start, (base, personal) = expected
    procedure = fed.make_procedure(local_lr=LR, batch_size=256, local_epochs=STEPS)
    app = fed.make_app("personal_output", procedure, kind=kind, dtype="float64")
    grid = InlineGrid(app, 8)
    arrays, _ = fed.run_rounds(
        fed.make_strategy("fedavg"), grid, fed.initial_arrays("personal_output", dtype="float64"),
        app.layout, rounds=3, cohorts=COHORTS,
    )  # fmt: skip
    assert set(arrays) == {NAMES[name] for name in oracle.BASE}
    for name in oracle.BASE:
        np.testing.assert_allclose(arrays[NAMES[name]].numpy(), base[name], rtol=0, atol=1e-12)
    clients, states = grid.store.export()
    assert clients == [0, 1, 2, 3, 4, 5, 7]  # client 6 never took part
    assert set(states) == {f"personal.{NAMES[name]}" for name in oracle.PERSONAL}
    for place, client in enumerate(clients):
        for name in oracle.PERSONAL:
            mine = states[f"personal.{NAMES[name]}"][place].numpy()
            np.testing.assert_allclose(mine, personal[client][name], rtol=0, atol=1e-12)
            assert np.abs(mine - start[name]).max() > 1e-4


def test_clients_evaluate_with_their_own_layers_or_the_initial_ones(expected):
    _, start, (base, personal) = expected
    data = fed.InMemoryData(test_sizes=(5, 1, 30, 7, 2, 110, 9, 3))
    procedure = fed.make_procedure(local_lr=LR, batch_size=256, local_epochs=STEPS)
    app = fed.make_app("personal_output", procedure, data, dtype="float64")
    _, records = fed.run_rounds(
        fed.make_strategy("fedavg"), InlineGrid(app, 8),
        fed.initial_arrays("personal_output", dtype="float64"), app.layout, rounds=3,
        cohorts=COHORTS, local_clients=np.arange(8),
    )  # fmt: skip
    found = data.clients(range(8), split="test")
    losses = []
    samples = fed.InMemoryData().clients(range(8))
    trained = data.clients(range(8))  # samples of training do not depend on the test sizes
    assert all(
        np.array_equal(trained.features[a], samples.features[b])
        for a, b in zip(trained.rows, samples.rows, strict=True)
    )
    for client, rows in enumerate(found.rows):
        own = personal[client] if client != 6 else {n: start[n] for n in oracle.PERSONAL}
        features = found.features[rows].reshape(len(rows), -1).astype(float)
        losses.append(oracle.losses_and_gradient({**base, **own}, features, found.targets[rows])[0])
    last = records[-1]
    others = [loss for client, loss in enumerate(losses) if client != 6]
    assert last["local/loss_mean"] == pytest.approx(np.mean(losses), abs=1e-12)
    assert last["personal/loss"] == pytest.approx(np.mean(others), abs=1e-12)
    assert last["personal/loss_worst_decile"] == pytest.approx(max(others), abs=1e-12)
    assert last["personal/loss_untrained"] == pytest.approx(losses[6], abs=1e-12)
    assert (last["personal/clients"], last["personal/clients_untrained"]) == (7, 1)
    assert not any(name.startswith("test/") for name in last)
