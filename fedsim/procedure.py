"""The former place of `fedsim.client`: what is imported from here still is, with a warning."""

import warnings
from typing import TYPE_CHECKING, Any

import fedsim.client

if TYPE_CHECKING:
    from fedsim.client import (  # noqa: F401
        GUIDANCE,
        Batch,
        Carry,
        ClientProcedure,
        Descent,
        Gradient,
        LastBatch,
        Named,
        Objective,
        Work,
    )


def __getattr__(name: str) -> Any:
    """Return what `fedsim.client` exports under this name."""
    found = getattr(fedsim.client, name)
    warnings.warn(
        f"fedsim.procedure is called fedsim.client now: from fedsim.client import {name}",
        DeprecationWarning,
        stacklevel=2,
    )
    return found
