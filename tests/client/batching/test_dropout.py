"""Dropout layers of torch's that take their masks as data."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from fedsim.client.batching.dropout import dropout_layers, seed_dropout, why_not_seeded


def test_seeded_dropout_scales_what_it_keeps_and_is_the_identity_in_evaluation():
    layer = seed_dropout(nn.Sequential(nn.Dropout(0.75)))[0]
    layer.noise = torch.tensor([[0.1, 0.74, 0.75, 0.9]])
    values = torch.ones(1, 4)
    assert layer(values).tolist() == [[0.0, 0.0, 4.0, 4.0]]
    assert layer.eval()(values) is values


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_seeded_dropout_keeps_or_drops_all_at_the_ends(p):
    layer = seed_dropout(nn.Sequential(nn.Dropout(p)))[0]
    layer.noise = torch.tensor([0.0, 0.5])
    assert layer(torch.ones(2)).tolist() == [1.0 - p] * 2


def test_dropout_layers_are_seeded_at_any_depth_and_stay_what_they_are():
    model = seed_dropout(
        nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout2d(0.2), nn.ReLU()))
    )
    kinds = [nn.Sequential, nn.Dropout, nn.Sequential, nn.Dropout2d, nn.ReLU]
    assert [type(m) for m in model.modules()] == kinds
    seeded = dropout_layers(model)
    assert {name: each.channels for name, each in seeded.items()} == {
        "0.noise": False,
        "1.0.noise": True,
    }
    assert [each.layer for each in seeded.values()] == [model[0], model[1][0]]
    assert dropout_layers(seed_dropout(model)) == seeded


def test_a_copy_of_a_seeded_layer_takes_masks_of_its_own():
    first = seed_dropout(nn.Sequential(nn.Dropout(0.5)))
    second = pickle.loads(pickle.dumps(copy.deepcopy(first)))
    first[0].noise, second[0].noise = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert [first(torch.ones(2)).tolist(), second(torch.ones(2)).tolist()] == [[0, 2], [2, 0]]


def test_a_dropout_layer_in_place_drops_in_what_it_is_given():
    layer = seed_dropout(nn.Sequential(nn.Dropout(0.5, inplace=True)))[0]
    layer.noise, values = torch.tensor([0.0, 0.5]), torch.ones(2)
    assert layer(values) is values
    assert values.tolist() == [0.0, 2.0]


def test_a_mask_serves_one_use_and_values_that_it_fits():
    layer = seed_dropout(nn.Sequential(nn.Dropout(0.5)))[0]
    layer.noise = torch.ones(1000)  # keeps all
    assert (layer(torch.ones(999)) == 0).any()
    assert (layer(torch.ones(1000)) == 2).all()
    assert (layer(torch.ones(1000)) == 0).any()


def test_a_layer_in_a_backward_pass_takes_the_mask_of_the_pass_or_is_refused_by_name():
    def passed(uses, noise):
        layer = seed_dropout(nn.Sequential(nn.Dropout(0.5)))[0]
        layer.noise, values = noise, torch.ones(1000, requires_grad=True)
        dropped = [layer(values) for _ in range(uses)]
        again = []
        values.register_hook(lambda slope: again.append(layer(torch.ones(1000))))
        (2 * values).sum().backward()
        return dropped, again

    (dropped,), (again,) = passed(1, torch.rand(1000))
    assert torch.equal(dropped, again)
    for uses, noise in ((0, torch.zeros(())), (2, torch.rand(1000))):
        with pytest.raises(RuntimeError, match="'0' is computed once more in the backward pass"):
            passed(uses, noise)


def test_a_further_use_while_clients_train_together_is_refused_by_name():
    layer = seed_dropout(nn.Sequential(nn.Dropout(0.5)))[0]
    with pytest.raises(RuntimeError, match=r"dropout layer '0' .* executor = 'loop'"):
        torch.func.vmap(layer)(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Dropout1d(0.5), (3, 4)), (nn.Dropout3d(0.5), (3, 4, 2, 2))]
)
def test_values_that_torch_takes_for_one_sample_get_no_mask_of_a_batch(layer, shape):
    model = seed_dropout(nn.Sequential(layer))
    why = why_not_seeded(model, dropout_layers(model), torch.ones(shape))
    assert why == (
        f"dropout layer '0' is a {type(layer).__name__}, which takes values of {len(shape)} axes "
        "for one sample"
    )


def test_a_probability_that_torch_refuses_is_refused():
    layer = seed_dropout(nn.Sequential(nn.Dropout(0.5)))[0]
    layer.noise, layer.p = torch.ones(2), -0.1
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer(torch.ones(2))


class Net(nn.Module):
    """Uses its dropout as it is told."""

    def __init__(self, use):
        super().__init__()
        self.drop, self.use = nn.Dropout(0.5), use

    def forward(self, x):
        return self.use(self.drop, x)


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda drop, x: drop(x), None),
        (lambda drop, x: drop(input=x), None),
        (lambda drop, x: drop(drop(x)), "used 2 times in one pass on 2 samples"),
        (lambda drop, x: drop(x) if len(x) > 4 else x, "used in some passes of training"),
        (lambda drop, x: drop(x) if len(x) == 2 else x, "used in some passes of training"),
        (lambda drop, x: drop(drop(x)) if len(x) > 4 else drop(x), "used 2 times .* 6 samples"),
        (
            lambda drop, x: torch.cat([drop(part) for part in x.split(4)]),
            "used 2 times in one pass on 6 samples",
        ),
        (lambda drop, x: drop(x[x[:, 0] > 0]), r"not used along the batch: on \[5, 3\] for .* 6"),
        (lambda drop, x: drop(x.t()), r"not used along the batch: on \[3, 2\] for a batch of 2"),
    ],
)
def test_why_masks_cannot_be_drawn_before_a_pass(use, why):
    model = seed_dropout(Net(use))
    features = torch.arange(18.0).flip(0).reshape(6, 3) - 2
    found = why_not_seeded(model, dropout_layers(model), features)
    if why is None:
        assert found is None
    else:
        assert re.match(f"dropout layer 'drop' is {why}", found)
