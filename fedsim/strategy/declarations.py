"""Declarations of a strategy: its state, its set-up, settings in which it becomes another one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fedsim.messages.layout import Payload

State = Any  # a NamedTuple of tensors, integers and floats


class NoState(NamedTuple):
    """The State of a strategy that remembers nothing."""


class Degenerate(NamedTuple):
    """A setting in which a strategy becomes another one (law 5).

    Attributes:
        settings: The hyperparameters of the setting.
        becomes: The other strategy's scenario name.
        with_settings: The other strategy's hyperparameters.
        given: What must hold besides; "first round" holds for one round only.
        tolerance: The largest difference in float64; 0 asks for the same bits.
    """

    settings: Mapping[str, Any]
    becomes: str
    with_settings: Mapping[str, Any]
    given: Literal[
        "everyone takes part", "identical clients", "identical models", "first round"
    ] = "everyone takes part"
    tolerance: float = 0.0


@dataclass(frozen=True)
class Setup:
    """A set-up exchange before round 1.

    Attributes:
        clients: int64, who takes part.
        shared: What they receive besides the model.
    """

    clients: np.ndarray
    shared: Payload
