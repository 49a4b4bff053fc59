"""A batch of one sample that a model cannot train on is seen before round 1, with a remedy."""

import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import fedsim
from fedsim.basics.rng import generator
from fedsim.client.batching.schedule import Schedule
from fedsim.client.procedure import Work
from fedsim.data.sets.user import DataSet
from fedsim.runs.summary import always_failed
from tests.cases.own_code import Project

CODE = """
    import numpy as np
    import torch
    from torch import nn

    from fedsim.data import DataSet

    SIZES = (30, 11, 21, 1)

    def patients(*, sizes: list[int] = SIZES):
        random = np.random.default_rng(0)
        x = random.standard_normal((sum(sizes), 5)).astype("float32")
        return DataSet(
            x, (x[:, 0] > 0).astype(int), groups=np.repeat(np.arange(len(sizes)), sizes),
            test_features=x, test_targets=(x[:, 0] > 0).astype(int),
        )

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    class Squeezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(5, 2)

        def forward(self, x):
            out = self.b(x).squeeze()
            return out if out.shape == (len(x), 2) else out.mean(1)

    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(5, 2)

        def forward(self, x):
            return self.b(x) / (1 + x.std(0).mean()) if self.training else self.b(x)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.b = nn.GRUCell(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            start = torch.zeros(10 if self.training else len(x), 4)
            return self.b(self.cell(x, start))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(5, 2)

        def forward(self, x):
            return self.b(x)
"""
TEXT = """
seed = 1
rounds = {rounds}
[task]
model = "{module}:{model}"
[data]
name = "{module}:patients"
[partition]
kind = "natural"
[participation]
kind = "full"
[strategy]
name = "fedavg"
[client]
name = "local_sgd"
batch_size = 10
[engine]
kind = "inline"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("short"), CODE, TEXT)


@pytest.mark.parametrize(
    ("model", "layer"),
    [("Net", "BatchNorm1d '1'"), ("Squeezing", "Linear 'b'"), ("Spread", "the model, which")],
)
def test_clients_layer_and_remedy_are_named(project, model, layer):
    with pytest.raises(fedsim.ScenarioError) as refused:
        project.world(model)
    message = str(refused.value)
    assert "clients 1, 2, 3 would end an epoch with a batch of one sample" in message
    assert layer in message
    assert "last_batch = 'drop' or 'merge'" in message


@pytest.mark.parametrize("last", ["drop", "merge"])
def test_with_the_key_sites_train_and_a_lone_sample_is_named(project, last):
    key = f"client.last_batch={last}"
    assert any("client 3: one sample, no training" in n for n in project.world("Net", key).notes)
    summary = project.run("Net", key, name=last)
    assert summary["final"]["clients/failed"] == 0
    assert summary["final"]["train/num_examples"] == 30 + 11 + 21
    assert summary["always_failed"] == {}


def test_a_lone_sample_is_named_whatever_the_model(project):
    notes = project.world("Plain", "client.last_batch=drop").notes
    assert any("client 3: one sample, no training" in note for note in notes)


def test_a_model_that_can_is_not_refused(project):
    assert project.run("Plain", name="plain")["final"]["train/num_examples"] == 63


def test_steps_that_never_reach_the_last_batch_are_not_refused(project):
    # site 1 has two batches of which one step takes the first; site 3 has but one
    with pytest.raises(fedsim.ScenarioError, match="client 3 would end"):
        project.world("Net", "client.local_steps=1")


def test_batches_of_one_are_refused_for_all(project):
    with pytest.raises(fedsim.ScenarioError, match=r"batch_size = 1: BatchNorm1d '1' cannot"):
        project.world("Net", "client.batch_size=1")


@pytest.mark.parametrize("last", ["keep", "drop", "merge"])
@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 20, 21, 29])
def test_batches_are_those_of_the_same_permutation(last, size):
    work = Work(10, 2, None, last)
    rows = np.arange(100, 100 + size)
    schedule = Schedule([rows], [7], work=work, seed=3, server_round=2, device="cpu")
    random = generator(3, "batches", 2, 7)
    expected = []
    for _ in range(2):
        drawn = random.permutation(rows)
        batches = [drawn[start : start + 10] for start in range(0, size, 10)]
        if last != "keep" and len(batches[-1]) < 10:
            short = batches.pop()
            if not batches:
                batches = [short] if size > 1 else []
            elif last == "merge":
                batches[-1] = np.concatenate([batches[-1], short])
        expected += batches
    assert schedule.num_steps == len(expected)
    assert schedule.num_examples.tolist() == [size if expected else 0]
    for step, batch in enumerate(expected):
        count = schedule.counts[0, step]
        assert_array_equal(schedule.indices[step, 0, :count].numpy(), batch)


@pytest.mark.parametrize("kind", ["vmap"])
def test_merged_batches_train_alike_together_and_in_turn(project, kind):
    key = ("client.last_batch=merge", "engine.executor=loop")
    expected = project.run("Plain", *key, name=f"as-{kind}")
    found = project.run("Plain", key[0], f"engine.executor={kind}", name=f"merged-{kind}")
    assert project.plan(f"merged-{kind}")["executor"] == kind
    loss = expected["final"]["train/loss"]
    np.testing.assert_allclose(found["final"]["train/loss"], loss, rtol=1e-5)


def test_who_failed_in_every_round_is_in_the_summary(tmp_path):
    path = tmp_path / "participation.jsonl"
    rounds = [
        (1, [0, 1, 2, 3], {"1": "raised", "2": "late", "3": "absent"}),
        (2, [1, 2, 3], {"1": "died", "3": "absent"}),
    ]
    records = [{"round": r, "selected": s, "failed": f} for r, s, f in rounds]
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    assert always_failed(path) == {"1": "died"}


def test_a_data_set_of_whole_batches_needs_no_key(project, monkeypatch):
    module = __import__("sys").modules[project.scenario("Net").task["model"].partition(":")[0]]
    whole = DataSet(
        np.random.default_rng(1).standard_normal((40, 5)).astype("float32"),
        np.arange(40) % 2,
        groups=np.repeat([0, 1], 20),
        test_features=np.zeros((4, 5), "float32"),
        test_targets=np.array([0, 1, 0, 1]),
    )
    monkeypatch.setattr(module, "patients", lambda: whole)
    assert project.run("Net", name="whole")["final"]["clients/failed"] == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["client.batch_size=10"], "clients 1, 2, 3 would train on a batch of 1, which"),
        (
            ["client.batch_size=10", "client.last_batch=merge"],
            "clients 1, 2 would train on a batch of 11",
        ),
    ],
)
def test_a_model_that_takes_full_batches_alone_is_refused_with_the_clients(
    project, overrides, said
):
    with pytest.raises(fedsim.ScenarioError, match=said):
        project.world("Fixed", *overrides)


def test_and_of_sizes_above_one_too(project):
    with pytest.raises(
        fedsim.ScenarioError,
        match=r"batch_size = 10: client 1 would train on a batch of 3, which GRUCell "
        r"'cell' cannot, though it can on 10",
    ):
        project.world("Fixed", "client.batch_size=10", "data.sizes=[30, 13]")


def test_where_no_batch_is_short_it_trains(project):
    run = project.run("Fixed", "client.batch_size=10", "data.sizes=[30, 20]", name="fixed")
    assert run["final"]["clients/failed"] == 0


def test_of_a_model_that_takes_any_size_nothing_is_said(project):
    run = project.run("Plain", "client.batch_size=7", name="any")
    assert run["final"]["clients/failed"] == 0
