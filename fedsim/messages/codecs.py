"""How a compressed vector is written into few bytes, and read again. Needs torch and NumPy alone.

A reply may hold such tensors in place of the model's. A codec writes what turns a vector that both
sides have, the base, into another one. Reading it gives both sides the same bits. Numbers that need
few bits are packed: ten indices below 1,000 take 13 bytes.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Encoded = Mapping[str, Tensor]  # tensors by the codec's name and their own, "sparse.values"

# what a reply is written against: the model received, or what the strategy has of the client
MODEL, MEMORY = "model", "memory"
SINCE = "since"  # beside what is written against a memory: int32 `[1]`, the round of that memory

PLACES, VALUES = "sparse.places", "sparse.values"
NORM, STEPS, LEVELS = "levels.norm", "levels.steps", "levels.levels"
SCALE, SIGNS = "signs.scale", "signs.signs"
POWERS = "powers.powers"


class EncodingError(ValueError):
    """Tensors that no codec can have written for a vector of that length."""


def packed(codes: np.ndarray, bits: int) -> Tensor:
    """Return whole numbers below 2^bits in as few bytes as they take, lowest bits first.

    Args:
        codes: int64 `[n]`.
        bits: Of each number.

    Returns:
        uint8 `[ceil(n * bits / 8)]`.

    Example:
        >>> packed(np.array([1, 2, 3]), 4).tolist()
        [33, 3]
    """
    spread = (codes[:, None] >> np.arange(bits, dtype=np.int64)) & 1
    return torch.from_numpy(np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little"))


def unpacked(content: Tensor, count: int, bits: int) -> np.ndarray:
    """Return the numbers that `packed` wrote, int64 `[count]`.

    Raises:
        EncodingError: If there are too few bytes, or more than these numbers take.

    Example:
        >>> unpacked(torch.tensor([33, 3], dtype=torch.uint8), 3, 4).tolist()
        [1, 2, 3]
    """
    if content.dtype != torch.uint8 or tuple(content.shape) != (math.ceil(count * bits / 8),):
        raise EncodingError(
            f"{tuple(content.shape)} of {content.dtype} for {count} numbers of {bits} bits"
        )
    spread = np.unpackbits(content.numpy(), count=count * bits, bitorder="little")
    places = np.left_shift(1, np.arange(bits, dtype=np.int64))
    found: np.ndarray = spread.reshape(count, bits).astype(np.int64) @ places
    return found


def bits_for(numbers: int) -> int:
    """Return how many bits tell that many numbers apart; at least one."""
    return max(1, (numbers - 1).bit_length())


def sparse(places: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Write the entries of a vector at some places; elsewhere it is the base.

    Where all entries are written, their places are not.

    Args:
        places: int64 `[k]`, ascending.
        wanted: The vector, `[dim]`.
    """
    told = places[:0] if len(places) == len(wanted) else places
    indices = packed(told.numpy(), bits_for(len(wanted)))
    return {PLACES: indices, VALUES: wanted[places]}


def _read_sparse(base: Tensor, encoded: Encoded) -> Tensor:
    values = encoded[VALUES]
    if values.dim() != 1 or values.dtype != base.dtype or len(values) > len(base):
        raise EncodingError(f"{tuple(values.shape)} values of {values.dtype} for {len(base)}")
    told = 0 if len(values) == len(base) else len(values)
    places = unpacked(encoded[PLACES], told, bits_for(len(base)))
    if len(values) == len(base):
        return values.clone()
    if len(places) and ((np.diff(places) <= 0).any() or places[-1] >= len(base)):
        raise EncodingError(f"places are not ascending numbers below {len(base)}")
    found = base.clone()
    found[torch.from_numpy(places)] = values
    return found


def levels(norm: Tensor, steps: int, of: np.ndarray) -> dict[str, Tensor]:
    """Write the base plus `norm * level / steps` with whole levels from -steps to steps.

    Args:
        norm: A number of the vector's dtype.
        steps: s, the levels on each side of 0; >= 1.
        of: int64 `[dim]`, the levels.
    """
    codes = packed(of + steps, bits_for(2 * steps + 1))
    return {NORM: norm.reshape(1), STEPS: torch.tensor([steps], dtype=torch.int32), LEVELS: codes}


def _read_levels(base: Tensor, encoded: Encoded) -> Tensor:
    norm, steps = _number(base, encoded[NORM]), encoded[STEPS]
    if steps.dtype != torch.int32 or tuple(steps.shape) != (1,) or int(steps) < 1:
        raise EncodingError(f"{STEPS} = {steps.tolist()}: must be one whole number from 1 on")
    s = int(steps)
    codes = unpacked(encoded[LEVELS], len(base), bits_for(2 * s + 1))
    if (codes > 2 * s).any():
        raise EncodingError(f"levels beyond {s}")
    return base + norm * torch.from_numpy(codes - s).to(base.dtype) / s


def signs(scale: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """Write the base plus or minus one number everywhere.

    Args:
        scale: The number, of the vector's dtype.
        positive: bool `[dim]`, where it is added; elsewhere it is subtracted.
    """
    return {SCALE: scale.reshape(1), SIGNS: packed(positive.numpy().astype(np.int64), 1)}


def _read_signs(base: Tensor, encoded: Encoded) -> Tensor:
    scale = _number(base, encoded[SCALE])
    positive = torch.from_numpy(unpacked(encoded[SIGNS], len(base), 1) == 1)
    return base + torch.where(positive, scale, -scale)


_LEAST = {torch.float64: -1022}  # the exponent of the smallest normal number; -126 of float32
_EXPONENT_BITS = {torch.float64: 11}


def powers(vector: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Write the base plus, everywhere, a power of two with a sign, or 0.

    What is smaller than the smallest normal number of the dtype becomes 0.

    Args:
        vector: The vector whose entries lie between powers of two, `[dim]`.
        up: bool `[dim]`, where the power above is taken; elsewhere the one below.
    """
    least = _LEAST.get(vector.dtype, -126)
    fraction, exponent = torch.frexp(vector.abs())  # vector = fraction * 2^exponent, in [1/2, 1)
    power = exponent.to(torch.int64) - 1 + (up & (fraction > 0.5)).to(torch.int64)
    power = power.clamp(max=1 - least)
    there = (vector != 0) & (power >= least)
    size = torch.where(there, power - least + 1, torch.zeros_like(power)).numpy()
    negative = (vector < 0).numpy().astype(np.int64)
    return {POWERS: packed(2 * size + negative, 1 + _EXPONENT_BITS.get(vector.dtype, 8))}


def _read_powers(base: Tensor, encoded: Encoded) -> Tensor:
    bits = 1 + _EXPONENT_BITS.get(base.dtype, 8)
    codes = torch.from_numpy(unpacked(encoded[POWERS], len(base), bits))
    least = _LEAST.get(base.dtype, -126)
    if (codes > 2 * (2 - 2 * least) + 1).any():
        raise EncodingError("powers beyond the dtype's range")
    size = codes // 2
    one = torch.where(codes % 2 == 1, -1.0, 1.0).to(base.dtype)
    power = torch.ldexp(one, (size - 1 + least).to(torch.int32))
    return base + torch.where(size > 0, power, torch.zeros_like(power))


class Codec(NamedTuple):
    """One way to write a vector.

    Attributes:
        names: Of the tensors that it writes.
        read: Gives the vector from the base `[dim]` and these tensors.
    """

    names: frozenset[str]
    read: Callable[[Tensor, Encoded], Tensor]


CODECS: Mapping[str, Codec] = {
    "sparse": Codec(frozenset({PLACES, VALUES}), _read_sparse),
    "levels": Codec(frozenset({NORM, STEPS, LEVELS}), _read_levels),
    "signs": Codec(frozenset({SCALE, SIGNS}), _read_signs),
    "powers": Codec(frozenset({POWERS}), _read_powers),
}


def decoded(base: Tensor, encoded: Encoded) -> Tensor:
    """Return the vector that was written, `[dim]`.

    Args:
        base: What both sides have, `[dim]`.
        encoded: What one codec wrote.

    Raises:
        EncodingError: If no codec can have written it.
    """
    for codec in CODECS.values():
        if codec.names == encoded.keys():
            return codec.read(base, encoded)
    raise EncodingError(f"tensors {sorted(encoded)} are none that a codec writes")


def _number(base: Tensor, found: Tensor) -> Tensor:
    if tuple(found.shape) != (1,) or found.dtype != base.dtype:
        raise EncodingError(f"{tuple(found.shape)} of {found.dtype}: must be one {base.dtype}")
    return found
