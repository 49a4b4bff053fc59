"""Dropout in training alone, called twice, along another axis: it is the dropout of plain torch."""

import pytest

from tests.cases.own_code import Project

CODE = """
    import torch
    from torch import nn
    from torch.nn import functional

    P = 0.2

    class Net(nn.Module):
        def __init__(self, feature_shape, num_classes, *, p: float = P):
            super().__init__()
            self.a, self.b = nn.Linear(5, 16), nn.Linear(16, num_classes)
            self.wide = nn.Linear(feature_shape[0], 16)
            self.c, self.drop = nn.Linear(16, 16), nn.Dropout(p)

    class InTraining(Net):
        def forward(self, x):
            x = torch.relu(self.wide(x))
            return self.b(self.drop(x) if self.training else x)

    class Once(Net):
        def forward(self, x):
            return self.b(self.drop(torch.relu(self.wide(x))))

    class Twice(Net):
        def forward(self, x):
            x = self.drop(torch.relu(self.wide(x)))
            return self.b(self.drop(torch.relu(self.c(x))))

    class TimeFirst(Net):
        def forward(self, x):
            x = x.reshape(len(x), -1, 5).transpose(0, 1)
            return self.b(self.drop(torch.relu(self.a(x))).mean(0))

    class Folded(Net):
        def forward(self, x):
            x = torch.relu(self.a(x.reshape(-1, 5)))
            return self.b(self.drop(x).reshape(-1, 6, 16).mean(1))

    class Shared(Net):
        def __init__(self, feature_shape, num_classes, *, p: float = P):
            super().__init__(feature_shape, num_classes, p=p)
            self.again = nn.Sequential(nn.ReLU(), self.drop)

        def forward(self, x):
            return self.b(self.again(self.c(self.drop(torch.relu(self.wide(x))))))

    class Functional(Net):
        def forward(self, x):
            x = torch.relu(self.wide(x))
            return self.b(functional.dropout(x, self.drop.p, self.training))

    class Alpha(Net):
        def forward(self, x):
            return self.b(functional.alpha_dropout(self.wide(x), self.drop.p, self.training))
"""
PLAIN = ["Twice", "TimeFirst", "Folded", "Shared", "Functional", "Alpha"]
SEEDED = ["InTraining", "Once"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("dropout"), CODE)


@pytest.mark.parametrize(
    "model",
    ["Twice", "TimeFirst", *SEEDED]
    + [pytest.param(name, marks=pytest.mark.slow) for name in PLAIN[2:]],
)
def test_it_drops_some_and_not_all(project, model):
    # a mask that drops everything, or nothing, gives the bits of p = 1 or of p = 0
    found = {
        p: project.run(model, f"task.p={p}", rounds=1, name=f"{model}-{p}")["params_sha256"]
        for p in (0.0, 0.2, 0.999999)
    }
    assert len(set(found.values())) == 3
    again = project.run(model, "task.p=0.2", rounds=1, name=f"{model}-again")
    assert again["params_sha256"] == found[0.2]


@pytest.mark.parametrize("model", PLAIN)
def test_what_cannot_be_drawn_before_a_pass_is_drawn_in_it(project, model):
    plan = project.world(model).plan
    assert plan.executor == "loop"
    assert "'drop' is" in plan.reason or "torch's generator" in plan.reason


@pytest.mark.parametrize("model", SEEDED)
def test_a_layer_along_the_batch_trains_together(project, model):
    assert project.world(model).plan.executor == "vmap"


def test_a_layer_in_training_alone_learns_what_one_in_both_modes_learns(project):
    # `self.training` does not decide what the mask is, so both train alike
    first = project.run("InTraining", name="in-training")
    second = project.run("Once", name="once")
    assert first["params_sha256"] == second["params_sha256"]


def test_asked_to_train_together_what_cannot_is_refused_with_the_layer(project):
    with pytest.raises(Exception, match=r"executor = 'vmap'.*'drop' is used"):
        project.world("Twice", "engine.executor=vmap")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("model", ["InTraining", "Twice"])
def test_they_learn_on_one_and_two_workers(project, model):
    runs = [
        project.run(
            model, "engine.kind=ray", f"engine.workers={n}", rounds=20, name=f"{model}-ray{n}"
        )
        for n in (1, 2)
    ]
    assert runs[0]["params_sha256"] == runs[1]["params_sha256"]
    assert runs[0]["final"]["test/accuracy"] >= 0.95
