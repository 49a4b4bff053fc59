"""Whatever generator a model draws from is a function of seed, round and client."""

import json
import random
import time

import numpy as np
import pytest
import torch

import fedsim
from tests.cases.own_code import Project
from tests.laws.federations import job

CODE_WITHOUT_CHANCE = """
    from torch import nn

    class Net(nn.Linear):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape[0], num_classes)
"""
CODE = """
    import os
    import random
    import time

    import numpy as np
    import torch
    from torch import nn

    from clients.local_sgd import LocalSGD

    OF_THE_MODULE = np.random.default_rng(0)

    class Net(nn.Module):
        def __init__(self, feature_shape, num_classes):
            super().__init__()
            self.a, self.b = nn.Linear(feature_shape[0], 8), nn.Linear(8, num_classes)

        def number(self):
            return 0.5

        def forward(self, x):
            number = self.number() if self.training else 0.5
            return self.b(torch.relu(self.a(x))) * number

    class Python(Net):
        def number(self):
            return random.random()

    class NumPy(Net):
        def number(self):
            return np.random.normal()

    class Torch(Net):
        def number(self):
            return torch.rand(())

    class Own(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.mine = [random.Random(1), np.random.RandomState(2)]
            self.torchs = torch.Generator()

        def number(self):
            drawn = torch.rand((), generator=self.torchs)
            return self.mine[0].random() + self.mine[1].rand() + drawn

    class Module(Net):
        def number(self):
            return OF_THE_MODULE.random()

    class Always(Net):
        def forward(self, x):
            return self.b(torch.relu(self.a(x))) * (0.5 + random.random())

    class System(Net):
        def number(self):
            return int.from_bytes(os.urandom(2), "big") / 2**16

    class Clock(Net):
        def number(self):
            return time.perf_counter_ns() % 1000 / 1000

    class BornOfPython(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.scale = 0.5 + random.random()

        def number(self):
            return self.scale

    class BornOfNumPy(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            drawn = np.random.normal(scale=0.1, size=(8, feature_shape[0]))
            self.a.weight = nn.Parameter(torch.from_numpy(drawn).float())

    class BornUnseeded(BornOfNumPy):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            drawn = np.random.default_rng().normal(scale=0.1, size=8)
            self.a.bias = nn.Parameter(torch.from_numpy(drawn).float())

    class Permuting(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            order = np.random.default_rng().permutation(1000)
            self.register_buffer("order", torch.from_numpy(order), persistent=False)

    class Projecting(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.directions = np.random.default_rng().normal(size=feature_shape[0])

    def drawn(*, seed: int = -1):
        from fedsim.data import DataSet
        draw = np.random if seed < 0 else np.random.default_rng(seed)
        targets = [random.randrange(3) for _ in range(60)]
        return DataSet(draw.normal(size=(60, 4)) + torch.rand(60, 1).numpy(), targets)

    class Noisy(LocalSGD):
        def step(self, carry, batch, gradient, *, server_round):
            noise = np.random.normal(size=tuple(batch.features.shape))
            features = batch.features + torch.from_numpy(noise).to(batch.features.dtype)
            batch = batch._replace(features=features)
            return super().step(carry, batch, gradient, server_round=server_round)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("generators"), CODE)


@pytest.mark.parametrize("model", ["Python", "NumPy", "Torch", "Own", "Module", "Always"])
def test_the_same_scenario_twice_has_the_same_bits(project, model):
    runs = [
        project.run(model, f"engine.chunk_size={size}", rounds=2, name=f"{model}-{size}")
        for size in (2, 3, 6)
    ]
    assert len({run["params_sha256"] for run in runs}) == 1
    assert len({run["final"]["test/loss"] for run in runs}) == 1
    assert project.plan(f"{model}-2")["executor"] == "loop"


@pytest.mark.parametrize(
    ("model", "named"),
    [("Python", "random"), ("NumPy", "numpy.random"), ("Own", "a generator of its own")],
)
def test_the_generator_is_named(project, model, named):
    assert any(f"draws from {named}" in note for note in project.world(model).notes)


def test_each_round_and_client_has_another_draw(project):
    # nothing is trained: only what is drawn can tell one loss from another
    still = ("client.local_lr=0.0", "client.batch_size=1000", "partition.clients=2")
    project.run("Python", *still, rounds=4, name="draws")
    lines = (project.folder / "draws" / "metrics.jsonl").read_text().splitlines()
    assert len({json.loads(line)["train/loss"] for line in lines[1:]}) == 4
    world = project.world("Python", *still)
    executor = world.app.executor
    both = executor.train(job(executor, (0, 1)))
    alone = [executor.train(job(executor, (client,))).metrics["loss"] for client in (0, 1)]
    assert torch.equal(both.metrics["loss"], torch.cat(alone))
    assert abs(alone[0] - alone[1]) > 1e-3  # of samples that are alike


@pytest.mark.parametrize("model", ["System", "Clock"])
def test_what_cannot_be_seeded_is_refused_before_round_1(project, model):
    with pytest.raises(fedsim.ScenarioError, match=r"trained twice from one start.* differs in"):
        project.world(model)


def stir():
    """Whatever was drawn before makes no difference, and what is drawn afterwards is as it was."""
    random.seed(time.time_ns())
    np.random.seed(time.time_ns() % 2**32)  # noqa: NPY002  # the process's own, which users draw from
    torch.manual_seed(time.time_ns())
    return states()


def states():
    """Where the process's generators stand."""
    of_numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate()[1][:9], of_numpy[1][:9].tolist(), torch.get_rng_state()[:99].tolist()


@pytest.mark.parametrize("model", ["BornOfPython", "BornOfNumPy"])
def test_a_model_that_draws_when_it_is_made_begins_as_the_seed_says(project, model):
    found = []
    for size in (2, 6):
        before = stir()
        built = project.world(model, f"engine.chunk_size={size}").app.executor.task
        model_of_seed = built.build_model(5)
        assert states() == before
        found.append((model_of_seed.a.weight.detach(), getattr(model_of_seed, "scale", None)))
        run = project.run(model, f"engine.chunk_size={size}", rounds=2, name=f"{model}-{size}")
        found[-1] += (run["params_sha256"],)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize(
    ("model", "named"),
    [("BornUnseeded", "a.bias"), ("Permuting", "order"), ("Projecting", "directions")],
)
def test_a_model_that_begins_otherwise_each_time_is_refused_by_name(project, model, named):
    with pytest.raises(fedsim.ScenarioError, match=rf"built twice from one seed, '{named}'"):
        project.world(model)


@pytest.mark.parametrize("seed", [-1, 3])
def test_a_loader_that_draws_gives_the_same_data_each_time(project, seed):
    data = f"data={{name='{project.module}:drawn',seed={seed}}}"
    found = []
    for _ in range(2):
        before = stir()
        found.append(project.world("Net", data.replace("'", '"')).data.manifest_sha256)
        assert states() == before
    assert found[0] == found[1]


def test_what_no_seed_reaches_is_said_with_its_line(tmp_path):
    code = """
        import numpy as np
        from fedsim.data import DataSet
        from strategies.fedavg import FedAvg
        from torch import nn

        class Net(nn.Linear):
            def __init__(self, feature_shape, num_classes):
                super().__init__(feature_shape[0], num_classes)

        def load():
            rng = np.random.default_rng()
            return DataSet(rng.normal(size=(60, 3)), [hash(f"a{i}") % 2 for i in range(60)])

        class Mine(FedAvg):
            def __init__(self, **settings):
                super().__init__(**settings)
                self.rng = np.random.default_rng()
    """
    project = Project(tmp_path, code)
    sets = [f'data={{name="{project.module}:load"}}', f'strategy={{name="{project.module}:Mine"}}']
    file = f"{project.module}.py"
    (said,) = [note for note in project.world("Net", *sets).notes if "whatever the seed" in note]
    lines = [f"{file}, line {line}: " for line in (12, 13, 18)]
    assert [line in said for line in lines] == [True, True, True], said
    assert not [note for note in Project(tmp_path, CODE_WITHOUT_CHANCE).world().notes
                if "whatever the seed" in note]  # fmt: skip


def test_a_procedure_that_draws_is_seeded_too(project):
    mine = (f"client.name={project.module}:Noisy",)
    runs = [
        project.run("Net", *mine, f"engine.chunk_size={size}", rounds=2, name=f"noisy-{size}")
        for size in (2, 6)
    ]
    assert runs[0]["params_sha256"] == runs[1]["params_sha256"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("model", ["Python", "Own"])
def test_one_and_two_workers(project, model):
    runs = [
        project.run(
            model, "engine.kind=ray", f"engine.workers={n}", rounds=4, name=f"{model}-ray{n}"
        )
        for n in (1, 2)
    ]
    assert runs[0]["params_sha256"] == runs[1]["params_sha256"]
