"""Randomness as a function of (seed, round, client, purpose), never of time, worker or arrival.

Every draw in fedsim comes from a counter-based generator whose key is a hash of what the draw is
for. There is no stream that lives anywhere, hence nothing to save in a checkpoint and nothing that
depends on who drew before.
"""

import hashlib

import numpy as np


def _digest(seed: int, purpose: str, key: tuple[int, ...]) -> bytes:
    text = f"fedsim|{seed}|{purpose}|{'|'.join(map(str, key))}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the generator of one purpose.

    Args:
        seed: The scenario's seed.
        purpose: What the numbers are for ("batches", "dropout", "participation", ...).
        *key: Integers that name the place, by convention (round, client) as far as they apply.

    Returns:
        A fresh Philox generator; equal arguments give equal streams on every machine.

    Example:
        >>> int(generator(1, "batches", 3, 17).integers(1000)) == int(
        ...     generator(1, "batches", 3, 17).integers(1000))
        True
    """
    words = np.frombuffer(_digest(seed, purpose, key), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=words))


def derived_seed(seed: int, purpose: str, *key: int) -> int:
    """Return a 63-bit seed for libraries that want an integer (torch's initialisers, partitioners).

    Example:
        >>> derived_seed(1, "init") == derived_seed(1, "init")
        True
    """
    return int.from_bytes(_digest(seed, purpose, key)[:8], "little") >> 1
