"""Dropout in training alone, called twice, along another axis: it is the dropout of plain torch."""

import pytest

from tests.cases.own_code import Project

CODE = """
    import random

    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

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

    class Chosen(Net):
        def kind(self, m):
            return isinstance(m, nn.Dropout)

        def train(self, mode=True):
            super().train(mode)
            for m in filter(self.kind, self.modules()):
                self.choose(m)
            return self

        def choose(self, m):
            m.eval()

        def forward(self, x):
            return self.b(self.drop(torch.relu(self.wide(x))))

    class Frozen(Chosen):
        pass

    class FrozenExactly(Chosen):
        def kind(self, m):
            return type(m) is nn.Dropout

    class FrozenChannels(Chosen):
        def __init__(self, feature_shape, num_classes, *, p: float = P):
            super().__init__(feature_shape, num_classes, p=p)
            self.drop = nn.Dropout1d(p)

        def kind(self, m):
            return isinstance(m, nn.Dropout1d)

        def forward(self, x):
            x = self.drop(torch.relu(self.a(x.reshape(len(x), -1, 5))))
            return self.b(x.mean(1))

    class SetToNothing(Once):
        def forward(self, x):
            for m in self.modules():
                if isinstance(m, nn.Dropout):
                    m.p = 0.0
            return super().forward(x)

    class Hooked(Once):
        def __init__(self, feature_shape, num_classes, *, p: float = P):
            super().__init__(feature_shape, num_classes, p=p)
            self.drop.register_forward_hook(lambda layer, given, dropped: given[0])

    class MonteCarlo(Chosen):
        def choose(self, m):
            m.train()

    class InPlace(Net):
        def __init__(self, feature_shape, num_classes, *, p: float = P):
            super().__init__(feature_shape, num_classes, p=p)
            self.drop = nn.Dropout(p, inplace=True)

        def forward(self, x):
            x = self.wide(x)
            self.drop(x)
            return self.b(torch.relu(x))

    class OutOfPlace(Net):
        def forward(self, x):
            return self.b(torch.relu(self.drop(self.wide(x))))

    class Kept(Once):
        def __init__(self, feature_shape, num_classes, *, p: float = P):
            super().__init__(feature_shape, num_classes, p=p)
            self.held = [self.drop]

        def forward(self, x):
            return self.b(self.held[0](torch.relu(self.wide(x))))

    class Chunked(Net):
        def forward(self, x):
            return torch.cat([self.b(self.drop(torch.relu(self.wide(c)))) for c in x.split(8)])

    class Rows(Net):
        def forward(self, x):
            x = torch.relu(self.wide(x))
            chosen = x[:, 0] > x[:, 1]
            kept = x.clone()
            kept[chosen] = self.drop(x[chosen])
            return self.b(kept)

    class InLarge(Net):
        def forward(self, x):
            x = self.drop(torch.relu(self.wide(x)))
            return self.b(self.drop(torch.relu(self.c(x))) if len(x) > 8 else x)

    class InFunction(Net):
        def forward(self, x):
            x = torch.relu(self.wide(x))
            drop = self.drop
            return self.b(functional.dropout(x, drop.p, self.training, drop.inplace))

    class OneSample(nn.Module):  # so torch's Dropout1d takes values of two axes
        def __init__(self, feature_shape, num_classes, *, p: float = P):
            super().__init__()
            self.wide, self.b = nn.Linear(feature_shape[0], 16), nn.Linear(16, num_classes)
            self.drop = nn.Dropout1d(p)

        def forward(self, x):
            return self.b(self.drop(torch.relu(self.wide(x))))

    class Stretch(Net):
        def stretch(self, x):
            return torch.tanh(self.drop(torch.relu(self.wide(x))))

        def forward(self, x):
            return self.b(self.stretch(x))

    class Checkpointed(Stretch):
        def forward(self, x):
            return self.b(checkpoint(self.stretch, x, use_reentrant=False))

    class StretchTwice(Stretch):
        def stretch(self, x):
            return self.drop(super().stretch(x))

    class CheckpointedTwice(StretchTwice):
        def forward(self, x):
            return self.b(checkpoint(self.stretch, x, use_reentrant=False))

    class NowAndThen(Net):
        ODDS = 0.3

        def forward(self, x):
            first = self.drop(torch.ones(len(x), 16))
            x = torch.relu(self.wide(x)) * first
            if self.training and random.random() < self.ODDS:
                second = self.drop(torch.ones(len(x), 16))
                if len(x) > 16 and torch.equal(first, second):
                    raise ValueError("one mask, used twice")
                x = torch.relu(self.c(x)) * second
            return self.b(x)

    class Rarely(NowAndThen):
        ODDS = 0.04
"""
PLAIN = ["Twice", "TimeFirst", "Folded", "Shared", "Functional", "Alpha"]
PLAIN += ["Chunked", "Rows", "InLarge", "InFunction", "OneSample"]
SEEDED = ["InTraining", "Once", "InPlace"]
QUICK = ["Twice", "TimeFirst", "Chunked", "Rows"]
NOTHING = ["Frozen", "FrozenExactly", "FrozenChannels", "SetToNothing", "Hooked"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("dropout"), CODE)


@pytest.mark.parametrize(
    "model",
    [*QUICK, *SEEDED]
    + [pytest.param(name, marks=pytest.mark.slow) for name in PLAIN if name not in QUICK],
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


@pytest.mark.parametrize("model", NOTHING)
def test_a_layer_that_the_model_switches_off_drops_nothing(project, model):
    # it is found by its type, and its hooks are its own
    found = [
        project.run(model, f"task.p={p}", rounds=1, name=f"{model}-{p}")["params_sha256"]
        for p in (0.0, 0.9)
    ]
    assert found[0] == found[1]


def test_a_layer_that_is_kept_on_drops_in_evaluation_too(project):
    assert project.world("MonteCarlo").plan.executor == "loop"
    summaries = [
        project.run(model, "task.p=0.9", "engine.executor=loop", rounds=1, name=f"kept-{model}")
        for model in ("MonteCarlo", "Once")
    ]
    kept, once = summaries
    assert kept["params_sha256"] == once["params_sha256"]
    assert kept["final"]["test/loss"] != once["final"]["test/loss"]


@pytest.mark.parametrize(("model", "like"), [("InPlace", "OutOfPlace"), ("Kept", "Once")])
def test_a_layer_in_place_or_held_elsewhere_is_the_same_layer(project, model, like):
    found = [
        project.run(name, rounds=1, name=f"{model}-{name}")["params_sha256"]
        for name in (model, like)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("model", "like"), [("Checkpointed", "Stretch"), ("CheckpointedTwice", "StretchTwice")]
)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_activations_that_are_computed_again_have_the_same_masks(project, model, like, p):
    loop = (f"task.p={p}", "engine.executor=loop")
    found = [
        project.run(name, *loop, rounds=2, name=f"{model}-{name}-{p}")["params_sha256"]
        for name in (model, like)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("model", ["NowAndThen", "Rarely"])
def test_a_further_use_now_and_then_has_a_mask_of_its_own(project, model):
    # the model itself refuses one mask for both
    found = [
        project.run(model, f"engine.chunk_size={size}", rounds=4, name=f"{model}-{size}")
        for size in (2, 4)
    ]
    assert found[0]["params_sha256"] == found[1]["params_sha256"]


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
