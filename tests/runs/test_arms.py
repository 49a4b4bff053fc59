"""Reference arms: plain training on pooled data, and every client alone."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from fedsim.basics.errors import ScenarioError
from fedsim.client.batching.schedule import Schedule
from fedsim.runs import start as run
from fedsim.runs.arms import arm_of, samples_seen
from fedsim.runs.client_side import task_of
from fedsim.runs.world import build
from fedsim.scenario.load import load
from fedsim.scenario.scenario import Scenario

CLIENTS = 8


def scenario(**tables):
    document = {
        "rounds": 3,
        "seed": 5,
        "data": {"name": "digits"},
        "partition": {
            "kind": "dirichlet", "alpha": 0.3, "min_size": 10, "clients": CLIENTS,
            "test_fraction": 0.2,
        },
        "participation": {"kind": "uniform", "cohort_size": 3},
        "task": {"model": "mlp", "hidden": [9], "dtype": "float64"},
        "client": {"local_lr": 0.1, "batch_size": 16},
        "engine": {"kind": "inline"},
        "evaluation": {"clients": CLIENTS},
        **tables,
    }  # fmt: skip
    return Scenario.from_resolved(document, "tests/arms.toml")


OPTIMISERS = {
    "sgd": ({}, lambda p, lr: torch.optim.SGD(p, lr)),
    "momentum and decay": (
        {"momentum": 0.9, "weight_decay": 0.01},
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.01),
    ),
    "adam": (
        {"optimizer": "adam", "local_lr": 0.01, "betas": [0.8, 0.9], "epsilon": 1e-6},
        lambda p, lr: torch.optim.Adam(p, lr, betas=(0.8, 0.9), eps=1e-6),
    ),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_centralised_is_plain_torch_on_the_pooled_data(tmp_path, optimiser):
    """One torch optimiser over all rounds; the order of samples alone is fedsim's."""
    keys, make = OPTIMISERS[optimiser]
    of = scenario(client={"local_lr": 0.1, "batch_size": 16, "local_epochs": 2, **keys})
    arm = arm_of(of, "centralised")
    result = run.start(arm, out=tmp_path / "run")
    found = load_file(result.folder / "params.safetensors")

    data = build(of).data
    every = data.clients(range(CLIENTS))
    rows = np.sort(np.concatenate(every.rows))
    work = arm.choices["client"].make().work
    model = trained(of, every, rows, 0, work, lambda p: make(p, keys.get("local_lr", 0.1)))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)


def trained(of, every, rows, client, work, make):
    """Train in plain torch on some rows of a pool, in the order that fedsim draws for a client."""
    model = task_of(of.task, build(of).data).build_model(of.seed)
    optimizer = make(model.parameters())
    for server_round in range(1, of.rounds + 1):
        order = Schedule(
            [rows], [client], work=work, seed=of.seed, server_round=server_round,
            device=torch.device("cpu"),
        )  # fmt: skip
        for step in range(int(order.steps[0])):
            chosen = order.indices[step, 0][: int(order.counts[0, step])].numpy()
            features = torch.from_numpy(np.asarray(every.features)[chosen]).double()
            targets = torch.from_numpy(np.asarray(every.targets)[chosen])
            optimizer.zero_grad()
            functional.cross_entropy(model(features), targets).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize(
    "client",
    [
        {"batch_size": 16, "local_epochs": 3},
        {"batch_size": 7, "local_steps": 5},
        {"batch_size": 16, "last_batch": "drop"},
    ],
)
def test_it_sees_as_many_samples_as_the_expected_cohort(client):
    of = scenario(client={"local_lr": 0.1, **client})
    arm = arm_of(of, "centralised")
    world = build(of)
    work = of.choices["client"].make().work
    sizes = world.data.sizes(range(CLIENTS)).tolist()
    seen = []
    for n in sizes:
        drawn = Schedule(
            [np.arange(n)], [0], work=work, seed=0, server_round=1, device=torch.device("cpu")
        )
        assert samples_seen(work, n) == int(drawn.seen[0])
        seen.append(int(drawn.seen[0]))
    expected = 3 / CLIENTS * sum(seen)
    central = arm.choices["client"].make().work
    assert central.batch_size == work.batch_size
    total = build(arm).data.sizes([0]).tolist()
    assert total == [sum(sizes)]
    assert abs(samples_seen(central, total[0]) - expected) <= work.batch_size


def test_an_arm_has_nothing_of_the_federation(tmp_path):
    of = scenario(
        strategy={"name": "scaffold"},
        attack={"kind": "sign_flip", "num_byzantine": 1},
        devices={"drop_out": 0.2},
        expect={"test/accuracy": {"min": 2.0}},
        evaluation={"clients": CLIENTS, "stop": {"metric": "test/accuracy", "target": 2.0}},
    )
    for arm in ("centralised", "local"):
        derived = arm_of(of, arm)
        assert derived.attack == {}
        assert derived.devices is None
        assert derived.expect == {}
        assert derived.strategy["name"] == "fedavg"
        assert derived.client["parts"] == []
        assert (derived.seed, derived.rounds) == (of.seed, of.rounds)
        assert derived.data == of.data
        final = run.start(derived, out=tmp_path / arm).summary["final"]
        assert "local/accuracy_mean" in final
    assert arm_of(of, "local").evaluation.stop is None
    assert arm_of(of, "centralised").evaluation.stop is not None


def test_locally_every_client_trains_in_plain_torch_on_its_own_samples(tmp_path):
    of = scenario(participation={"kind": "full"})
    final = run.start(arm_of(of, "local"), out=tmp_path / "run").summary["final"]
    data = build(of).data
    every, tests = (data.clients(range(CLIENTS), split=split) for split in ("train", "test"))
    work = of.choices["client"].make().work
    losses = []
    for client, rows in enumerate(every.rows):
        model = trained(of, every, rows, client, work, lambda p: torch.optim.SGD(p, 0.1))
        chosen = tests.rows[client]
        features = torch.from_numpy(np.asarray(tests.features)[chosen]).double()
        targets = torch.from_numpy(np.asarray(tests.targets)[chosen])
        losses.append(functional.cross_entropy(model(features), targets).item())
    assert final["local/loss_mean"] == pytest.approx(np.mean(losses), rel=1e-9)


def test_gossip_and_generated_data_have_arms(tmp_path):
    graph = scenario(strategy={"name": "gossip"}, participation={"kind": "full"})
    made = scenario(
        data={"name": "synthetic", "dimension": 4, "max_samples": 30, "test_clients": 3},
        partition={"kind": "natural", "clients": CLIENTS, "test_fraction": 0.2},
    )
    for number, of in enumerate((graph, made)):
        for arm in ("centralised", "local"):
            summary = run.start(arm_of(of, arm), out=tmp_path / f"{arm}{number}").summary
            assert summary["rounds"] == 3
            assert "local/loss_mean" in summary["final"]


def test_a_procedure_of_the_users_own_has_the_arms_that_it_can_have(tmp_path):
    of = scenario(client={"name": "tests.runs.procedures:OneStep", "size": 0.2})
    assert run.start(arm_of(of, "local"), out=tmp_path / "run").summary["rounds"] == 3
    with pytest.raises(ScenarioError, match="has no key local_steps, which says how much"):
        arm_of(of, "centralised")


def test_what_has_no_arm_is_refused(tmp_path):
    with pytest.raises(ScenarioError, match=r"--arm 'centralized' .*did you mean 'centralised'"):
        arm_of(scenario(), "centralized")
    with pytest.raises(ScenarioError, match=r"--arm local: only clients can measure"):
        arm_of(scenario(evaluation={}), "local")


def test_the_key_changes_no_hash_and_no_division_of_scenarios_without_it():
    plain = load("quickstart")
    assert load("quickstart", ["partition.centralised=false"]).sha256 == plain.sha256
    assert load("quickstart", ["partition.centralised=true"]).sha256 != plain.sha256
