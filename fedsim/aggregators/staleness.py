"""What a late update counts, by its age: the number of aggregations since its client began.

Sources: Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019 (arXiv:1903.03934),
section 5.2, for the three functions; Nguyen et al., "Federated Learning with Buffered Asynchronous
Aggregation", AISTATS 2022 (arXiv:2106.06639), which takes the polynomial with exponent 1/2.
"""

import math
from decimal import Decimal
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Discount = Literal["constant", "polynomial", "hinge"]


def discount(
    staleness: Tensor, kind: Discount, *, exponent: float = 0.5, slope: float = 10, after: int = 4
) -> Tensor:
    """Return what updates of these ages count, float64 `[K]`, in (0, 1]; 1 at age 0.

    Args:
        staleness: int64 `[K]`, at least 0.
        kind: "constant", 1; "polynomial", (1 + s)^-exponent; "hinge", 1 up to the age `after` and
            1 / (1 + slope (s - after)) beyond.
        exponent: Of the polynomial, > 0.
        slope: Of the hinge, > 0.
        after: Of the hinge, at least 0.

    Example:
        >>> ages = torch.tensor([0, 3, 15])
        >>> discount(ages, "polynomial").tolist()
        [1.0, 0.5, 0.25]
        >>> discount(ages, "hinge", slope=1, after=3).tolist()[:2]
        [1.0, 1.0]
    """
    ages = [int(age) for age in staleness.tolist()]
    if kind == "polynomial":
        known = [_power(1 + s, exponent) for s in ages]
    elif kind == "hinge":
        known = [1 / (1 + slope * max(0, s - after)) for s in ages]
    else:
        known = [1.0] * len(ages)
    return torch.tensor(known, dtype=torch.float64)


@lru_cache(maxsize=4096)
def _power(base: int, exponent: float) -> float:
    """base^-exponent, in decimals: a processor's own power may round otherwise than another's."""
    if exponent == 0.5:
        return 1 / math.sqrt(base)
    return float(Decimal(base) ** Decimal(-exponent))
