"""What rules on stacked updates share: the finite ones, read in blocks, and their Gram matrix.

All that a rule learns from distances, lengths or directions lies in the inner products of the
updates. They are summed up in float64 in one pass over `[K, dim]`, the rest is K x K algebra, and a
second pass makes the combination; memory is a block of columns at a time, never a copy of the rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.aggregators.sums import weighted_sum
from fedsim.basics.ties import EPSILON
from fedsim.messages.admission import finite_rows

_COLUMNS = 2**13  # of a block; fixed, for it decides in which order inner products are summed
NEAR = 1e-6  # of the squared lengths: a squared distance below has lost 6 digits to them
_SQUARABLE = 2.0**400  # the square of a float64 up to here, and of its inverse, is one too


def rounding(dim: int) -> float:
    """Return how much of the lengths of so long vectors rounding may be in sums of them."""
    return 16 * EPSILON * math.sqrt(max(1, dim))


@dataclass(frozen=True)
class Updates:
    """Finite updates of clients, in float64 a block of columns at a time.

    Attributes:
        rows: `[n, dim]`.
        reference: What to subtract from them, `[dim]` or `[n, dim]`; None if they are updates.
        mix: float64 `[K, n]` on the CPU, each update's coefficients of the rows so reduced; None
            if they are the updates themselves.
    """

    rows: Tensor
    reference: Tensor | None = None
    mix: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, reference: Tensor | None = None) -> "Updates":
        """Return the updates whose rows are finite; nothing is copied when all are."""
        keep = torch.from_numpy(finite_rows(rows))
        if not keep.all():
            rows = rows[keep]
            if reference is not None and reference.dim() == 2:  # every client has its own
                reference = reference[keep]
        return cls(rows, reference)

    def __len__(self) -> int:
        """K, how many there are."""
        return len(self.rows if self.mix is None else self.mix)

    @property
    def dim(self) -> int:
        """Their dimension."""
        return self.rows.shape[1]

    def columns(self, part: slice) -> "Updates":
        """Return a part of every update."""
        reference = None if self.reference is None else self.reference[..., part]
        return Updates(self.rows[:, part], reference, self.mix)

    def mixed(self, coefficients: Tensor) -> "Updates":
        """Return linear combinations of these updates; nothing is computed yet.

        Args:
            coefficients: float64 `[new, K]`.
        """
        mix = coefficients if self.mix is None else coefficients @ self.mix
        return Updates(self.rows, self.reference, mix)

    def blocks(self) -> Iterator[Tensor]:
        """Yield float64 `[K, columns]`, to be used before the next: the memory is used again."""
        rows, reference = self.rows, self.reference
        if not rows.numel():
            return
        memory = torch.empty(
            len(rows) * min(_COLUMNS, self.dim), dtype=torch.float64, device=rows.device
        )
        for first in range(0, self.dim, _COLUMNS):
            part = rows[:, first : first + _COLUMNS]
            block = memory[: part.numel()].view(part.shape)
            if reference is None:
                block.copy_(part)
            else:
                torch.sub(part, reference[..., first : first + _COLUMNS].double(), out=block)
            yield block if self.mix is None else self.mix.to(block.device) @ block

    def transposed(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield columns, what they hold and its sizes, twice `[columns, K]`.

        What they hold is in the rows' dtype unless mixed; it is its own size unless it was added
        up, when that is the sum of what was added, without signs.
        """
        exact = self.rows.dtype if self.mix is None else torch.float64
        for first in range(0, self.dim, _COLUMNS):
            span = slice(first, first + _COLUMNS)
            part = self.rows[:, span].to(exact)
            if self.reference is not None:
                part = part - self.reference[..., span].to(exact)
            turned = part.T.contiguous()
            if self.mix is None:
                yield span, turned, turned
            else:
                mix = self.mix.T.to(part.device)
                yield span, turned @ mix, turned.abs() @ mix.abs()

    def gram(self) -> Tensor:
        """Return their inner products, float64 `[K, K]` on the CPU."""
        products = torch.zeros(len(self), len(self), dtype=torch.float64, device=self.rows.device)
        for block in self.blocks():
            products.addmm_(block, block.T)
        return products.cpu()

    def lengths(self) -> Tensor:
        """Return their lengths, float64 `[K]` on the CPU; of a sum that cancels it is zero."""
        squares = torch.zeros(len(self), dtype=torch.float64, device=self.rows.device)
        for block in self.blocks():
            squares += torch.linalg.vecdot(block, block)
        found = squares.sqrt().cpu()
        if self.mix is None:
            return found
        return torch.where(found <= rounding(self.dim) * self.sizes(), 0.0, found)

    def sizes(self) -> Tensor:
        """Return the lengths of what each is the sum of, float64 `[K]` on the CPU.

        Rounding is of that size, and not of an update's own length where rows cancel.
        """
        lengths = Updates(self.rows, self.reference).lengths()
        if self.mix is None:
            return lengths
        return torch.where(self.mix == 0, 0.0, self.mix.abs() * lengths).sum(dim=1)

    def sums(self) -> Tensor:
        """Return the sums of their entries, float64 `[K]` on the CPU."""
        found = torch.zeros(len(self), dtype=torch.float64, device=self.rows.device)
        for block in self.blocks():
            found += block.sum(dim=1)
        return found.cpu()

    def distances_to(self, point: Tensor) -> Tensor:
        """Return how far each is from a point, float64 `[dim]`; float64 `[K]` on the CPU."""
        squares = torch.zeros(len(self), dtype=torch.float64, device=self.rows.device)
        for place, block in enumerate(self.blocks()):
            apart = block - point[place * _COLUMNS : (place + 1) * _COLUMNS]
            squares += torch.linalg.vecdot(apart, apart)
        return squares.sqrt().cpu()

    def spread(self, point: Tensor) -> Tensor:
        """Return coordinates of the updates less a point in which distances are the same.

        By a QR factorisation, which gives each update its own relative precision, however long
        another one is; a Gram matrix gives all of them that of the longest.

        Args:
            point: float64 `[dim]`.

        Returns:
            float64 `[K, at most K]` on the CPU.
        """
        triangle = torch.zeros(0, len(self), dtype=torch.float64, device=self.rows.device)
        for place, block in enumerate(self.blocks()):
            apart = block - point[place * _COLUMNS : (place + 1) * _COLUMNS]
            triangle = torch.linalg.qr(torch.cat([triangle, apart.T]), mode="r").R
        return triangle.T.cpu()

    def squared_distances(self, gram: Tensor | None = None) -> Tensor:
        """Return the squares of their distances, float64 `[K, K]` on the CPU, the same both ways.

        They come of the Gram matrix, or where rounding would tell in them (updates that are long
        beside their distance, or too long to be squared) of the differences.

        Args:
            gram: That matrix, if it is known.
        """
        gram = self.gram() if gram is None else gram
        squares = gram.diagonal()[:, None] + gram.diagonal()
        found = (squares - gram - gram.T).triu(1)
        found = found + found.T  # a product of matrices is symmetric but for its last digits
        doubtful = ~(found > NEAR * squares)
        doubtful.fill_diagonal_(False)
        pairs = [torch.nonzero(row).flatten().to(self.rows.device) for row in doubtful.triu()]
        if any(len(others) for others in pairs):
            exact = torch.zeros(gram.shape, dtype=torch.float64, device=self.rows.device)
            for block in self.blocks():
                for one, others in enumerate(pairs):
                    if len(others):
                        apart = block[others].sub_(block[one])
                        exact[one, others] += torch.linalg.vecdot(apart, apart)
            found = torch.where(doubtful, (exact + exact.T).cpu(), found)
        return found

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return the sum of coefficient times update, float64 `[dim]`.

        Args:
            coefficients: float64 `[K]`; an update whose coefficient is zero is not looked at.
        """
        weights = coefficients if self.mix is None else coefficients @ self.mix
        return weighted_sum(weights, self.rows, self.reference)


@dataclass(frozen=True)
class Directions:
    """Updates as directions and lengths; neither overflows, however long or short they are.

    Attributes:
        updates: The updates, each divided by a power of two, which is exact.
        powers: Those powers, float64 `[K]` on the CPU.
    """

    updates: Updates
    powers: Tensor

    @classmethod
    def of(cls, rows: Tensor, reference: Tensor | None = None) -> "Directions":
        """Return the directions of the updates whose rows are finite."""
        return cls.of_updates(Updates.of(rows, reference))

    @classmethod
    def of_updates(cls, updates: Updates) -> "Directions":
        """Return the directions of updates.

        They are copied only in float64, when the square of one would leave the range of numbers.
        """
        ones = torch.ones(len(updates), dtype=torch.float64)
        if updates.rows.dtype != torch.float64 or not updates.rows.numel():
            return cls(updates, ones)
        peaks = torch.stack([block.abs().amax(dim=1) for block in updates.blocks()]).amax(dim=0)
        inside = (peaks < _SQUARABLE) & (peaks > 1 / _SQUARABLE) | (peaks == 0)
        if inside.all():
            return cls(updates, ones)
        powers = torch.where(peaks > 0, peaks / (2 * torch.frexp(peaks).mantissa), 1)
        whole = torch.cat([block.clone() for block in updates.blocks()], dim=1)
        return cls(Updates(whole / powers[:, None]), powers.cpu())

    def unit_gram(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the unit updates' inner products, and what `factors` does."""
        gram = self.updates.gram()
        known = gram.diagonal().sqrt() if self.updates.mix is None else None
        factors, lengths = self.factors(known)
        return gram * factors[:, None] * factors, factors, lengths

    def factors(self, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what makes a unit vector of each of `updates`, or zero, and the true lengths.

        Args:
            lengths: Those of `updates`, float64 `[K]`, if they are known.
        """
        lengths = self.updates.lengths() if lengths is None else lengths
        return torch.where(lengths > 0, 1 / lengths, 0.0), lengths * self.powers
