"""Which tensors of a model a list of patterns makes personal."""

import pytest
import torch
from torch import nn

from fedsim.basics.errors import ScenarioError
from fedsim.tasks.models.frozen import freeze
from fedsim.tasks.models.personal import personal_names

STATISTICS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.output = nn.Linear(2, 2)
        self.output2 = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], ()),
        (["output.*"], ("output.weight", "output.bias")),
        (["output"], ("output.weight", "output.bias")),
        (["output.bias", "body.weight"], ("body.weight", "output.bias")),
        (["*norm*"], ("norm.weight", "norm.bias", *STATISTICS)),
        (["norm.running_*", "scale"], ("scale", *STATISTICS[:2])),
        (["outpu[st].bias", "*.bias"], ("body.bias", "norm.bias", "output.bias", "output2.bias")),
    ],
)
def test_patterns_choose_parameters_and_buffers_in_the_models_order(patterns, expected):
    assert personal_names(Small(), patterns) == expected


def test_a_star_chooses_every_tensor_that_is_saved():
    assert personal_names(Small(), ["*"]) == tuple(Small().state_dict())


@pytest.mark.parametrize("pattern", ["first.weight", "second", "*"])
def test_a_parameter_of_two_layers_is_personal_by_either_name(pattern):
    assert personal_names(Tied(), [pattern]) == ("first.weight",)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("outptu.*", "output"), ("norm.weigth", "norm.weight"), ("unsaved", "")],
)
def test_a_pattern_that_names_nothing_is_refused_with_all_names(pattern, nearest):
    with pytest.raises(ScenarioError) as caught:
        personal_names(Small(), ["body", pattern])
    message = str(caught.value)
    assert message.startswith(f"[task] personal: '{pattern}' is not a tensor or layer of the model")
    assert f"did you mean '{nearest}'?" in message or not nearest
    listed = message.partition("allowed: ")[2].split(", ")
    assert set(listed) == {*Small().state_dict(), "body", "norm", "output", "output2"}


def test_a_frozen_parameter_is_refused_by_name():
    model = Small()
    freeze(model, ["output.bias"])
    with pytest.raises(ScenarioError, match=r"'output\.\*' names 'output\.bias', which is frozen"):
        personal_names(model, ["body", "output.*"])
    assert personal_names(model, ["output.weight"]) == ("output.weight",)
