"""What needs a CUDA device: the numbers of the CPU, and the same bits twice."""

import pytest
import torch

from fedsim.client.objectives import margin_penalty
from fedsim.runs import start as run
from fedsim.scenario.load import load
from strategies.fedld import principal_gradient_aggregate
from strategies.fedlex import guidance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
MODELS = ["logistic", "mlp", "cnn", "mlp_dropout", "cnn_batchnorm", "mcmahan_cifar", "resnet8"]


def train(folder, model, *overrides):
    scenario = load(
        "quickstart",
        [
            f'task={{model="{model}"}}', "rounds=3", "engine.kind=inline", "partition.clients=10",
            "participation.cohort_size=6", *overrides,
        ],
    )  # fmt: skip
    return run.start(scenario, out=folder).summary


@pytest.mark.parametrize("model", MODELS)
def test_gpu_gives_the_same_bits_twice(tmp_path, model):
    first = train(tmp_path / "a", model, "engine.device=cuda")
    second = train(tmp_path / "b", model, "engine.device=cuda")
    assert first["params_sha256"] == second["params_sha256"]


@pytest.mark.parametrize("model", MODELS)
def test_gpu_gives_the_numbers_of_the_cpu(tmp_path, model):
    gpu = train(tmp_path / "gpu", model, "engine.device=cuda", 'task.dtype="float64"')
    cpu = train(tmp_path / "cpu", model, 'task.dtype="float64"')
    assert gpu["final"]["train/loss"] == pytest.approx(cpu["final"]["train/loss"], rel=1e-6)
    assert gpu["final"]["test/loss"] == pytest.approx(cpu["final"]["test/loss"], rel=1e-6)


def test_augmented_samples_are_those_of_the_cpu(tmp_path):
    augment = "task.augment={crop = 1, flip = 0.5, noise = 0.1}"
    gpu = train(tmp_path / "gpu", "cnn", "engine.device=cuda", 'task.dtype="float64"', augment)
    cpu = train(tmp_path / "cpu", "cnn", 'task.dtype="float64"', augment)
    assert gpu["final"]["train/loss"] == pytest.approx(cpu["final"]["train/loss"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kernel",
    [
        principal_gradient_aggregate,
        margin_penalty,
        lambda rows: margin_penalty(rows, space="logit", reduction="sample"),
        lambda rows: guidance(rows[0], rows[1:]),
        lambda rows: guidance(rows[0], rows[1:], order="average-then-normalise"),
    ],
    ids=[
        "principal gradients",
        "margin",
        "margin of logits",
        "guidance",
        "guidance averaged first",
    ],
)
def test_kernels_give_the_numbers_of_the_cpu_on_a_gpu(kernel, dtype):
    rows = torch.randn(7, 40, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found = kernel(rows.cuda())
    assert (found.device.type, found.dtype) == ("cuda", dtype)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(found.cpu(), kernel(rows), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["fedld", "fedau", "fedlex", "flag", "variance_corrected_gossip"])
def test_every_algorithm_gives_the_numbers_of_the_cpu(tmp_path, name):
    choice = f"strategy.name={name}"
    gpu = train(tmp_path / "gpu", "mlp", "engine.device=cuda", 'task.dtype="float64"', choice)
    cpu = train(tmp_path / "cpu", "mlp", 'task.dtype="float64"', choice)
    assert gpu["final"]["test/loss"] == pytest.approx(cpu["final"]["test/loss"], rel=1e-6)
