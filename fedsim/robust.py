"""What robust aggregation rules share: rows that are finite, and their lengths set apart."""

from typing import NamedTuple

import torch
from torch import Tensor

_COLUMNS = 2**16  # at a time where a rule needs a copy of the rows


class UnitRows(NamedTuple):
    """Updates as directions and lengths; neither overflows, however long or short they are.

    Attributes:
        rows: `[K, dim]`, the finite updates, each divided by a power of two, which is exact.
        factors: float64 `[K]` on the CPU; row times factor is a unit vector, or zero.
        lengths: float64 `[K]` on the CPU, of the updates as they were given.
    """

    rows: Tensor
    factors: Tensor
    lengths: Tensor


def finite_rows(updates: Tensor) -> Tensor:
    """Return a copy of the rows of `[clients, dim]` that hold neither NaN nor infinity."""
    return updates[torch.isfinite(updates).all(dim=1)]


def unit_rows(updates: Tensor) -> UnitRows:
    """Set the directions and the lengths of the finite rows of `[clients, dim]` apart."""
    rows = finite_rows(updates)
    peaks = torch.linalg.vector_norm(rows, torch.inf, dim=1)
    powers = torch.where(peaks > 0, peaks / (2 * torch.frexp(peaks).mantissa), 1)
    rows = rows / powers[:, None]
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu()
    factors = torch.where(lengths > 0, 1 / lengths, 0)
    return UnitRows(rows, factors, lengths * powers.double().cpu())


def column_blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Cut `[clients, dim]` into views of few columns, so that a copy of one takes little memory."""
    blocks: tuple[Tensor, ...] = rows.split(_COLUMNS, dim=1)
    return blocks
