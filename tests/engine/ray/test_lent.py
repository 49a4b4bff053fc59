"""The tests' own lender of workers: the processes stay, and nothing else of the grid before."""

import numpy as np
import pytest

from fedsim.engine.inline import InlineGrid
from tests.laws import federations as fed


@pytest.mark.parametrize("first", ["logistic", "cnn_batchnorm"])
def test_a_grid_takes_the_processes_of_the_one_before_over_and_trains_its_own_model(lender, first):
    seen = []
    for model in (first, "mlp"):
        app, arrays = fed.make_app(model), fed.initial_arrays(model)
        with lender.grid(app, 8, workers=2) as grid, InlineGrid(app, 8) as inline:
            seen.append(set(grid.worker_pids))
            found, expected = (
                each.send_and_receive(fed.configure(fed.make_strategy("fedavg"), each, arrays))
                for each in (grid, inline)
            )
            assert all(worker.near and worker.line is not None for worker in grid._workers.pool)
        assert not found.failures
        assert np.array_equal(found.params.numpy(), expected.params.numpy())
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]
