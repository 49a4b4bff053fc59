"""Law 5: every strategy says in which setting it becomes another one, and does.

The settings are declared by the strategies themselves (`degenerate`), so a new file is covered. A
tolerance of 0 asks for the same bits, in float32; any other is the largest difference in float64.
"""

import numpy as np
import pytest
import torch

from fedsim.engine.inline import InlineGrid
from fedsim.messages.records import array_record
from fedsim.scenario import discovery
from tests.laws import federations as fed

ROUNDS = 3
DECLARED = {
    f"{name}-{number}": (name, case)
    for name in fed.strategies()
    for number, case in enumerate(discovery.strategy_factory(name).degenerate)
}
EVERYBODY = (tuple(range(8)),)
SOME = ((0, 2, 3, 5, 7), (1, 2, 3, 4, 6, 7), (0, 1, 5, 6))


class IdenticalClients(fed.InMemoryData):
    """Eight clients that hold the same samples."""

    def clients(self, client_ids, *, split="train"):
        found = super().clients(client_ids, split=split)
        if split == "train":
            found = found._replace(rows=[self._rows["train"][5]] * len(client_ids))
        return found


def models(
    name, arguments, *, dtype, alike, cohorts, rounds=ROUNDS, batch_size=256, own=False, late=False
):
    """The model after every round, and the strategy's metrics."""
    # whole clients in one batch: the order of samples must not tell identical clients apart
    parts = fed.parts_for(name, **arguments)
    procedure = fed.make_procedure(
        "local_sgd", batch_size=batch_size, local_epochs=2, momentum=0.5, parts=parts
    )
    data = IdenticalClients() if alike else fed.InMemoryData()
    app = fed.make_app("mlp", procedure, data, dtype=dtype)
    found = []

    class Keep:
        def round_ended(self, report):
            found.append(report.arrays)

    strategy = fed.make_strategy(name, **arguments)
    if hasattr(strategy, "declare_rates"):
        strategy.declare_rates(np.full(8, 1.0 if cohorts == EVERYBODY else 0.6))
    grid = InlineGrid(app, 8)
    fed.run_rounds(
        strategy,
        grid,
        fed.initial_arrays("mlp", dtype=dtype),
        app.layout,
        rounds=rounds,
        cohorts=cohorts,
        late=late,
        hooks=[Keep()],
    )
    return [*found, own_models(app, grid, found[-1])] if own else found


def own_models(app, grid, arrays):
    """Each client's own model at the end, the shared one where a client has none."""
    shared = {n: torch.from_numpy(arrays[n].numpy().copy()) for n in arrays}
    procedure = app.executor.procedure
    clients, state = grid.store.export()
    models = {}
    for client in range(8):
        place = clients.index(client) if client in clients else None
        mine = (
            procedure.initial_state(shared)
            if place is None
            else {n: rows[place] for n, rows in state.items()}
        )
        own, _ = procedure.own_model(shared, mine)
        models |= {f"{client}.{name}": tensor for name, tensor in own.items()}
    return array_record(models)


def pair(name, case, **options):
    dtype = "float64" if case.tolerance else "float32"
    return [
        models(who, dict(arguments), dtype=dtype, **options)
        for who, arguments in ((name, case.settings), (case.becomes, case.with_settings))
    ]


@pytest.mark.parametrize("name", fed.strategies())
def test_every_strategy_declares_a_degenerate_setting(name):
    cases = discovery.strategy_factory(name).degenerate
    assert cases, f"{name} must say in which setting it becomes another strategy"
    for case in cases:
        assert (name, case.settings) != (case.becomes, case.with_settings)


@pytest.mark.parametrize(("name", "case"), DECLARED.values(), ids=DECLARED)
def test_in_its_degenerate_setting_a_strategy_is_the_other_one(name, case):
    rounds = 1 if case.given == "first round" else ROUNDS
    alike = case.given in ("identical clients", "identical models")
    one, other = pair(name, case, alike=alike, cohorts=EVERYBODY, rounds=rounds)
    assert len(one) == len(other) == rounds + 1
    moved = fed.largest_difference(one[0], one[-1])
    assert moved > 1e-3
    for mine, theirs in zip(one, other, strict=True):
        if case.tolerance:
            assert fed.largest_difference(mine, theirs) <= case.tolerance
        else:
            assert fed.record_bits(mine) == fed.record_bits(theirs)


@pytest.mark.parametrize(("name", "case"), DECLARED.values(), ids=DECLARED)
def test_elsewhere_it_is_not(name, case):
    """The control: with its defaults, unequal clients and absences it is a strategy of its own.

    Batches are small, so that clients take unequally many steps. Where the model that all share is
    another strategy's, the clients' own are not. Where it looks at the age of replies, some are
    late.
    """
    options = {"dtype": "float64", "alike": False, "cohorts": SOME, "batch_size": 16, "own": True}
    options["late"] = discovery.strategy_factory(name).reads_staleness
    one = models(name, {}, **options)
    other = models(case.becomes, dict(case.with_settings), **options)
    assert fed.largest_difference(one[-1], other[-1]) > max(1e-6, 1e3 * case.tolerance)
    assert all(np.isfinite(array.numpy()).all() for array in one[-1].values())
