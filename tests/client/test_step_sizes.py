"""Schedules of the step size: torch's own, and the same in every executor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.local_sgd import LocalSGD
from fedsim.client.overriding import descent_of
from fedsim.client.step_sizes import step_sizes
from tests.client.test_part import CLIENTS, Counting
from tests.laws import federations as fed
from tests.tiers import by_turns

UNITS = 14
TABLES = {
    "constant": {"kind": "constant", "warmup": 3},
    "step": {"kind": "step", "every": 3, "factor": 0.3},
    "step, warmed up": {"kind": "step", "every": 2, "factor": 0.5, "warmup": 4},
    "cosine": {"kind": "cosine", "length": UNITS},
    "cosine, warmed up": {"kind": "cosine", "length": UNITS, "warmup": 5, "floor": 0.25},
}


def by_torch(table, units=UNITS):
    """The factors of torch.optim.lr_scheduler."""
    schedulers = torch.optim.lr_scheduler
    warmup = table.get("warmup", 0)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rising = schedulers.LinearLR(sgd, 1 / (warmup + 1), total_iters=warmup) if warmup else None
    after = {
        "constant": lambda: schedulers.ConstantLR(sgd, factor=1.0),
        "step": lambda: schedulers.StepLR(sgd, table["every"], table["factor"]),
        "cosine": lambda: schedulers.CosineAnnealingLR(
            sgd, table["length"] - warmup, table.get("floor", 0.0)
        ),
    }[table["kind"]]()
    schedule = schedulers.SequentialLR(sgd, [rising, after], [warmup]) if rising else after
    found = []
    for _ in range(units):
        found.append(schedule.get_last_lr()[0])
        sgd.step()
        schedule.step()
    return found


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_it_is_torchs(table):
    schedule = step_sizes(table)
    found = [schedule.at(unit) for unit in range(UNITS)]
    assert found == pytest.approx(by_torch(table), abs=1e-12)
    at_once = schedule.each(torch.arange(UNITS, dtype=torch.float64))
    assert at_once.tolist() == pytest.approx(found, abs=1e-15)


def test_a_cosine_stays_at_its_floor():
    assert step_sizes({"kind": "cosine", "length": 3, "floor": 0.5}).at(1000) == 0.5


@given(
    st.sampled_from(["constant", "step", "cosine"]),
    st.integers(0, 9),
    st.integers(1, 30),
    st.floats(0, 1),
    st.integers(0, 100),
)
def test_a_factor_lies_between_0_and_1(kind, warmup, more, number, unit):
    keys = {
        "constant": {},
        "step": {"every": more, "factor": max(number, 0.01)},
        "cosine": {"length": warmup + more, "floor": number},
    }[kind]
    assert 0 <= step_sizes({"kind": kind, "warmup": warmup, **keys}).at(unit) <= 1 + 1e-12


@pytest.mark.parametrize("table", [None, {}, {"kind": "constant"}, {"over": "steps"}])
def test_what_says_nothing_changes_no_bit(table):
    found = []
    for arguments in ({}, {"schedule": table}):
        executor = fed.make_executor("mlp", LocalSGD(batch_size=8, **arguments))
        found.append(executor.train(fed.job(executor, CLIENTS, server_round=3)).params)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
def test_over_rounds_it_is_a_step_size_of_the_round(kind):
    schedule = {"kind": "cosine", "length": 8}
    scheduled = LocalSGD(local_lr=0.2, batch_size=8, schedule=schedule)
    plain = LocalSGD(local_lr=0.2 * (1 + math.cos(math.pi * 3 / 8)) / 2, batch_size=8)
    executors = [
        fed.make_executor("mlp", each, kind=kind, dtype="float64") for each in (scheduled, plain)
    ]
    one, other = (each.train(fed.job(each, CLIENTS, server_round=4)).params for each in executors)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_set_up_exchange_is_no_round_of_it():
    schedule = {"kind": "constant", "warmup": 9}
    found = []
    for arguments in ({}, {"schedule": schedule}):
        executor = fed.make_executor("mlp", LocalSGD(batch_size=8, **arguments))
        found.append(executor.train(fed.job(executor, CLIENTS, server_round=0)).params)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", by_turns(["batched", "vmap", "loop"]))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_over_steps_it_is_torchs_descent(kind, momentum):
    table = {"kind": "cosine", "over": "steps", "length": 8, "warmup": 2}
    options = {"local_lr": 0.2, "momentum": momentum, "batch_size": 8, "local_epochs": 2}
    procedure = LocalSGD(**options, schedule=table, parts=[Counting()])
    assert descent_of(procedure, 1) is not None
    executor = fed.make_executor("mlp", procedure, kind=kind, dtype="float64")
    result = executor.train(fed.job(executor, CLIENTS))
    factors = [*by_torch(table, 8), *[0.0] * 8]
    for row, client in enumerate(CLIENTS):
        model = fed.make_task("mlp", dtype="float64").build_model(fed.SEED)
        sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=momentum)
        steps = 2 * -(-fed.SIZES[client] // 8)
        seen = fed.batches(executor.data, client, 1, 8, steps)
        for factor, (features, targets) in zip(factors, seen, strict=False):
            sgd.param_groups[0]["lr"] = 0.2 * factor
            sgd.zero_grad()
            outputs = model(torch.from_numpy(features))
            torch.nn.functional.cross_entropy(outputs, torch.from_numpy(targets)).backward()
            sgd.step()
        expected = executor.layout.flatten({n: p.detach() for n, p in model.named_parameters()})
        torch.testing.assert_close(result.params[row], expected, rtol=0, atol=1e-11)
        path = 0.2 * sum(factors[:steps])
        assert float(result.extra["path"][row]) == pytest.approx(path, abs=1e-12)


REFUSED = [
    ({"kind": "cosin"}, 'schedule.kind = "cosin".*did you mean "cosine"'),
    ({"over": "round"}, 'schedule.over = "round".*did you mean "rounds"'),
    ({"kind": "cosine", "lenght": 3}, "'lenght' is not a key of a schedule.*'length'"),
    ({"kind": "cosine"}, 'kind = "cosine" needs length, a number of rounds'),
    ({"kind": "step", "over": "steps"}, 'kind = "step" needs every, a number of steps'),
    ({"kind": "constant", "floor": 0.1}, 'floor = 0.1: is no key of kind = "constant"'),
    ({"kind": "cosine", "length": 5, "warmup": 5}, "length = 5: .* >= 6, more than warmup"),
    ({"kind": "cosine", "length": 2.5}, "length = 2.5: must be a whole number"),
    ({"kind": "constant", "warmup": -1}, "warmup = -1: must be a whole number >= 0"),
    ({"kind": "cosine", "length": 5, "floor": 1.5}, r"floor = 1.5: must be in \[0, 1\]"),
    ({"kind": "step", "every": 0}, "every = 0: must be a whole number >= 1"),
    ({"kind": "step", "every": 2, "factor": 0.0}, r"factor = 0.0: must be in \(0, 1\]"),
]


@pytest.mark.parametrize(("table", "said"), REFUSED)
def test_nonsense_is_refused_with_what_is_allowed(table, said):
    with pytest.raises(ValueError, match=said):
        LocalSGD(schedule=table)
