"""The surroundings of a client's model: generators, and the state of a user's objects."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fedsim.basics.generators import put_back, seed_all
from fedsim.basics.kept_state import KeptState
from fedsim.basics.rng import derived_seed


class Surroundings:
    """Makes every client begin in the same surroundings.

    Args:
        seed: The scenario's seed.
        device: Where is computed.
        kept: What a user's objects keep beside the tensors; None where only known code runs.
    """

    def __init__(self, seed: int, device: torch.device, kept: KeptState | None) -> None:
        self.seed, self.device, self.kept = seed, device, kept

    def begin(self, *place: int) -> None:
        """Put back what a user's objects keep, and seed all generators for what is done next.

        Args:
            *place: Round and client of a training; nothing for an evaluation.
        """
        own: list[Any] = []
        if self.kept is not None:
            self.kept.put_back()
            own = self.kept.generators
        seed = derived_seed(self.seed, "layers" if place else "evaluation", *place)
        seed_all(seed, cuda=self.device.type == "cuda", own=own)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Begin, and put generators back at the end; nothing where only known code runs."""
        if self.kept is None:
            yield
            return
        with self.generators_put_back():
            self.begin()
            try:
                yield
            finally:
                self.kept.put_back()

    def generators_put_back(self) -> contextlib.AbstractContextManager[None]:
        """Put all generators back to where they were."""
        return put_back(self.device if self.device.type == "cuda" else None)
