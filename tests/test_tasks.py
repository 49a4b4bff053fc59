import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsim.errors import ScenarioError
from fedsim.models import MODELS
from fedsim.samples import SampleSpec
from fedsim.tasks import make_task

DIGITS = (1, 8, 8)


def task_of(model="logistic", *, feature_shape=DIGITS, num_classes=10, **table):
    return make_task({"model": model, **table}, SampleSpec(feature_shape, num_classes))


def bits(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


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


@pytest.mark.parametrize("model", MODELS)
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
    ],
)
def test_models_have_the_parameters_that_their_architecture_says(model, shape, parameters):
    built = task_of(model, feature_shape=shape).build_model(0)
    assert sum(p.numel() for p in built.parameters()) == parameters


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


def _softmax_losses(logits, targets):
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_z = np.log(np.exp(shifted).sum(axis=1))
    return log_z - shifted[np.arange(len(targets)), targets]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 9),
    padding=st.integers(0, 4),
)
def test_statistics_are_the_sums_over_samples_and_ignore_padding(seed, samples, padding):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, 10)) * 5
    targets = rng.integers(0, 10, samples)
    junk = np.full((padding, 10), np.nan)
    sums = task_of(dtype="float64").statistics(
        torch.from_numpy(np.concatenate([logits, junk])),
        torch.from_numpy(np.concatenate([targets, np.zeros(padding, dtype=np.int64)])),
        torch.tensor([1.0] * samples + [0.0] * padding, dtype=torch.float64),
    )
    assert sums["loss"].item() == pytest.approx(_softmax_losses(logits, targets).sum(), abs=1e-12)
    assert sums["correct"].item() == (logits.argmax(axis=1) == targets).sum()
    assert sums["examples"].item() == samples


def test_statistics_add_up_over_batches():
    task = task_of()
    torch.manual_seed(0)
    outputs, targets, ones = torch.randn(10, 10), torch.randint(10, (10,)), torch.ones(10)
    whole = task.statistics(outputs, targets, ones)
    first = task.statistics(outputs[:4], targets[:4], ones[:4])
    second = task.statistics(outputs[4:], targets[4:], ones[4:])
    for name, value in whole.items():
        torch.testing.assert_close(first[name] + second[name], value, rtol=1e-12, atol=0)


def test_losses_and_statistics_under_vmap_equal_one_client_at_a_time():
    task = task_of(dtype="float64")
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 6, 10, generator=generator, dtype=torch.float64)
    targets = torch.randint(10, (4, 6), generator=generator)
    weights = (torch.rand(4, 6, generator=generator) < 0.7).double()
    losses = torch.func.vmap(task.sample_losses)(outputs, targets)
    sums = torch.func.vmap(task.statistics)(outputs, targets, weights)
    for i in range(4):
        torch.testing.assert_close(losses[i], task.sample_losses(outputs[i], targets[i]))
        for name, value in task.statistics(outputs[i], targets[i], weights[i]).items():
            torch.testing.assert_close(sums[name][i], value)


def test_gradients_of_the_loss_under_vmap_are_softmax_minus_one_hot():
    task = task_of(dtype="float64")
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, 5, 10, generator=generator, dtype=torch.float64)
    targets = torch.randint(10, (3, 5), generator=generator)

    def total(logits, y):
        return task.sample_losses(logits, y).sum()

    grads = torch.func.vmap(torch.func.grad(total))(outputs, targets)
    expected = outputs.softmax(-1) - nn.functional.one_hot(targets, 10)
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


def test_metrics_are_means_over_the_samples():
    metrics = task_of().metrics({"loss": 6.0, "correct": 3.0, "examples": 4.0})
    assert metrics == {"loss": 1.5, "accuracy": 0.75}


def test_metrics_over_no_sample_are_nan():
    metrics = task_of().metrics({"loss": 0.0, "correct": 0.0, "examples": 0.0})
    assert metrics.keys() == {"loss", "accuracy"}
    assert all(np.isnan(value) for value in metrics.values())


def test_a_task_survives_pickling():
    task = task_of("mlp", hidden=[3], dtype="float64")
    assert bits(pickle.loads(pickle.dumps(task)).build_model(1)) == bits(task.build_model(1))


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
        ({"kind": "clasification"}, "'clasification' is not a task; did you mean 'classific"),
        ({"dtype": "float23"}, "'float23' is not a dtype; did you mean 'float32'"),
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
    ],
)
def test_impossible_model_arguments_are_refused(model, arguments, shape, message):
    with pytest.raises(ScenarioError, match=message):
        task_of(model, feature_shape=shape, **arguments).build_model(0)
