"""What a model keeps beside its tensors: put back for every client, or read back into a buffer."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_breast_cancer

import fedsim
from tests.cases.own_code import Project

CODE = """
    import collections
    import functools

    import torch
    from torch import nn

    from clients.local_sgd import LocalSGD

    CALLS = 0
    SEEN = []

    class Net(nn.Module):
        def __init__(self, feature_shape, num_classes):
            super().__init__()
            self.a, self.b = nn.Linear(feature_shape[0], 8), nn.Linear(8, num_classes)

        def factor(self, x):
            return 1.0

        def forward(self, x):
            if self.training:
                self.count(x)
            return self.b(torch.relu(self.a(x))) * self.factor(x)

    class Attribute(Net):
        steps = 0

        def count(self, x):
            self.steps += 1

        def factor(self, x):
            return 0.2 + 0.1 * self.steps

    class Listed(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.history = collections.deque([0.0], maxlen=3)

        def count(self, x):
            self.history.append(float(x.abs().max()))

        def factor(self, x):
            return 1 + sum(self.history)

    class OfTheClass(Net):
        steps = [0]

        def count(self, x):
            type(self).steps[0] += 1

        def factor(self, x):
            return 0.2 + 0.1 * self.steps[0]

    class OfTheModule(Net):
        def count(self, x):
            global CALLS
            CALLS += 1
            SEEN.append(CALLS)

        def factor(self, x):
            return 0.2 + 0.1 * len(SEEN)

    class Unsaved(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def count(self, x):
            self.seen += 1

        def factor(self, x):
            return 0.2 + 0.1 * self.seen

    class Tensor(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.seen = torch.zeros(())

        def count(self, x):
            self.seen.add_(1)

        def factor(self, x):
            return 0.2 + 0.1 * self.seen

    class Counter:
        __slots__ = ("steps",)

        def __init__(self):
            self.steps = 0

    class Slotted(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.mine = Counter()

        def count(self, x):
            self.mine.steps += 1

        def factor(self, x):
            return 1 + 0.1 * self.mine.steps

    class ByDefault(Net):
        def count(self, x, memory=[0]):
            memory[0] += 1

        def factor(self, x):
            return 1 + 0.1 * self.count.__func__.__defaults__[0][0]

    def warming():
        warming.steps += 1
        return 1 + 0.1 * warming.steps

    warming.steps = 0

    class OfAFunction(Net):
        def count(self, x):
            pass

        def factor(self, x):
            return warming()

    class Iterating(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.factors = iter([1 + 0.1 * n for n in range(1000)])

        def count(self, x):
            pass

        def factor(self, x):
            return next(self.factors)

    class Hooked(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            steps = 0

            def warmed(module, inputs, outputs):
                nonlocal steps
                steps += module.training
                return outputs * (1 + 0.1 * steps)

            self.register_forward_hook(warmed)

        def count(self, x):
            pass

        def factor(self, x):
            return 1.0

    class OfALayer(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.inner = nn.Sequential(nn.Identity(), nn.LeakyReLU(0.1))

        def count(self, x):
            self.inner[1].negative_slope += 0.05

        def factor(self, x):
            return 1 + self.inner(-torch.ones(()))

    class OfItsDropout(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.dropout = nn.Dropout(0.01)

        def count(self, x):
            self.dropout.p += 0.02

        def factor(self, x):
            return self.dropout(torch.ones(len(x), 1))

    class OfItsNorm(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.norm = nn.BatchNorm1d(1)

        def count(self, x):
            self.norm.momentum *= 0.9

        def factor(self, x):
            return 1 + 0.1 * self.norm(x[:, :1])

    class NewInALayer(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.inner = nn.Identity()

        def count(self, x):
            self.inner.seen = [*getattr(self.inner, "seen", []), 1]

        def factor(self, x):
            return 1 + 0.1 * len(getattr(self.inner, "seen", []))

    class Toggling(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.inner = nn.Softmax(dim=1)

        def count(self, x):
            self.inner.dim = 1 - self.inner.dim

        def factor(self, x):
            return self.inner(x)[:, :1]

    @functools.lru_cache
    def box():
        return [0]

    class Cached(Net):
        def count(self, x):
            box()[0] += 1

        def factor(self, x):
            return 1 + 0.1 * box()[0]

    @functools.lru_cache
    def table(size):
        return torch.arange(size) / size

    class CachedTable(Net):
        def count(self, x):
            pass

        def factor(self, x):
            return 1 + table(8).sum()

    class Teacher(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.teacher = nn.Linear(feature_shape[0], 8).requires_grad_(False)

        def count(self, x):
            with torch.no_grad():
                for mine, theirs in zip(self.teacher.parameters(), self.a.parameters()):
                    self.move(mine, theirs)

        def move(self, mine, theirs):
            mine.mul_(0.9).add_(theirs, alpha=0.1)

        def factor(self, x):
            return 1 + (self.a(x) - self.teacher(x)).abs().mean()

    class TeacherByData(Teacher):
        def move(self, mine, theirs):
            mine.data = 0.9 * mine.data + 0.1 * theirs.data

    class TeacherStands(Teacher):
        def count(self, x):
            pass

    class Still(Net):
        def count(self, x):
            pass

    class Moving(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.register_buffer("scale", torch.ones(()))

        def count(self, x):
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().max()

        def factor(self, x):
            return 1 / self.scale

    class Growing(Moving):
        def count(self, x):
            self.scale = torch.cat([self.scale.reshape(-1), x[0, :1]])

    class Remembering(LocalSGD):
        steps = 0

        def step(self, carry, batch, gradient, *, server_round):
            self.steps += 1
            batch = batch._replace(features=batch.features * (1 + 0.1 * self.steps))
            return super().step(carry, batch, gradient, server_round=server_round)
"""
MOVING = {
    "Attribute": "'steps' of Attribute",
    "Listed": "'history' of Listed",
    "OfTheClass": "'steps' of the class OfTheClass",
    "OfTheModule": "the variable 'CALLS' of",
    "Unsaved": "the unsaved buffer 'seen' of Unsaved",
    "Tensor": "'seen' of Tensor",
    "Slotted": "'mine' of Slotted",
    "ByDefault": "a default argument of ByDefault.count",
    "OfAFunction": "'steps' of the function warming",
    "Iterating": "'factors' of Iterating",
    "OfALayer": "'negative_slope' of LeakyReLU 'inner.1'",
    "OfItsDropout": "'p' of Dropout 'dropout'",
    "OfItsNorm": "'momentum' of BatchNorm1d 'norm'",
    "NewInALayer": "'seen' of Identity 'inner'",
    "Hooked": "'steps' around Hooked.__init__.<locals>.warmed",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("state"), CODE)


@pytest.mark.parametrize(("model", "named"), MOVING.items())
def test_a_client_does_not_go_on_where_another_stopped(project, model, named):
    world = project.world(model)
    assert world.plan.executor == "loop"
    assert any(named in note and "as it was made" in note for note in world.notes)
    chunks = [
        project.run(model, f"engine.chunk_size={size}", rounds=2, name=f"{model}-{size}")
        for size in (2, 6)
    ]
    assert chunks[0]["params_sha256"] == chunks[1]["params_sha256"]
    # what is counted counts: else all would be put back by being nothing
    assert (
        chunks[0]["params_sha256"]
        != project.run("Still", rounds=2, name=f"beside-{model}")["params_sha256"]
    )


def test_an_evaluation_begins_with_the_model_as_built(project):
    first = project.run("Attribute", rounds=2, name="evaluated")
    once = project.run("Attribute", "evaluation.every=2", rounds=2, name="less")
    assert first["params_sha256"] == once["params_sha256"]
    assert first["final"]["test/loss"] == once["final"]["test/loss"]


def test_what_does_not_move_costs_no_executor(project):
    world = project.world("Still")
    assert world.plan.executor == "vmap"
    assert not any("as it was made" in note for note in world.notes)


def test_a_buffer_that_is_assigned_anew_is_sent_back(project):
    whole = ("partition.clients=1", "client.batch_size=1000")
    project.run("Moving", *whole, rounds=1, name="moving")
    found = load_file(project.folder / "moving" / "params.safetensors")["scale"]
    world = project.world("Moving", *whole)
    rows = world.data.clients([0])
    largest = np.abs(np.asarray(rows.features)[rows.rows[0]]).max()
    assert largest > 2  # standardised
    assert len(rows.rows[0]) > 0.7 * len(load_breast_cancer().target)
    np.testing.assert_allclose(found, 0.9 + 0.1 * largest, rtol=1e-6)


def test_a_buffer_that_changes_its_shape_is_refused_before_round_1(project):
    with pytest.raises(fedsim.ScenarioError, match=r"buffer 'scale' is torch\.float32"):
        project.world("Growing")


def test_a_procedure_that_counts_is_put_back_too(project):
    mine = (f"client.name={project.module}:Remembering", "engine.executor=auto")
    world = project.world("Still", *mine)
    assert any("'steps' of Remembering" in note for note in world.notes)
    chunks = [
        project.run("Still", *mine, f"engine.chunk_size={n}", rounds=2, name=f"procedure-{n}")
        for n in (2, 6)
    ]
    assert chunks[0]["params_sha256"] == chunks[1]["params_sha256"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_hundred_rounds_on_one_and_two_workers(project):
    runs = [
        project.run("Attribute", "engine.kind=ray", f"engine.workers={n}", rounds=100, name=f"w{n}")
        for n in (1, 2)
    ]
    assert runs[0]["params_sha256"] == runs[1]["params_sha256"]


def test_a_layer_that_is_as_it_was_after_two_steps_is_put_back_all_the_same(project):
    found = {
        project.run("Toggling", f"engine.chunk_size={n}", name=f"toggling-{n}")["params_sha256"]
        for n in (2, 4, 6)
    }
    assert len(found) == 1


def test_an_lru_cache_that_keeps_state_is_named_and_one_that_keeps_results_is_no_matter(project):
    with pytest.raises(fedsim.ScenarioError, match=rf"lru_cache of {project.module}.box holds: ke"):
        project.world("Cached")
    assert project.world("CachedTable").plan.executor == "vmap"


@pytest.mark.parametrize("model", ["Teacher", "TeacherByData"])
def test_a_frozen_parameter_that_the_model_moves_itself_is_refused_by_name(project, model):
    said = r"changes its parameter 'teacher.(weight|bias)' in a pass.*make it a buffer"
    with pytest.raises(fedsim.ScenarioError, match=said):
        project.world(model)


def test_one_that_stands_is_no_matter(project):
    assert project.run("TeacherStands", rounds=1, name="stands")["rounds"] == 1
