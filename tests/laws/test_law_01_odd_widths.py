"""Law 1 where products are awkward: layers and batches whose sizes are no multiples of four.

Some kernels take another path for what is left over, and which one may depend on where a client's
numbers lie; the engine pins what decides that (`fedsim.basics.kernels`).
"""

import itertools

import numpy as np
import pytest

from fedsim.basics.samples import SampleSpec
from fedsim.client.executor import CohortExecutor
from fedsim.tasks import named as tasks
from tests.laws.federations import SEED, InMemoryData, job, make_procedure, result_bits

WIDTHS = (9, 15, 17, 30)
SIZES = (49, 50, 51, 7, 120, 33, 50, 1)


class Wide(InMemoryData):
    """Clients with so many features a sample."""

    def __init__(self, features):
        super().__init__(SIZES)
        self.spec = SampleSpec((features,), 3)
        draw = np.random.default_rng(features)
        self._features = {
            split: draw.normal(size=(len(rows), features)).astype(np.float32)
            for split, rows in self._features.items()
        }
        self._wide = features

    def __reduce__(self):
        return Wide, (self._wide,)


def executor_of(features, hidden, kind, arguments):
    data = Wide(features)
    task = tasks.make_task({"model": "mlp", "hidden": hidden}, data.spec)
    procedure = make_procedure(**arguments)
    return CohortExecutor(task, procedure, data, seed=SEED, kind=kind)


PROCEDURES = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adam": {"optimizer": "adam", "keep_optimizer": True},
}
CASES = [
    pytest.param(width, kind, arguments, batch, id=f"{width}-{kind}-{name}-{batch}")
    for width, kind, (name, arguments), batch in itertools.product(
        WIDTHS, ("batched", "vmap"), PROCEDURES.items(), (50, 15)
    )
]


@pytest.mark.parametrize(("width", "kind", "arguments", "batch"), CASES)
def test_bits_do_not_depend_on_neighbours_place_or_absence(width, kind, arguments, batch):
    executor = executor_of(width, [width, 5], kind, {**arguments, "batch_size": batch})
    whole = executor.train(job(executor, (0, 4, 6)))
    expected = result_bits(whole, 1)
    for place, members in ((0, (4, 5, 7)), (2, (1, 2, 4)), (1, (3, 4, 5))):
        found = executor.train(job(executor, members))
        assert result_bits(found, place) == expected, members
    for gone, others in ((6, (0, 1)), (0, (1, 2))):
        found = executor.train(job(executor, (0, 4, 6), absent=(gone,)))
        for place in others:
            assert result_bits(found, place) == result_bits(whole, place)
    alone, beside = (executor.train(job(executor, who)) for who in ((4,), (3, 4)))
    assert result_bits(alone, 0) == result_bits(beside, 1)


def test_widths_make_different_federations():
    bits = [
        result_bits(e.train(job(e, (0, 1))), 0)["params"]
        for e in (executor_of(width, [width], "batched", {}) for width in WIDTHS)
    ]
    assert len(set(bits)) == len(WIDTHS)
