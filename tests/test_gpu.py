"""What needs a CUDA device: the numbers of the CPU, and the same bits twice."""

import pytest
import torch

from fedsim import run
from fedsim.scenario import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
MODELS = ["logistic", "mlp", "cnn", "mlp_dropout", "cnn_batchnorm"]


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
