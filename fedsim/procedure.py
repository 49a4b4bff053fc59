"""The former place of `fedsim.client`: it warns, and gives what was here."""

import warnings

from fedsim.client.procedure import (
    GUIDANCE,
    Batch,
    Carry,
    ClientProcedure,
    Descent,
    Gradient,
    Named,
    Objective,
    Work,
)

__all__ = [
    "GUIDANCE", "Batch", "Carry", "ClientProcedure", "Descent", "Gradient", "Named", "Objective",
    "Work",
]  # fmt: skip

warnings.warn(
    "fedsim.procedure is called fedsim.client now: from fedsim.client import ClientProcedure",
    DeprecationWarning,
    stacklevel=2,
)
