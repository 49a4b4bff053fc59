"""Every model of the zoo has the same bits on one Ray worker, on two and in this process."""

import numpy as np
import pytest

from fedsim.engine.inline import InlineGrid
from tests.laws import federations as fed
from tests.laws.federations import record_bits
from tests.laws.many import only
from tests.zoo import whole

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def inline():
    return InlineGrid(whole.WholeZoo(), whole.CLIENTS * len(whole.NAMES))


@pytest.fixture(scope="module")
def two_workers(lender):
    with lender.grid(whole.WholeZoo(), whole.CLIENTS * len(whole.NAMES), workers=2) as grid:
        assert len(grid.worker_pids) == 2  # both have started
        yield grid


def trained(grid, name):
    """Two rounds: the model, what was measured, and what clients keep."""
    grid.store.restore([], {})
    world = whole.world(name)
    everybody = tuple(range(whole.CLIENTS))
    strategy = fed.make_strategy("fedavg")
    strategy.declare_buffers([spec.name for spec in world.layout.buffers])
    arrays, records = fed.run_rounds(
        strategy, whole.one_model(grid, name), world.arrays,
        world.layout, cohorts=(everybody, everybody[:3]), local_clients=np.arange(whole.CLIENTS),
    )  # fmt: skip
    clients, kept = grid.store.export()
    return record_bits(arrays), records, clients, fed.named_bits(kept)


@pytest.mark.parametrize("name", whole.NAMES)
def test_workers_give_the_bits_of_this_process(inline, two_workers, name):
    expected = trained(inline, name)
    for workers in ((0,), (0, 1)):
        with only(two_workers, *workers) as grid:
            assert trained(grid, name) == expected, workers
