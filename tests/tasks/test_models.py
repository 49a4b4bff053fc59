import hashlib
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedsim.basics.errors import ScenarioError
from fedsim.basics.samples import SampleSpec
from fedsim.client.vectorising import why_loop
from fedsim.messages.layout import Layout
from fedsim.tasks.classification import Classification
from fedsim.tasks.models.frozen import freeze
from fedsim.tasks.models.named import MODELS
from fedsim.tasks.models.pretrained import Pretrained
from fedsim.tasks.models.recurrent import StackedLSTM
from fedsim.tasks.named import make_task

DIGITS = (1, 8, 8)
TEXT = SampleSpec((5,), 12, (), 12)
IMAGES = [name for name in MODELS if name != "char_lstm"]


def task_of(model="logistic", *, feature_shape=DIGITS, num_classes=10, **table):
    spec = TEXT if model == "char_lstm" else SampleSpec(feature_shape, num_classes)
    return make_task({"model": model, **table}, spec)


def bits(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_equal_seeds_give_equal_bits_whatever_was_drawn_before(model):
    torch.manual_seed(1)
    first = bits(task_of(model).build_model(7))
    torch.manual_seed(2)
    torch.rand(13)
    assert bits(task_of(model).build_model(7)) == first
    assert bits(task_of(model).build_model(8)) != first


@pytest.mark.parametrize("model", MODELS)
def test_building_a_model_leaves_the_global_generator_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    task_of(model).build_model(7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("model", MODELS)
def test_a_float64_model_starts_where_the_float32_one_does(model):
    single = task_of(model, dtype="float32").build_model(3).state_dict()
    double = task_of(model, dtype="float64").build_model(3).state_dict()
    for name, tensor in single.items():
        assert double[name].dtype == (torch.float64 if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(double[name], tensor.to(double[name].dtype))


@pytest.mark.parametrize("model", IMAGES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_models_give_a_logit_per_class_for_every_image_shape(model, shape):
    task = task_of(model, feature_shape=shape, num_classes=7)
    assert task.build_model(0).eval()(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("model", MODELS)
def test_models_come_in_training_mode(model):
    assert all(module.training for module in task_of(model).build_model(0).modules())


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        ("logistic", (60,), 60 * 10 + 10),
        ("mlp", DIGITS, 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10),
        ("mlp_dropout", DIGITS, 64 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10),
        ("cnn", DIGITS, (9 * 16 + 16) + (16 * 9 * 32 + 32) + (32 * 2 * 2 * 64 + 64) + 650),
        ("cnn", (1, 28, 28), (9 * 16 + 16) + (16 * 9 * 32 + 32) + (32 * 7 * 7 * 64 + 64) + 650),
        ("cnn", (3, 32, 32), (27 * 16 + 16) + (16 * 9 * 32 + 32) + (32 * 64 * 64 + 64) + 650),
        ("cnn_batchnorm", DIGITS, 160 + 4640 + 8256 + 650 + 2 * 16 + 2 * 32),
        ("mcmahan_mnist", (1, 28, 28), 1_663_370),  # as McMahan et al. print it
        ("mcmahan_cifar", (3, 24, 24), 1_068_298),  # "about 10^6"
        ("resnet8", (3, 32, 32), 78_042),
        ("resnet18", (3, 32, 32), 11_173_962),
    ],
)
def test_models_have_the_parameters_that_their_architecture_says(model, shape, parameters):
    built = task_of(model, feature_shape=shape).build_model(0)
    assert count(built) == parameters


def test_an_mlp_computes_relu_layers():
    model = task_of("mlp", hidden=[5, 4], dtype="float64").build_model(2)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(3, 1, 8, 8))
    hidden = x.reshape(3, 64)
    for layer in ("hidden1", "hidden2"):
        hidden = np.maximum(hidden @ state[f"{layer}.weight"].T + state[f"{layer}.bias"], 0)
    expected = hidden @ state["output.weight"].T + state["output.bias"]
    np.testing.assert_allclose(
        model(torch.from_numpy(x)).detach().numpy(), expected, rtol=0, atol=1e-12
    )


def test_dropout_drops_the_share_asked_for_in_training_only():
    model = task_of("mlp_dropout", hidden=[4000], dropout=0.3).build_model(0)
    layer = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    torch.manual_seed(0)
    kept = (layer(torch.ones(4000)) != 0).double().mean().item()
    assert abs(kept - 0.7) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    model.eval()
    x = torch.rand(2, *DIGITS)
    assert torch.equal(model(x), model(x))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, *, width=4):\n"
        "        super().__init__()\n"
        "        self.layers = nn.Sequential(\n"
        "            nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10)\n"
        "        )\n"
        "    def forward(self, x):\n"
        "        return self.layers(x)\n"
        "def narrow(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "def seven():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
        "def wrong_width():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(63, 10))\n"
        "def frozen():\n"
        "    return seven().requires_grad_(False)\n"
        "def number():\n"
        "    return 3\n"
        "def raising():\n"
        "    raise KeyError('no\\nsuch layer')\n"
        "def infinite():\n"
        "    net = seven()\n"
        "    nn.init.constant_(net[1].bias, float('inf'))\n"
        "    return net\n"
        "constant = 3\n"
    )
    yield
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("user_module")
def test_a_users_module_is_built_by_import_path_with_its_own_arguments():
    model = task_of("mine:Net", width=6).build_model(0)
    assert model.layers[1].weight.shape == (6, 64)


@pytest.mark.usefixtures("user_module")
def test_a_users_factory_gets_the_shape_arguments_that_it_takes():
    model = task_of("mine:narrow", num_classes=5).build_model(0)
    assert model[1].weight.shape == (5, 64)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mine:seven", r"for two samples the model gives \(2, 7\), expected .* \(2, 10\)"),
        ("mine:wrong_width", r"cannot take features of shape \(1, 8, 8\)"),
        ("mine:frozen", "no trainable parameter"),
        ("mine:number", "gave a int, expected a torch.nn.Module"),
        ("mine:raising", r"\[task\] model: the factory raised KeyError: .*such layer"),
        ("mine:infinite", r"'1.bias' holds NaN or infinity as the model is initialised"),
    ],
)
def test_a_users_model_that_does_not_fit_is_refused_when_built(model, message):
    with pytest.raises(ScenarioError, match=message):
        task_of(model).build_model(0)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": "cn"}, r"\[task\] model: 'cn' is not a model; did you mean 'cnn'"),
        ({"model": "mine:constant"}, "names a int, expected a function or class"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(table, message):
    with pytest.raises(ScenarioError, match=message):
        make_task(table, SampleSpec(DIGITS, 10))


@pytest.mark.parametrize(
    ("model", "arguments", "shape", "message"),
    [
        ("mlp", {"hidden": [10, 0]}, DIGITS, r"\[task\] hidden = \[10, 0\]: each width must be"),
        ("mlp_dropout", {"dropout": 1.0}, DIGITS, r"dropout = 1.0: must be in \[0, 1\)"),
        ("cnn", {}, (60,), r"needs images .* have shape \(60,\)"),
        ("cnn_batchnorm", {}, (1, 3, 3), r"at least 4x4.*\(1, 3, 3\)"),
        ("mcmahan_mnist", {}, (60,), "needs images"),
        ("resnet8", {"groups": 3}, DIGITS, r"\[task\] groups = 3: must divide 16"),
        ("resnet18", {"stem": "imagenet"}, DIGITS, "at least 32x32"),
        ("char_lstm", {"hidden": 0}, None, r"\[task\] hidden = 0: must be >= 1"),
    ],
)
def test_impossible_model_arguments_are_refused(model, arguments, shape, message):
    with pytest.raises(ScenarioError, match=message):
        task_of(model, feature_shape=shape, **arguments).build_model(0)


# --- residual networks, recurrent networks --------------------------------------------------------


def test_a_resnet18_for_imagenet_has_the_parameters_and_names_of_torchvisions():
    """11,689,512 parameters and 122 tensors are torchvision's, of which its weights are made."""
    spec = SampleSpec((3, 224, 224), 1000)
    model = make_task({"model": "resnet18", "norm": "batch"}, spec).build_model(0)
    assert count(model) == 11_689_512
    names = list(model.state_dict())
    assert len(names) == 122
    assert {"conv1.weight", "bn1.running_var", "layer4.1.conv2.weight", "fc.bias"} < set(names)
    assert "layer2.0.downsample.1.num_batches_tracked" in names
    assert model.conv1.stride == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "shape", "stride"),
    [
        ({}, (3, 32, 32), (1, 1)),
        ({}, (3, 64, 64), (2, 2)),
        ({"stem": "imagenet"}, (3, 32, 32), (2, 2)),
        ({"stem": "cifar"}, (3, 64, 64), (1, 1)),
    ],
)
def test_the_stem_follows_the_images_unless_it_is_given(arguments, shape, stride):
    model = task_of("resnet18", feature_shape=shape, **arguments).build_model(0)
    assert model.conv1.stride == stride


def test_a_residual_block_adds_its_input():
    """With its second normalisation at zero a block of equal shapes is the identity after ReLU."""
    model = task_of("resnet8").build_model(0).eval().requires_grad_(False)
    block = model.layer1[0]
    block.bn2.weight.zero_()
    values = torch.rand(2, 16, 4, 4)
    assert torch.equal(block(values), values)
    changing = model.layer2[0]
    changing.bn2.weight.zero_()
    expected = changing.downsample(values).relu()
    assert torch.equal(changing(values), expected)
    assert expected.shape == (2, 32, 2, 2)


@pytest.mark.parametrize(("norm", "kind"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)])
def test_every_normalisation_of_a_resnet_is_the_one_asked_for(norm, kind):
    model = task_of("resnet8", norm=norm).build_model(0)
    found = [type(m) for m in model.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d)]
    assert found == [kind] * 9


@pytest.mark.parametrize("layers", [1, 2])
def test_the_stacked_lstm_computes_what_torchs_does(layers):
    torch.manual_seed(0)
    ours = StackedLSTM(3, 5, layers).double()
    theirs = nn.LSTM(3, 5, layers, batch_first=True).double()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False).missing_keys
    assert missing == [f"bias_hh_l{layer}" for layer in range(layers)]
    for name in missing:
        nn.init.zeros_(getattr(theirs, name))
    values = torch.randn(4, 7, 3, dtype=torch.float64)
    ours(values).square().sum().backward()
    expected, _ = theirs(values)
    expected.square().sum().backward()
    torch.testing.assert_close(ours(values), expected, rtol=0, atol=1e-12)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, getattr(theirs, name).grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("vocabulary", [12, 90])
def test_the_character_model_has_the_parameters_of_its_equations(vocabulary):
    """Embedding 8; gates of 8 + 256 and 256 + 256 inputs and a bias; 256 weights and a bias out."""
    spec = SampleSpec((5,), vocabulary, (), vocabulary)
    model = make_task({"model": "char_lstm"}, spec).build_model(0)
    gates = 4 * 256 * (8 + 256 + 1) + 4 * 256 * (256 + 256 + 1)
    assert count(model) == 8 * vocabulary + gates + 257 * vocabulary
    assert count(model) == 796_672 + 265 * vocabulary


def test_the_character_model_predicts_after_the_last_character():
    model = task_of("char_lstm", hidden=6).build_model(0).requires_grad_(False)
    tokens = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [2, 2, 3, 4, 5]])
    outputs = model(tokens)
    assert outputs.shape == (3, 12)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])  # the first one is remembered


# --- what vectorises, and what is said of the rest ------------------------------------------------

LOOPS = {
    "cnn_batchnorm": {},
    "resnet8": {"norm": "batch"},
}


@pytest.mark.parametrize("model", [m for m in MODELS if m not in ("cnn_batchnorm", "resnet18")])
def test_every_model_without_batch_normalisation_vectorises(model):
    task = task_of(model, **({"hidden": 4} if model == "char_lstm" else {}))
    assert why_loop(task, task.spec) is None


@pytest.mark.parametrize(("model", "arguments"), LOOPS.items(), ids=LOOPS)
def test_batch_normalisation_loops_and_the_layer_is_named(model, arguments):
    task = task_of(model, **arguments)
    assert "BatchNorm2d" in why_loop(task, task.spec)
    assert "in place" in why_loop(task, task.spec)


class Histogram(nn.Module):
    """Uses an operation that torch.func can only run client by client."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(4, 3)

    def forward(self, x):
        return self.output(x) + torch.histc(x.detach(), 3).sum() * 0


class Branching(nn.Module):
    """Asks for a tensor's value."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(4, 3)

    def forward(self, x):
        y = self.output(x)
        return y if float(y.sum()) > 0 else -y


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (Histogram, "no batching rule for aten::histc"),
        (lambda: nn.Sequential(nn.Linear(4, 4), Branching()), "refuses the model in Branching '1'"),
        (lambda: nn.Sequential(nn.LSTM(4, 3)), "LSTM '0' has no batching rule"),
    ],
    ids=["slow operation", "branch on a value", "torch's LSTM"],
)
def test_what_torch_func_cannot_do_is_reported_by_name(build, named):
    spec = SampleSpec((4,), 3)
    task = Classification(build, spec, torch.float32)
    task._check = lambda model: None  # torch's LSTM gives a pair
    assert named in why_loop(task, spec)


# --- frozen parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        (["conv1"], ["conv2", "hidden", "output"]),
        (["conv1", "conv2.weight", "conv2.bias"], ["hidden", "output"]),
        (["conv*"], ["hidden", "output"]),
        (["*.bias", "hidden"], ["conv1", "conv2", "output"]),
    ],
)
def test_frozen_parameters_stay_out_of_the_flat_vector(patterns, trained):
    model = task_of("cnn", freeze=patterns).build_model(0)
    layout = Layout.from_model(model)
    found = [spec.name for spec in layout.trainable]
    assert sorted({name.partition(".")[0] for name in found}) == trained
    assert "*.bias" not in patterns or all(name.endswith("weight") for name in found)
    assert layout.dim == sum(model.get_parameter(name).numel() for name in found)
    assert {s.name for s in layout.buffers} | set(found) == set(model.state_dict())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["conv3"], r"\[task\] freeze: 'conv3' is not a parameter or layer .*did you mean 'conv"),
        (["hidden.wieght"], "did you mean 'hidden.weight'"),
        (["*"], r"freeze = \['\*'\]: nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(patterns, message):
    with pytest.raises(ScenarioError, match=message):
        task_of("cnn", freeze=patterns).build_model(0)


def test_a_layer_inside_others_is_frozen_by_its_leading_part():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    freeze(model, ["0.1"])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["0.1.weight", "0.1.bias"]


# --- pre-trained weights --------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A file with the tensors of another seed's model, changed by the given function."""

    def save(change=lambda tensors: tensors):
        tensors = dict(task_of("cnn_batchnorm").build_model(5).state_dict())
        path = tmp_path / "weights.safetensors"
        save_file(change(tensors), path)
        return str(path)

    return save


def without(name, tensors):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def test_a_model_starts_from_the_tensors_of_the_file(saved):
    path = saved()
    model = task_of("cnn_batchnorm").build_model(1)
    said = Pretrained(path).put_into(model)
    assert bits(model) == bits(task_of("cnn_batchnorm").build_model(5))
    with open(path, "rb") as file:
        assert said["sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert (said["taken"], said["kept"], said["unused"]) == (len(model.state_dict()), [], [])


def test_weights_take_the_models_dtype_and_integers_stay_integers(saved):
    model = task_of("cnn_batchnorm", dtype="float64").build_model(1)
    Pretrained(saved()).put_into(model)
    expected = task_of("cnn_batchnorm", dtype="float64").build_model(5)
    assert bits(model) == bits(expected)
    assert model.norm1.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without("output.bias", t), "lacks 'output.bias'"),
        (
            lambda t: {**without("output.bias", t), "outputs.bias": t["output.bias"]},
            r"lacks 'output.bias' \(nearest: 'outputs.bias'\); has 'outputs.bias', which the model",
        ),
        (lambda t: {**t, "output.bias": torch.zeros(7)}, r"shape \(7,\), expected .* \(10,\)"),
        (
            lambda t: {**t, "output.bias": torch.zeros(10, dtype=torch.int64)},
            "'output.bias' is torch.int64",
        ),
        (lambda t: {**t, "output.bias": t["output.bias"] * np.nan}, "holds NaN or infinity"),
    ],
    ids=["missing", "renamed", "shape", "dtype", "nan"],
)
def test_weights_that_do_not_fit_are_refused_by_name(saved, change, message):
    path = saved(change)
    model = task_of("cnn_batchnorm").build_model(1)
    with pytest.raises(ScenarioError, match=message) as raised:
        Pretrained(path).put_into(model)
    assert str(raised.value).startswith(f"[task] weights = '{path}': ")
    assert bits(model) == bits(task_of("cnn_batchnorm").build_model(1))


def test_without_strictness_a_new_head_keeps_its_initialisation(saved):
    model = task_of("cnn_batchnorm", num_classes=3).build_model(1)
    said = Pretrained(saved(), strict=False).put_into(model)
    fresh = bits(task_of("cnn_batchnorm", num_classes=3).build_model(1))
    old = bits(task_of("cnn_batchnorm").build_model(5))
    for name, found in bits(model).items():
        assert found == (fresh if name.startswith("output.") else old)[name]
    assert said["kept"] == ["output.weight", "output.bias"]


def test_a_file_of_which_nothing_fits_is_refused_even_without_strictness(saved):
    path = saved(lambda tensors: {f"old.{name}": t for name, t in tensors.items()})
    with pytest.raises(ScenarioError, match="no tensor fits the model"):
        Pretrained(path, strict=False).put_into(task_of("cnn_batchnorm").build_model(1))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors", "torn"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, saved, content):
    path = tmp_path / "broken.safetensors"
    if content == "torn":
        with open(saved(), "rb") as file:
            content = file.read()[:-100]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ScenarioError, match=r"weights = '.*broken.safetensors': (cannot|is not)"):
        Pretrained(str(path))
