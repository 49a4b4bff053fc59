"""Law 4: a scenario on Flower's own simulation agrees with fedsim's engine."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim.scenario import discovery

pytestmark = (
    pytest.mark.slow
)  # test_flower_parity.py has three strategies and every kind of message

PROGRAM = Path(__file__).with_name("scenarios_on_flower.py")
CASES = [
    f"{model}-{optimizer}"
    for model in ("logistic", "mlp", "cnn", "mlp_dropout", "cnn_batchnorm")
    for optimizer in ("sgd", "adam")
]
CASES += [f"strategy-{name}" for name in discovery.names("strategies")]
CASES += ["strategy-private", "strategy-private_ours", "strategy-prox", "personal-sgd"]
CASES += ["strategy-fedau_with_adam"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("flower") / "found.npz"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(out)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


@pytest.mark.parametrize("case", CASES)
def test_two_rounds_agree_with_fedsims_engine(found, case):
    ours, theirs = found[f"inline/{case}"], found[f"flower/{case}"]
    np.testing.assert_allclose(theirs, ours, atol=1e-9, rtol=0)
    assert np.abs(ours).max() > 0
