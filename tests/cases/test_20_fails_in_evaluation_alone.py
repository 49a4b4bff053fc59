"""A model that trains and cannot be evaluated: a run says where, on what, and the cause."""

import pytest

import fedsim
from tests.cases.own_code import Project

CODE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, feature_shape, num_classes):
            super().__init__()
            self.b = nn.Linear(feature_shape[0], num_classes)

        def check(self, x):
            pass

        def forward(self, x):
            if not self.training:
                self.check(x)
            return self.b(x)

    class Large(Net):
        def check(self, x):
            if len(x) > 64:
                raise ValueError("too many")

    class Silent(Net):
        def check(self, x):
            assert len(x) <= 64

    class Keyed(Net):
        def check(self, x):
            if len(x) > 64:
                {}["x"]

    class Shorter(Net):
        def forward(self, x):
            return super().forward(x)[: len(x) if self.training else 64]

    class Last(Net):
        def check(self, x):
            x.view(-1, 2, x.shape[1]) if len(x) > 2 else x

    class Never(Net):
        def check(self, x):
            {}["x"]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("evaluation"), CODE)


@pytest.mark.parametrize(
    ("model", "cause", "kind"),
    [
        ("Large", "ValueError: too many (in check, line ", ValueError),
        ("Silent", "AssertionError: ", AssertionError),
        ("Keyed", "KeyError: 'x' (in check, line ", KeyError),
        ("Shorter", "RuntimeError: ", RuntimeError),
    ],
)
def test_an_evaluation_that_fails_is_called_that(project, model, cause, kind):
    with pytest.raises(fedsim.RunError) as failed:
        project.run(model, name=model)
    said = str(failed.value)
    begin = f'[task] model = "{project.module}:{model}": evaluation fails on the server\'s test '
    assert said.startswith(f"{begin}samples (114 at once): {cause}")
    assert said.endswith("it must take any number of them")
    assert isinstance(failed.value.__cause__, kind)


def test_the_last_batch_of_an_evaluation_is_told(project):
    keys = ("evaluation.batch_size=99", "data.test_fraction=0.2")
    said = r"test samples \(114, 99 at once, the last 15\): RuntimeError: .*\(in check, line "
    with pytest.raises(fedsim.RunError, match=said):
        project.run("Last", *keys, name="last")


def test_an_evaluation_of_all_clients_samples_is_named_too(project):
    keys = ("partition.test_fraction=0.5", "evaluation.pooled=true", "data.test_fraction=0.1")
    with pytest.raises(fedsim.RunError, match=r"evaluation fails on the clients' test samples tog"):
        project.run("Large", *keys, name="pooled")


def test_a_model_that_takes_no_two_samples_is_refused_whatever_it_raises(project):
    with pytest.raises(fedsim.ScenarioError, match=r"tried on two samples: KeyError: 'x'"):
        project.world("Never")
