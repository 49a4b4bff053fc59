"""Compression operators C: what of a vector is sent, and how. Needs torch and NumPy alone.

Each writes, with a codec of `fedsim.messages.codecs`, what turns a base that both sides have into
nearly the vector wanted: the base plus C(wanted - base).
"""

import abc
import math
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import show, unknown
from fedsim.basics.idle import Idle
from fedsim.messages import codecs


class Compressor(abc.ABC):
    """A compression operator; concrete ones are final and hold their settings alone."""

    @abc.abstractmethod
    def encode(
        self, base: Tensor, wanted: Tensor, draw: np.random.Generator, *, feedback: bool
    ) -> dict[str, Tensor]:
        """Write nearly `wanted`.

        Args:
            base: What both sides have, `[dim]`.
            wanted: The vector, `[dim]`.
            draw: Random numbers, for those who draw.
            feedback: Whether what is lost now is made up for later; a random operator that is
                unbiased then becomes a contraction, and is left unbiased elsewhere.
        """

    @abc.abstractmethod
    def contraction(self, dim: int) -> float:
        """Return alpha in (0, 1] with E|C(v) - v|^2 <= (1 - alpha) |v|^2, under feedback."""


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share = {share!r}: must be in (0, 1]")


def _kept(share: float, dim: int) -> int:
    """K: how many entries are sent, at least one where there are any."""
    return min(dim, max(1, round(share * dim)))


@final
class TopK(Compressor):
    """Sends the entries that differ most; of equal ones those with the lowest index.

    Alistarh et al., NeurIPS 2018 (arXiv:1809.10505). alpha = K / d.

    Args:
        share: K / d, in (0, 1].
    """

    def __init__(self, share: float) -> None:
        _check_share(share)
        self._share = share

    def encode(
        self, base: Tensor, wanted: Tensor, draw: np.random.Generator, *, feedback: bool
    ) -> dict[str, Tensor]:
        """Write K entries of `wanted`."""
        count = _kept(self._share, len(wanted))
        if not count:
            return codecs.sparse(torch.zeros(0, dtype=torch.int64), wanted)
        # what is not a number counts as largest, so that a broken reply says so
        size = torch.nan_to_num((wanted - base).abs(), nan=math.inf)
        least = torch.topk(size, count).values[-1]
        above = torch.nonzero(size > least).reshape(-1)
        equal = torch.nonzero(size == least).reshape(-1)[: count - len(above)]
        return codecs.sparse(torch.cat([above, equal]).sort().values, wanted)

    def contraction(self, dim: int) -> float:
        """K / d."""
        return _kept(self._share, dim) / dim


@final
class RandomK(Compressor):
    """Sends entries at random places; without feedback d / K times their change.

    Stich, Cordonnier and Jaggi, NeurIPS 2018 (arXiv:1809.07599). alpha = K / d.

    Args:
        share: K / d, in (0, 1].
    """

    def __init__(self, share: float) -> None:
        _check_share(share)
        self._share = share

    def encode(
        self, base: Tensor, wanted: Tensor, draw: np.random.Generator, *, feedback: bool
    ) -> dict[str, Tensor]:
        """Write K entries of `wanted`, or of what is as far as many times from the base."""
        dim = len(wanted)
        count = _kept(self._share, dim)
        places = np.sort(draw.permutation(dim)[:count])
        if not feedback and count < dim:
            wanted = base + (wanted - base) * (dim / count)
        return codecs.sparse(torch.from_numpy(places), wanted)

    def contraction(self, dim: int) -> float:
        """K / d."""
        return _kept(self._share, dim) / dim


@final
class Quantisation(Compressor):
    """QSGD: every entry is rounded at random to one of `levels` multiples of |v| / levels.

    Alistarh et al., NeurIPS 2017 (arXiv:1610.02132), section 3.1: unbiased, with
    omega = min(d / s^2, sqrt(d) / s). Under feedback it is divided by 1 + omega, which makes it a
    contraction with alpha = 1 / (1 + omega). Levels take a fixed number of bits, where the paper
    has Elias coding.

    Args:
        levels: s, from 1 on.
    """

    def __init__(self, levels: int) -> None:
        if levels < 1:
            raise ValueError(f"levels = {levels!r}: must be at least 1")
        self._levels = levels

    def encode(
        self, base: Tensor, wanted: Tensor, draw: np.random.Generator, *, feedback: bool
    ) -> dict[str, Tensor]:
        """Write the norm of the change and the levels of its entries."""
        change, s = (wanted - base).double(), self._levels
        norm = change.square().sum().sqrt()
        where = (change.abs() / norm * s).numpy() if float(norm) > 0 else np.zeros(len(change))
        where = np.nan_to_num(where)  # the norm tells of what is not finite
        level = np.minimum(np.floor(where + draw.random(len(where))), s).astype(np.int64)
        sent = norm * self.contraction(len(change)) if feedback else norm
        signed = level * np.where(change.numpy() < 0, -1, 1)
        return codecs.levels(sent.to(wanted.dtype), s, signed)

    def contraction(self, dim: int) -> float:
        """1 / (1 + omega)."""
        s = self._levels
        return 1 / (1 + min(dim / s**2, math.sqrt(dim) / s))


@final
class Signs(Compressor):
    """Sends the sign of every entry and their mean size.

    Karimireddy et al., ICML 2019 (arXiv:1901.09847), scaled sign: C(v) = |v|_1 / d * sign(v), where
    0 counts as positive. alpha = 1 / d in the worst case.
    """

    def encode(
        self, base: Tensor, wanted: Tensor, draw: np.random.Generator, *, feedback: bool
    ) -> dict[str, Tensor]:
        """Write the mean size of the change and its signs."""
        change = wanted - base
        size = change.double().abs().sum() / max(1, len(change))
        return codecs.signs(size.to(wanted.dtype), change >= 0)

    def contraction(self, dim: int) -> float:
        """1 / d."""
        return 1 / max(1, dim)


@final
class Natural(Compressor):
    """Natural compression: every entry is rounded at random to a power of two beside it.

    Horvath et al., MSML 2022 (arXiv:1905.10988): unbiased, omega = 1/8, so that alpha = 7/8 as it
    is. Takes 9 bits of a number in float32, 12 in float64.
    """

    def encode(
        self, base: Tensor, wanted: Tensor, draw: np.random.Generator, *, feedback: bool
    ) -> dict[str, Tensor]:
        """Write signs and exponents of the change."""
        change = wanted - base
        fraction = torch.frexp(change.abs().double()).mantissa  # in [1/2, 1): 2 f - 1 is the chance
        up = torch.from_numpy(draw.random(len(change))) < 2 * fraction - 1
        return codecs.powers(change, up)

    def contraction(self, dim: int) -> float:
        """7 / 8."""
        return 7 / 8


def _not_among(key: str, *names: str) -> Idle:
    """Without effect with a compressor that is none of these."""

    def beside(table: Mapping[str, Any]) -> str | None:
        other = table["compressor"] not in names
        return f"compressor = {show(table['compressor'])}" if other else None

    return Idle((key,), beside)


# of those who take a compressor's name and the settings of all of them
IDLE = (_not_among("share", "top_k", "random_k"), _not_among("levels", "qsgd"))

COMPRESSORS = ("top_k", "random_k", "qsgd", "sign", "natural")


def compressor(name: str, *, share: float, levels: int) -> Compressor:
    """Return a compression operator by its name.

    Args:
        name: One of `COMPRESSORS`.
        share: K / d of `top_k` and `random_k`, in (0, 1].
        levels: s of `qsgd`, from 1 on.

    Raises:
        ValueError: If the name is unknown or a setting is impossible.
    """
    if name == "top_k":
        return TopK(share)
    if name == "random_k":
        return RandomK(share)
    if name == "qsgd":
        return Quantisation(levels)
    if name == "sign":
        return Signs()
    if name == "natural":
        return Natural()
    raise ValueError(f"compressor: {unknown(name, 'a compressor', COMPRESSORS)}")
