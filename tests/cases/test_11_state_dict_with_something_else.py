"""Whatever stands in a state_dict is trained beside, kept, or refused by name before a run."""

import pytest
from safetensors.numpy import load_file

import fedsim
from tests.cases.own_code import Project

CODE = """
    import warnings

    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, feature_shape, num_classes):
            super().__init__()
            self.b = nn.Linear(feature_shape[0], num_classes)

        def forward(self, x):
            return self.b(x)

    class Empty(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.prompt = nn.Parameter(torch.empty(0))
            self.adapters = nn.Parameter(torch.empty(2, 0, 3))
            self.register_buffer("nothing", torch.empty(0, dtype=torch.int64))

    class Extra(Net):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            raise AssertionError("nobody asked")

    class Lazy(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.b = nn.LazyLinear(num_classes)

        def forward(self, x):
            return self.b(x)

    class Kinds(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.register_buffer("ids", torch.arange(4))
            self.register_buffer("mask", torch.tensor([True, False]))
            self.register_buffer("bytes", torch.tensor([3], dtype=torch.uint8))
            self.register_buffer("halves", torch.ones(2, dtype=torch.float16))
            self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))
            self.register_buffer("none", None)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return super().forward(x) * self.scale

    class Masked(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.b.weight.register_hook(lambda gradient: gradient * 0)

    class MaskedAfter(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.b.weight.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())

    class AuxiliaryHead(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.auxiliary = nn.LazyLinear(num_classes)

        def forward(self, x):
            return super().forward(x) + (self.auxiliary(x) if self.training else 0)

    class Unused(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.unused = nn.LazyBatchNorm1d()

    class Adapter(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.a = nn.Linear(feature_shape[0], feature_shape[0])

        def forward(self, x):
            return super().forward(torch.tanh(self.a(x)))

        def state_dict(self, *arguments, **options):
            state = super().state_dict(*arguments, **options)
            return type(state)((n, v) for n, v in state.items() if n.startswith("b"))

    class FrozenBelow(Adapter):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.a.requires_grad_(False)

    class Renamed(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self._register_state_dict_hook(
                lambda module, state, prefix, local: {f"model.{n}": v for n, v in state.items()}
            )

    class Nowhere(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.register_buffer("table", torch.ones(3, device="meta"))

    class Scripted(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.b = torch.jit.script(self.b)

    class Attending(Net):
        persistent = False

        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            mask = torch.full((2, 2), float("-inf")).triu(1)
            self.register_buffer("mask", mask, persistent=self.persistent)

        def forward(self, x):
            return super().forward(x) @ torch.softmax(self.mask, -1)

    class AttendingSaved(Attending):
        persistent = True

    class Unbounded(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.low = nn.Parameter(torch.full((2,), float("-inf")), requires_grad=False)

    class Complex(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))

    class Sparse(Net):
        def __init__(self, feature_shape, num_classes):
            super().__init__(feature_shape, num_classes)
            self.register_buffer("graph", torch.eye(3).to_sparse())
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("entries"), CODE)


@pytest.fixture(scope="module")
def plain(project):
    project.run("Net", "client.momentum=0.9", name="plain")
    return load_file(project.folder / "plain" / "params.safetensors")


@pytest.mark.parametrize("model", ["Empty", "Extra", "Kinds"])
def test_it_trains_as_without(project, plain, model):
    # kept moments go to client states, empty ones too
    kept = ("client.momentum=0.9", "checkpoint.every=1")
    project.run(model, *kept, name=model)
    found = load_file(project.folder / model / "params.safetensors")
    assert project.plan(model)["executor"] == "vmap"
    if model != "Kinds":  # its scale is trained too
        assert (found["b.weight"] == plain["b.weight"]).all()
    assert found.keys() >= plain.keys()


def test_memories_hold_empty_tensors_too(project):
    kept = ("client.momentum=0.9", "client.keep_optimizer=true", "checkpoint.every=1")
    assert project.run("Empty", *kept, name="memory")["rounds"] == 3


def test_a_lazy_layer_is_made_in_the_seeded_build(project, plain):
    first = project.run("Lazy", "client.momentum=0.9", name="lazy")
    found = load_file(project.folder / "lazy" / "params.safetensors")
    assert first["rounds"] == 3
    assert found["b.weight"].shape == plain["b.weight"].shape
    assert (found["b.weight"] == plain["b.weight"]).all()


@pytest.mark.parametrize(
    ("model", "named"),
    [("Complex", "'phase' is complex64"), ("Sparse", "'graph' is float32, torch.sparse")],
)
def test_what_cannot_be_kept_is_refused_by_name(project, model, named):
    with pytest.raises(fedsim.ScenarioError, match=named):
        project.run(model, name=f"never-{model}")
    assert not (project.folder / f"never-{model}").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("Masked", "'b.weight' has a hook on its gradient, which would never run"),
        ("MaskedAfter", "'b.weight' has a hook on its gradient, which would never run"),
        ("AuxiliaryHead", "'auxiliary.weight' has no shape yet"),
        ("Unused", "'unused.weight' has no shape yet"),
        ("Adapter", "'a.weight' is trained, and the model's state_dict"),
        ("Renamed", "'b.weight' is trained, and the model's state_dict"),
        ("Nowhere", "'table' lies on the device 'meta'"),
        ("Scripted", "'b' is compiled by torch.jit"),
        ("AttendingSaved", "'mask' holds NaN or infinity as the model is initialised; what is se"),
        ("AttendingSaved", "say register_buffer(..., persistent=False), and it is no part of wha"),
        ("Unbounded", "'low' holds NaN or infinity as the model is initialised; correct how it is"),
    ],
)
def test_what_would_go_wrong_later_or_unseen_is_refused_by_name(project, model, said):
    with pytest.raises(fedsim.ScenarioError) as error:
        project.world(model)
    assert said in str(error.value)


def test_a_mask_that_is_not_saved_may_hold_infinity(project):
    assert project.run("Attending", rounds=1, name="attending")["rounds"] == 1


def test_what_is_left_out_and_never_trained_is_no_matter(project):
    assert project.run("FrozenBelow", rounds=1, name="frozen_below")["rounds"] == 1
