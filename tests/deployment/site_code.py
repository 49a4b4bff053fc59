"""Code of an app's own, as a bundle holds it."""

import os

from torch import nn

SECRET = "row 17: Jane Doe"


def linear(inputs=64, classes=10):
    """Return a linear model; raise what quotes a site's data where the test says so."""
    if "FEDSIM_TEST_QUOTES" in os.environ:
        raise ValueError(SECRET)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))
