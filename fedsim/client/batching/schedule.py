"""Which samples a chunk's clients take in which step, and what is drawn. Needs torch alone."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.rng import generator
from fedsim.client.batching.augmentation import Augmentation, Draws
from fedsim.client.procedure import Draw, Work


class Schedule:
    """The steps of one chunk.

    Args:
        rows: Each slot's row numbers into the pool of samples; none for a neutral slot.
        client_ids: Each slot's client; a doubled client appears twice and draws the same numbers.
        work: How much is trained.
        shares: The share of its steps that each slot's client takes, in (0, 1], see `steps_of`;
            None lets all take the whole.
        seed: The scenario's seed.
        server_round: The round by which all slots draw, or each one's.
        device: Where indices are wanted.
        apart: What comes before the purposes of all that is drawn, for a second schedule of the
            same clients and round.
        least_steps: Steps that there are even if no client takes so many.

    Attributes:
        num_examples: int64 `[slots]`, samples of each client; 0 where it takes no step.
        steps: int64 `[slots]`, steps each client takes.
        num_steps: Steps of the chunk, the most that any client takes, or `least_steps`.
        counts: int64 `[slots, num_steps]`, samples per step that are not padding.
        epochs: int64 `[slots, num_steps]`, which pass over its samples a client is in; 0 where it
            takes no step.
        seen: int64 `[slots]`, samples over all steps.
        indices: int64 `[num_steps, slots, batch]` on the device, rows of the pool; padding repeats
            a sample.
        masks: bool, likewise: which of them are no padding.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        client_ids: Sequence[int],
        *,
        work: Work,
        seed: int,
        server_round: int | Sequence[int],
        device: torch.device,
        shares: Sequence[float] | None = None,
        apart: str = "",
        least_steps: int = 0,
    ) -> None:
        rounds = of_each(server_round, len(client_ids))
        self._batch, self._device, self._apart = work.largest_batch, device, apart
        self.steps = steps_taken(rows, work, shares)
        trained_on = [len(r) if s else 0 for r, s in zip(rows, self.steps, strict=True)]
        self.num_examples = torch.tensor(trained_on, dtype=torch.int64)
        self.num_steps = int(self.steps.max(initial=least_steps))
        indices = np.zeros((self.num_steps, len(rows), self._batch), dtype=np.int64)
        self.counts = np.zeros((len(rows), self.num_steps), dtype=np.int64)
        self._work, self._held = work, [len(mine) for mine in rows]
        drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for slot, client in enumerate(client_ids):
            steps = int(self.steps[slot])
            if steps:
                if client not in drawn:
                    random = generator(seed, f"{apart}batches", rounds[slot], client)
                    drawn[client] = _batches(rows[slot], work, steps, random)
                indices[:steps, slot], self.counts[slot, :steps] = drawn[client]
        self.seen = torch.from_numpy(self.counts.sum(axis=1))
        self.indices = torch.from_numpy(indices).to(device)
        self._counts = torch.from_numpy(self.counts).to(device)
        position = torch.arange(self._batch, device=device)
        self.masks = position < self._counts.T[:, :, None]
        self._seed, self._rounds, self._client_ids = seed, rounds, client_ids
        self._sources: dict[tuple[str, int], np.random.Generator] = {}

    def all_active(self, step: int) -> bool:
        """Whether every slot takes this step."""
        return bool((self.counts[:, step] > 0).all())

    def computed(self, *, leaving: bool = False) -> int:
        """Samples that a model is given when the slots train together, padding included.

        Args:
            leaving: Whether clients that have finished leave, until two slots are left.
        """
        slots, steps = self.counts.shape
        active = np.maximum((self.counts > 0).sum(axis=0), 2) if leaving else slots * steps
        return int(np.sum(active)) * self._batch

    def samples(self, step: int) -> Tensor:
        """Samples per slot in this step, int64 `[slots]` on the device."""
        return self._counts[:, step]

    @cached_property
    def epochs(self) -> np.ndarray:
        """Which pass over its samples a client is in, see the class; counted when asked for."""
        found = np.zeros_like(self.counts)
        for slot, steps in enumerate(self.steps.tolist()):
            if steps:
                per_epoch, _ = self._work.batches(self._held[slot])
                found[slot, :steps] = np.arange(steps) // per_epoch
        return found

    @cached_property
    def _epochs(self) -> Tensor:
        return torch.from_numpy(self.epochs).to(self._device)

    def epoch(self, step: int) -> Tensor:
        """The epoch that each slot is in at this step, int64 `[slots]` on the device."""
        return self._epochs[:, step]

    def noise(
        self, shapes: Mapping[str, tuple[int, ...]], step: int, slots: Sequence[int]
    ) -> dict[str, Tensor]:
        """Draw the uniform numbers of a step's dropout layers, `[slots, batch, *shape]` float32.

        Steps must be drawn in order: each slot's numbers come from one stream. A slot that does not
        take the step draws nothing and gets zeros.

        Args:
            shapes: Shape per sample by layer.
            step: The step.
            slots: Whom to draw for.
        """
        noise = {
            name: np.zeros((len(slots), self._batch, *shape), dtype=np.float32)
            for name, shape in shapes.items()
        }
        for row, slot in enumerate(slots):
            if step < self.steps[slot]:
                source = self._source("dropout", slot)
                for values in noise.values():
                    source.random(out=values[row], dtype=np.float32)
        return {name: torch.from_numpy(values).to(self._device) for name, values in noise.items()}

    def augmentation(
        self, drawn_by: Augmentation, shape: tuple[int, ...], step: int, slots: Sequence[int]
    ) -> Draws:
        """Draw a step's augmentation, `[slots, batch]`.

        Steps must be drawn in order: each slot's numbers come from one stream. What a slot that
        does not take the step is given is undone with it.

        Args:
            drawn_by: What is drawn.
            shape: Shape of one sample.
            step: The step.
            slots: Whom to draw for.
        """
        draws = [
            drawn_by.draw(self._source("augmentation", slot), self._batch, shape) for slot in slots
        ]
        noise = [d.noise for d in draws if d.noise is not None]
        return Draws(
            torch.stack([d.shift for d in draws]).to(self._device),
            torch.stack([d.mirrored for d in draws]).to(self._device),
            torch.stack(noise).to(self._device) if noise else None,
        )

    def drawn(
        self,
        asked: Mapping[str, Draw],
        shape: tuple[int, ...],
        step: int,
        slots: Sequence[int],
    ) -> dict[str, Tensor]:
        """Draw what a procedure asks for, `[slots, batch, ...]` by purpose.

        Steps must be drawn in order, as those of `augmentation`.

        Args:
            asked: What is drawn, by purpose.
            shape: Shape of one sample.
            step: The step.
            slots: Whom to draw for.
        """
        seed, found = self._seed, {}
        for purpose, draw in asked.items():
            rows = []
            for slot in slots:
                client = self._client_ids[slot]
                source = (
                    generator(seed, purpose, client) if draw.once else self._source(purpose, slot)
                )
                rows.append(draw.of(source, self._batch, shape))
            found[purpose] = torch.from_numpy(np.stack(rows)).to(self._device)
        return found

    def rewind(self) -> None:
        """Let steps be drawn again from the first one on, with the same numbers."""
        self._sources.clear()

    def _source(self, purpose: str, slot: int) -> np.random.Generator:
        """The stream of a slot; a doubled client's slots have equal ones."""
        if (purpose, slot) not in self._sources:
            self._sources[purpose, slot] = generator(
                self._seed, f"{self._apart}{purpose}", self._rounds[slot], self._client_ids[slot]
            )
        return self._sources[purpose, slot]


def of_each(server_round: int | Sequence[int], slots: int) -> Sequence[int]:
    """Return each slot's round, where it is one number for all of them too."""
    return [server_round] * slots if isinstance(server_round, int) else server_round


def num_held_out(num_examples: int, share: float) -> int:
    """Return how many of its samples a client holds out: at least two, or none.

    Rounded down.

    Example:
        >>> [num_held_out(n, 0.2) for n in (4, 9, 10, 55)]
        [0, 0, 2, 11]
    """
    # not a sample less for what only the product's rounding takes away (0.29 * 100 < 29)
    held = math.floor(share * num_examples * (1 + 1e-12))
    return held if held > 1 else 0


def held_out(
    rows: np.ndarray, share: float, *, seed: int, client: int
) -> tuple[np.ndarray, np.ndarray]:
    """Part a client's rows: (those that it trains on, those that it holds out), in their order.

    Args:
        rows: Its rows.
        share: How much is held out, see `num_held_out`.
        seed: The scenario's seed.
        client: The client; the same are held out in every round.
    """
    count = num_held_out(len(rows), share)
    if not count:
        return rows, rows[:0]
    order = generator(seed, "held out", client).permutation(len(rows))
    return rows[np.sort(order[count:])], rows[np.sort(order[:count])]


def steps_taken(
    rows: Sequence[np.ndarray], work: Work, shares: Sequence[float] | None
) -> np.ndarray:
    """Return how many steps clients take, int64 `[slots]`; see `Schedule` for the arguments."""
    whole = [work.num_steps(len(r)) for r in rows]
    taken = whole if shares is None else map(steps_of, shares, whole)
    return np.array(list(taken), dtype=np.int64)


def phases(steps: np.ndarray) -> list[tuple[int, int, int]]:
    """Cut a chunk's steps into stretches of equally many active slots: (first, end, active).

    Args:
        steps: Steps of each slot, in descending order.

    Example:
        >>> phases(np.array([5, 2, 2, 0]))
        [(0, 2, 3), (2, 5, 1)]
    """
    ends = sorted({int(n) for n in steps if n})
    firsts = [0, *ends][: len(ends)]
    return [
        (first, end, int((steps >= end).sum()))
        for first, end in zip(firsts, ends, strict=True)
    ]  # fmt: skip


def steps_of(share: float, steps: int) -> int:
    """Return how many steps a client takes that does a share of its work: the first ones.

    Rounded up, so that a client with any steps takes at least one.

    Example:
        >>> [steps_of(share, 10) for share in (1.0, 0.7, 0.21, 0.001)], steps_of(0.5, 0)
        ([10, 7, 3, 1], 0)
    """
    # not a step more for what only the product's rounding adds (0.7 * 10 > 7)
    return min(steps, math.ceil(share * steps * (1 - 1e-12))) if share < 1 else steps


def _batches(
    rows: np.ndarray, work: Work, steps: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut reshuffled passes over `rows` into `steps` batches; padding repeats a sample."""
    width, batch = work.largest_batch, work.batch_size
    indices = np.empty((steps, width), dtype=np.int64)
    counts = np.empty(steps, dtype=np.int64)
    per_pass, tail = work.batches(len(rows))
    whole = per_pass - 1  # batches before the last
    for start in range(0, steps, per_pass):
        drawn = random.permutation(rows)
        take = min(per_pass, steps - start)
        full, now = min(whole, take), slice(start, start + min(whole, take))
        indices[now, :batch] = drawn[: full * batch].reshape(full, batch)
        indices[now, batch:] = indices[now, :1]
        counts[now] = batch
        if take == per_pass:
            last = start + whole
            indices[last, :tail] = drawn[whole * batch :][:tail]
            indices[last, tail:] = indices[last, 0]
            counts[last] = tail
    return indices, counts
