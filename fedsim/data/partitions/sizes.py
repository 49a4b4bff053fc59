"""Laws of size: how many samples, or owners, each client gets."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from fedsim.basics.errors import ScenarioError, require_choice
from fedsim.data.federated import Ints
from fedsim.data.partitions.drawing import cut_largest, largest_remainders
from fedsim.data.partitions.partition import check_number

Law = Literal["equal", "linear", "square", "exponential", "log_normal", "power"]


def check_law(law: str, sigma: float, exponent: float) -> None:
    """Refuse a law that does not exist, or parameters that it cannot have.

    Raises:
        ValueError: Naming the key, the value and what is allowed.
    """
    require_choice("law", law, Law)
    check_number("sigma", sigma)
    check_number("exponent", exponent)
    for name, value, of in (("sigma", sigma, "log_normal"), ("exponent", exponent, "power")):
        if value != 1 and law != of:
            raise ScenarioError(
                f"[partition] {name} = {value}: changes nothing under law = '{law}', leave it out"
            )


def law_weights(
    law: Law, parts: int, generator: np.random.Generator, *, sigma: float, exponent: float
) -> npt.NDArray[np.float64]:
    """Return what the sizes of parts 0, 1, ... are proportional to; all but log_normal ascend.

    Args:
        law: equal: 1; linear: c + 1; square: (c + 1)^2; exponential: e^c; log_normal:
            e^(sigma z) with z standard normal; power: (parts - c)^-exponent, so that the k-th
            largest is k^-exponent of the largest.
        parts: Number of parts.
        generator: Where the log-normal law is drawn from.
        sigma: Of the log-normal law.
        exponent: Of the power law.

    Returns:
        `[parts]`, the largest at least one and finite.
    """
    ids = np.arange(parts, dtype=np.float64)
    if law == "equal":
        return np.ones(parts)
    if law == "linear":
        return ids + 1
    if law == "square":
        return (ids + 1) ** 2
    if law == "exponential":
        return np.exp(ids - (parts - 1))
    if law == "power":
        return (parts - ids) ** -exponent
    logarithms = sigma * generator.standard_normal(parts)
    return np.asarray(np.exp(logarithms - logarithms.max()))


def law_sizes(weights: npt.NDArray[np.float64], total: int, min_size: int) -> tuple[Ints, int]:
    """Return whole sizes in proportion to weights, and how much was moved to reach the minimum.

    Sizes are the largest remainders of the exact shares. What a part lacks to `min_size` comes from
    the largest parts, which are cut down to one level.

    Args:
        weights: See `law_weights`.
        total: What the sizes add up to; >= `min_size` times the number of parts.
        min_size: What each part has at least.

    Example:
        >>> law_sizes(np.array([1.0, 2.0, 3.0]), 12, 0)
        (array([2, 4, 6]), 0)
        >>> law_sizes(np.array([1.0, 2.0, 3.0]), 12, 3)
        (array([3, 4, 5]), 1)
    """
    sizes = largest_remainders(weights / weights.sum() * total, total)
    missing = np.maximum(min_size - sizes, 0)
    needed = int(missing.sum())
    return sizes + missing - cut_largest(sizes, needed, min_size), needed
