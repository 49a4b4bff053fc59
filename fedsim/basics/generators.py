"""The generators that user code may draw from, and their seeds. Needs torch and numpy."""

import contextlib
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedsim.basics.rng import derived_seed

OWN = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


@contextlib.contextmanager
def put_back(cuda: torch.device | None = None) -> Iterator[None]:
    """Put the generators of torch, `random` and `numpy.random` back as they were, at the end.

    They are the process's: meanwhile they are one thread's alone.

    Args:
        cuda: A GPU whose generator is put back too.
    """
    with _turns.lock:
        before = random.getstate(), np.random.get_state(legacy=False)
        with torch.random.fork_rng(devices=[] if cuda is None else [cuda]):
            try:
                yield
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])


class _Turns:
    """The lock of those who use the process's generators; a forked process has one of its own."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Forget who had the lock."""
        self.lock = threading.RLock()


_turns = _Turns()
os.register_at_fork(after_in_child=_turns.renew)


def seed_all(seed: int, *, cuda: bool = False, own: Sequence[Any] = ()) -> None:
    """Seed the generators of torch, `random` and `numpy.random`, and some of a user's own.

    Args:
        seed: What all of them start from; each of the user's own differently.
        cuda: Whether a GPU's generator is seeded too.
        own: Generators of the kinds in `OWN`, seeded in place.

    Example:
        >>> with put_back():
        ...     seed_all(3)
        ...     first = random.random()
        ...     seed_all(3)
        ...     random.random() == first
        True
    """
    # torch.manual_seed seeds every kind of device, at some milliseconds a time
    (torch.manual_seed if cuda else torch.default_generator.manual_seed)(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for place, generator in enumerate(own):
        mine = derived_seed(seed, "own generator", place)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(mine)
        elif isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            bits.state = type(bits)(mine).state
        else:
            generator.seed(mine % 2**32)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, `random` and `numpy.random` for a while, see `seed_all`."""
    with put_back():
        seed_all(seed)
        yield


def drawn_from(seed: int, own: Sequence[Any] = ()) -> list[str]:
    """Name the generators that were drawn from since `seed_all(seed, own=own)`, seeding anew."""
    now = _states(own)
    with put_back():
        seed_all(seed, own=own)
        first = _states(own)
    return [name for name in now if now[name] != first[name]]


def _states(own: Sequence[Any]) -> dict[str, Any]:
    return {
        "torch": _plain(torch.default_generator.get_state().numpy()),
        "random": random.getstate(),
        "numpy.random": _plain(np.random.get_state(legacy=False)),
        "a generator of its own": [_state(each) for each in own],
    }


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return _plain(generator.get_state().numpy())
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return generator.getstate()


def _plain(value: Any) -> Any:
    """A state as what can be compared."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return value.tobytes() if isinstance(value, np.ndarray) else value
