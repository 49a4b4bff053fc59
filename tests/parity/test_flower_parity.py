"""An unmodified Flower app gives on fedsim's engines what it gives on Flower's own simulation."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

APP = Path(__file__).with_name("app.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The app's models and metrics per engine; each engine in a process of its own."""
    folder = tmp_path_factory.mktemp("parity")
    found = {}
    for engine in ("inline", "ray", "flower"):
        out = folder / f"{engine}.npz"
        done = subprocess.run(
            [sys.executable, str(APP), engine, str(out)],
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{engine}: {done.stderr[-3000:]}"
        found[engine] = dict(np.load(out))
    return found


@pytest.mark.parametrize("engine", ["inline", "ray"])
@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "Krum"])
def test_model_and_metrics_are_those_of_flowers_simulation(results, strategy, engine):
    keys = [key for key in results["flower"] if key.startswith(f"{strategy}/")]
    assert len(keys) == 3
    for key in keys:
        np.testing.assert_allclose(
            results[engine][key], results["flower"][key], atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "Krum"])
def test_inline_and_ray_give_the_same_bits(results, strategy):
    for key in (key for key in results["ray"] if key.startswith(f"{strategy}/")):
        assert results["ray"][key].tobytes() == results["inline"][key].tobytes()


def test_client_state_counts_every_call_once_on_every_engine(results):
    # three strategies of three rounds in one run: the last training is each client's ninth call
    for engine in ("inline", "ray", "flower"):
        assert results[engine]["Krum/2"][1] == 9
