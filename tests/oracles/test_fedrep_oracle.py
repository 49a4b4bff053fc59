"""FedRep and FedBABU against NumPy: three rounds, clients of unequal size, absences."""

import numpy as np
import pytest

from fedsim.engine.inline import InlineGrid
from tests.laws import federations as fed
from tests.oracles import fedper_oracle as oracle
from tests.oracles.test_fedper_oracle import COHORTS, NAMES

DATA = fed.InMemoryData()
LR, BATCH, EPOCHS = 0.2, 16, 3  # 1 to 13 steps an epoch

# by name, (the part, which tensors train in each of the epochs, momentum)
METHODS = {
    "FedRep": (
        {"name": "alternating", "head_epochs": 2},
        (oracle.PERSONAL, oracle.PERSONAL, oracle.BASE),
        0.0,
    ),
    "FedRep, momentum": (
        {"name": "alternating", "head_epochs": 1},
        (oracle.PERSONAL, oracle.BASE, oracle.BASE),
        0.8,
    ),
    "FedBABU": ({"name": "frozen"}, (oracle.BASE,) * 3, 0.8),
    "a frozen bias": ({"name": "frozen", "tensors": ["*1.bias"]}, (("V", "W", "b"),) * 3, 0.8),
}


def epochs_of(server_round, client):
    """The client's batches in a round, epoch by epoch."""
    steps = -(-fed.SIZES[client] // BATCH)
    found = list(fed.batches(DATA, client, server_round, BATCH, EPOCHS * steps))
    return [found[start : start + steps] for start in range(0, len(found), steps)]


@pytest.mark.parametrize("kind", ["loop", "batched", "vmap"])
@pytest.mark.parametrize("method", METHODS)
def test_three_rounds_with_absences_equal_the_oracle(method, kind):
    part, phases, momentum = METHODS[method]
    options = {"momentum": momentum, "weight_decay": 0.01}
    state = fed.make_task("personal_output", dtype="float64").build_model(fed.SEED).state_dict()
    start = {name: state[known].numpy() for name, known in NAMES.items()}

    def train(server_round, client, model):
        batches = epochs_of(server_round, client)
        return oracle.trained_in_turn(model, zip(phases, batches, strict=True), lr=LR, **options)

    base, personal = oracle.averaged(start, fed.SIZES, COHORTS, train)
    procedure = fed.make_procedure(
        local_lr=LR, batch_size=BATCH, local_epochs=EPOCHS, parts=[part], **options
    )
    app = fed.make_app("personal_output", procedure, kind=kind, dtype="float64")
    grid = InlineGrid(app, 8)
    arrays, _ = fed.run_rounds(
        fed.make_strategy("fedavg"), grid, fed.initial_arrays("personal_output", dtype="float64"),
        app.layout, rounds=3, cohorts=COHORTS,
    )  # fmt: skip
    for name in oracle.BASE:
        np.testing.assert_allclose(arrays[NAMES[name]].numpy(), base[name], rtol=0, atol=1e-11)
    clients, states = grid.store.export()
    for place, client in enumerate(clients):
        for name in oracle.PERSONAL:
            mine = states[f"personal.{NAMES[name]}"][place].numpy()
            np.testing.assert_allclose(mine, personal[client][name], rtol=0, atol=1e-11)
            if method == "FedBABU":
                assert np.array_equal(mine, start[name])
