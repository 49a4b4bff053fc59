"""Which samples a chunk's clients take in which step, and what is drawn. Needs torch alone."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.augmentation import Augmentation, Draws
from fedsim.procedure import Work
from fedsim.rng import generator


class Schedule:
    """The steps of one chunk.

    Args:
        rows: Each slot's row numbers into the pool of samples; none for a neutral slot.
        client_ids: Each slot's client; a doubled client appears twice and draws the same numbers.
        work: How much is trained.
        shares: The share of its steps that each slot's client takes, in (0, 1], see `steps_of`;
            None lets all take the whole.
        seed: The scenario's seed.
        server_round: The round.
        device: Where indices are wanted.

    Attributes:
        num_examples: int64 `[slots]`, samples of each client.
        steps: int64 `[slots]`, steps each client takes.
        num_steps: Steps of the chunk, the most that any client takes.
        counts: int64 `[slots, num_steps]`, samples per step that are not padding.
        seen: int64 `[slots]`, samples over all steps.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        client_ids: Sequence[int],
        *,
        work: Work,
        seed: int,
        server_round: int,
        device: torch.device,
        shares: Sequence[float] | None = None,
    ) -> None:
        self._batch, self._device = work.batch_size, device
        self.num_examples = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        whole = [work.num_steps(len(r)) for r in rows]
        taken = whole if shares is None else map(steps_of, shares, whole)
        self.steps = np.array(list(taken), dtype=np.int64)
        self.num_steps = int(self.steps.max(initial=0))
        indices = np.zeros((len(rows), self.num_steps, self._batch), dtype=np.int64)
        self.counts = np.zeros((len(rows), self.num_steps), dtype=np.int64)
        drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for slot, client in enumerate(client_ids):
            steps = int(self.steps[slot])
            if steps:
                if client not in drawn:
                    random = generator(seed, "batches", server_round, client)
                    drawn[client] = _batches(rows[slot], self._batch, steps, random)
                indices[slot, :steps], self.counts[slot, :steps] = drawn[client]
        self.seen = torch.from_numpy(self.counts.sum(axis=1))
        self._indices = torch.from_numpy(indices).to(device)
        self._counts = torch.from_numpy(self.counts).to(device)
        self._position = torch.arange(self._batch, device=device)
        self._noise_sources = [generator(seed, "dropout", server_round, c) for c in client_ids]
        self._augmentation_sources: list[np.random.Generator] = []
        self._key, self._client_ids = (seed, "augmentation", server_round), client_ids

    def all_active(self, step: int) -> bool:
        """Whether every slot takes this step."""
        return bool((self.counts[:, step] > 0).all())

    def samples(self, step: int) -> Tensor:
        """Samples per slot in this step, int64 `[slots]` on the device."""
        return self._counts[:, step]

    def index(self, step: int) -> Tensor:
        """Rows of the pool, int64 `[slots, batch]`; padding repeats a sample."""
        return self._indices[:, step]

    def mask(self, step: int) -> Tensor:
        """Which of them are not padding, bool `[slots, batch]`."""
        return self._position < self._counts[:, step, None]

    def noise(
        self, shapes: Mapping[str, tuple[int, ...]], step: int, only: int | None = None
    ) -> dict[str, Tensor]:
        """Draw the uniform numbers of a step's dropout layers, `[slots, batch, *shape]` float32.

        Steps must be drawn in order: each client's numbers come from one stream.

        Args:
            shapes: Shape per sample by layer.
            step: The step.
            only: Draw for this slot alone; None draws for every slot that takes the step.
        """
        slots = len(self.steps)
        noise = {
            name: np.zeros((slots, self._batch, *shape), dtype=np.float32)
            for name, shape in shapes.items()
        }
        for slot in range(slots) if only is None else (only,):
            if step < self.steps[slot]:
                for values in noise.values():
                    self._noise_sources[slot].random(out=values[slot], dtype=np.float32)
        return {name: torch.from_numpy(values).to(self._device) for name, values in noise.items()}

    def augmentation(
        self, drawn_by: Augmentation, shape: tuple[int, ...], step: int, only: int | None = None
    ) -> Draws:
        """Draw a step's augmentation, `[slots, batch]`; with `only` that slot's, `[batch]`.

        Steps must be drawn in order: each client's numbers come from one stream.

        Args:
            drawn_by: What is drawn.
            shape: Shape of one sample.
            step: The step.
            only: Draw for this slot alone; None draws for every slot (what a slot that does not
                take the step is given is undone with it).
        """
        if not self._augmentation_sources:
            seed, purpose, server_round = self._key
            self._augmentation_sources = [
                generator(seed, purpose, server_round, client) for client in self._client_ids
            ]
        slots = range(len(self.steps)) if only is None else (only,)
        draws = [
            drawn_by.draw(self._augmentation_sources[slot], self._batch, shape) for slot in slots
        ]
        noise = [d.noise for d in draws if d.noise is not None]
        stacked = Draws(
            torch.stack([d.shift for d in draws]).to(self._device),
            torch.stack([d.mirrored for d in draws]).to(self._device),
            torch.stack(noise).to(self._device) if noise else None,
        )
        return stacked if only is None else stacked.of(0)


def steps_of(share: float, steps: int) -> int:
    """Return how many of its steps a client takes that does a share of its work: the first ones.

    Rounded up, so that whoever has steps takes one at least.

    Example:
        >>> [steps_of(share, 10) for share in (1.0, 0.7, 0.21, 0.001)], steps_of(0.5, 0)
        ([10, 7, 3, 1], 0)
    """
    # not a step more for what only the product's rounding adds (0.7 * 10 > 7)
    return min(steps, math.ceil(share * steps * (1 - 1e-12))) if share < 1 else steps


def _batches(
    rows: np.ndarray, batch: int, steps: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut reshuffled passes over `rows` into `steps` batches; padding repeats a sample."""
    indices = np.empty((steps, batch), dtype=np.int64)
    counts = np.empty(steps, dtype=np.int64)
    per_pass = -(-len(rows) // batch)
    padded = np.empty(per_pass * batch, dtype=np.int64)
    tail = len(rows) - (per_pass - 1) * batch
    for start in range(0, steps, per_pass):
        padded[: len(rows)] = random.permutation(rows)
        padded[len(rows) :] = padded[(per_pass - 1) * batch]
        take = min(per_pass, steps - start)
        indices[start : start + take] = padded.reshape(per_pass, batch)[:take]
        counts[start : start + take] = batch
        if take == per_pass:
            counts[start + per_pass - 1] = tail
    return indices, counts
