"""The samples of a chunk's steps, taken from the pool when they are wanted. Needs torch alone."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedsim.client.batching.augmentation import Augmentation
from fedsim.client.batching.poison import PoisonedSamples
from fedsim.client.batching.schedule import Schedule
from fedsim.client.procedure import Batch, Draw, Named

NoiseShapes = Callable[[Tensor], dict[str, tuple[int, ...]]]


class Batches:
    """Batches of all slots of a chunk at once, or of one slot.

    A step's features are gathered right before they are used: they fit in a cache then, a whole
    round's do not.

    Args:
        schedule: Who takes which samples when.
        features: The pool's features, `[n, ...]`.
        targets: The pool's targets.
        dtype: What floating-point features are cast to.
        augmentation: What happens to the samples; None leaves them as they are.
        noise_shapes: Gives the shape of each dropout layer's noise for one sample.
        reuse: Whether a step's features may overwrite those of the step before.
        poisoned: Which samples are, and what becomes of them; None when none is.
        draws: What else is drawn for a step's samples, by purpose.
        known: What is known of the slots' samples, see `ClientProcedure.knows`.
        held_out: Batches of samples that these do not have, which come along; None for none.

    Attributes:
        known: See above, `[slots, ...]` by name.
        shares: What each sample counts for in its step's mean loss, `[num_steps, slots, batch]`.
    """

    def __init__(
        self,
        schedule: Schedule,
        features: Tensor,
        targets: Tensor,
        *,
        dtype: torch.dtype,
        augmentation: Augmentation | None,
        noise_shapes: NoiseShapes,
        reuse: bool = False,
        poisoned: PoisonedSamples | None = None,
        draws: Mapping[str, Draw] | None = None,
        known: Named | None = None,
        held_out: "Batches | None" = None,
    ) -> None:
        self.schedule, self.known = schedule, known or {}
        self._features, self._dtype = features, dtype
        self._augmentation, self._noise_shapes = augmentation, noise_shapes
        self._targets = targets[schedule.indices]
        self._poisoned, self._draws, self._held_out = poisoned, draws or {}, held_out
        if poisoned is not None:
            self._targets = poisoned.targets(self._targets)
        self._weights = schedule.masks.to(dtype)
        self.shares = self._weights / self._weights.sum(-1, keepdim=True).clamp(min=1)
        self._buffer: Tensor | None = None
        if reuse and features.is_contiguous():
            most = schedule.indices.shape[1] * schedule.indices.shape[2]
            self._buffer = features.new_empty((most, *features.shape[1:]))

    def together(self, step: int, count: int | None = None, *, tells_epoch: bool = True) -> Batch:
        """Return one step's samples of the first `count` slots, `[count, batch, ...]`."""
        place = (step, slice(count))
        features = self._gathered(place)
        index = self.schedule.indices[place]
        if self._augmentation is not None:
            shape = tuple(features.shape[2:])
            draws = self.schedule.augmentation(self._augmentation, shape, step, range(len(index)))
            features = self._augmentation.apply(features, draws)
        shapes = self._noise_shapes(features[0])
        noise = self.schedule.noise(shapes, step, range(len(index))) if shapes else {}
        sample = tuple(features.shape[2:])
        drawn = self.schedule.drawn(self._draws, sample, step, range(len(index)))
        return Batch(
            features,
            self._targets[step, :count],
            self._weights[step, :count],
            noise,
            drawn,
            self.schedule.epoch(step)[:count] if tells_epoch else None,
            () if self._held_out is None else self._held_out.together(step, count),
        )

    def single(self, slot: int, step: int) -> Batch:
        """Return one slot's samples of one step, without padding.

        Where it has none for this step, some are returned that weigh nothing: few models take none.
        """
        count = int(self.schedule.counts[slot, step]) or 2
        place = (step, slot, slice(0, count))
        features = self._gathered(place)
        if self._augmentation is not None:
            shape = tuple(features.shape[1:])
            draws = self.schedule.augmentation(self._augmentation, shape, step, (slot,))
            features = self._augmentation.apply(features, draws.of((0, slice(0, count))))
        shapes = self._noise_shapes(features)
        drawn = self.schedule.noise(shapes, step, (slot,)) if shapes else {}
        noise = {name: values[0, :count] for name, values in drawn.items()}
        asked = self.schedule.drawn(self._draws, tuple(features.shape[1:]), step, (slot,))
        own = {purpose: values[0, :count] for purpose, values in asked.items()}
        epoch = self.schedule.epoch(step)[slot]
        beside = () if self._held_out is None else self._held_out.single(slot, step)
        weights = self._weights[place]
        return Batch(features, self._targets[place], weights, noise, own, epoch, beside)

    def _gathered(self, place: tuple[int | slice, ...]) -> Tensor:
        index = self.schedule.indices[place]
        flat = index.reshape(-1)
        if self._buffer is None:
            rows = self._features.index_select(0, flat)
        else:
            rows = self._buffer[: len(flat)]
            torch.index_select(self._features, 0, flat, out=rows)
        features = rows.view(*index.shape, *rows.shape[1:])
        if self._poisoned is not None:
            features = self._poisoned.features(features, place)
        return features.to(self._dtype) if features.is_floating_point() else features
