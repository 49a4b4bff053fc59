"""FedSAM against NumPy, in every executor."""

import numpy as np
import pytest

from strategies.fedsam import FedSAM
from tests.laws import federations as fed
from tests.oracles import objectives_oracle as oracle
from tests.oracles.test_drift_oracle import COHORTS, LR, batches_of, gradient, run

KINDS = ("batched", "vmap", "loop")


def expected(start, gradient_of):
    return oracle.averaged(start, COHORTS, batches_of, fed.SIZES, gradient_of, lr=LR)


@pytest.mark.parametrize("kind", KINDS)
def test_three_rounds_of_fedsam_equal_the_oracle(kind):
    start, found, _, _ = run("fedsam", FedSAM(rho=0.6), arguments={"rho": 0.6}, kind=kind)
    there = oracle.sharpness_aware(gradient, 0.6)
    model = expected(start, lambda *_: there)
    np.testing.assert_allclose(found, model, rtol=0, atol=1e-11)
    assert np.abs(model - expected(start, lambda *_: gradient)).max() > 1e-3
