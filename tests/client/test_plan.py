"""The executor that "auto" takes, beside those that are asked for."""

import pytest
from torch import nn

from fedsim.basics.samples import SampleSpec
from fedsim.client.plan import make_plan
from fedsim.tasks import make_task

SPEC = SampleSpec((3, 8, 8), 10)


def convolves(width: int) -> nn.Module:
    """A network that is no chain of known layers, of about 9 * width^2 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.Tanh(), nn.Conv2d(width, width, 3), nn.Flatten(),
        nn.Linear(width * 16, 10),
    )  # fmt: skip


def computes(width: int) -> nn.Module:
    """A network without convolutions, of about width^2 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
        nn.Linear(width, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "device", "taken"),
    [
        (lambda: convolves(16), "cpu", "vmap"),
        (lambda: convolves(400), "cpu", "loop"),
        (lambda: convolves(400), "cuda", "vmap"),
        (lambda: computes(1100), "cpu", "vmap"),
    ],
    ids=["small", "large", "large on a GPU", "large without convolutions"],
)
def test_large_convolutions_are_trained_client_by_client_on_a_cpu(model, device, taken):
    task = make_task({"kind": "classification", "model": "mlp"}, SPEC)
    task.build_model = lambda seed: model()
    plan = make_plan(task, spec=SPEC, expected_cohort=4, device=device)
    assert plan.executor == taken
    assert ("convolutions" in plan.reason) == (taken == "loop")
    asked = make_plan(task, spec=SPEC, expected_cohort=4, device=device, executor="vmap")
    assert asked.executor == "vmap"
