"""Law 1: what only makes a run fast changes no bit: same plan, all of it on, then all of it off."""

import numpy as np
import pytest

from tests import optimisations
from tests.laws import federations as fed

pytestmark = pytest.mark.slow

COHORTS = (tuple(range(8)), (0, 2, 3, 5, 7))


def run(lender, strategy, kind, procedure, *, shares):
    app = fed.make_app("mlp_dropout", procedure, fed.InMemoryData(), kind=kind)
    with lender.grid(app, len(fed.SIZES), workers=2) as grid:
        assert len(grid.worker_pids) == 2  # both have started
        assert [w.near and w.line is not None for w in grid._workers.pool] == [shares] * 2
        arrays, records = fed.run_rounds(
            fed.make_strategy(strategy), grid, fed.initial_arrays("mlp_dropout"),
            app.executor.layout, rounds=3, cohorts=COHORTS, local_clients=np.arange(8),
        )  # fmt: skip
        return fed.record_bits(arrays), records, fed.named_bits(grid.store.export()[1])


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("fedlex", "batched"),
        ("fedau", "vmap"),
        ("gossip", "loop"),
    ],
)
def test_shared_memory_pipes_and_memories_on_the_disk_change_no_bit(lender, strategy, kind):
    procedure = fed.make_procedure(momentum=0.5, keep_optimizer=True)
    with optimisations.forced("on"):
        fast = run(lender, strategy, kind, procedure, shares=True)
    with optimisations.forced("off"):
        slow = run(lender, strategy, kind, procedure, shares=False)
    assert fast == slow
    assert fast[2]  # clients remember
