"""Attacks on data: what attackers train on is not what they were given. Needs torch alone.

It happens on the device, batch by batch, so that a deployed node poisons what a simulated one does.
Who attacks when is a function of (seed, round, client); which samples, of (seed, client).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.basics import rng
from fedsim.basics.samples import SampleSpec
from fedsim.client.batching.schedule import of_each


class Effect(Protocol):
    """What happens to poisoned samples; pure, on batches of any shape."""

    @property
    def share(self) -> float:
        """Which share of an attacker's samples is poisoned, in (0, 1]."""

    def check(self, spec: SampleSpec) -> None:
        """Refuse samples that it is not made for.

        Raises:
            ValueError: Naming the key.
        """

    def targets(self, targets: Tensor, spec: SampleSpec) -> Tensor:
        """Return what the targets become."""

    def features(self, features: Tensor, spec: SampleSpec) -> Tensor:
        """Return what the features become, `[..., *spec.feature_shape]`."""


@dataclass(frozen=True)
class FlippedLabels:
    """Targets that are another class.

    Attributes:
        source: The class whose samples get a wrong target; None takes all classes.
        target: The class that they get; None takes C - 1 minus their own.
    """

    source: int | None = None
    target: int | None = None
    share: float = 1.0

    def check(self, spec: SampleSpec) -> None:
        """Refuse targets that are no classes, classes not there, and flips that change nothing."""
        _require_classes(spec, source=self.source, target=self.target)
        if self.source is None:
            return
        mirrored = spec.num_classes - 1 - self.source
        target = mirrored if self.target is None else self.target
        if target == self.source:
            given = "" if self.target is None else f" with target = {self.target}"
            raise ValueError(
                f"source = {self.source}{given}: its samples keep their class; give another target"
            )

    def targets(self, targets: Tensor, spec: SampleSpec) -> Tensor:
        """Return the wrong targets."""
        wrong = spec.num_classes - 1 - targets
        if self.target is not None:
            wrong = torch.full_like(targets, self.target)
        return wrong if self.source is None else torch.where(targets == self.source, wrong, targets)

    def features(self, features: Tensor, spec: SampleSpec) -> Tensor:
        """Return the features as they are."""
        return features


@dataclass(frozen=True)
class Trigger:
    """A pattern in the features, and one target for all samples that have it.

    Attributes:
        target: The class.
        size: Of the pattern: the last so many rows and columns of a picture, in all its channels,
            or the last so many numbers of a vector.
        value: What the features are there.
        share: Which share of an attacker's samples is poisoned, in (0, 1].
    """

    target: int = 0
    size: int = 2
    value: float = 1.0
    share: float = 0.5

    def check(self, spec: SampleSpec) -> None:
        """Refuse what has no classes, tokens, and a pattern larger than the sample."""
        _require_classes(spec, target=self.target)
        if spec.vocabulary:
            raise ValueError("kind = 'backdoor': a pattern needs numbers, and features are tokens")
        side = min(spec.feature_shape[-2:], default=0)
        if self.size > side:
            raise ValueError(f"size = {self.size}: must be in 1..{side}, for a sample has no more")

    def targets(self, targets: Tensor, spec: SampleSpec) -> Tensor:
        """Return the target of the pattern."""
        return torch.full_like(targets, self.target)

    def features(self, features: Tensor, spec: SampleSpec) -> Tensor:
        """Return the features with the pattern."""
        stamped = features.clone()
        last = slice(-self.size, None)
        if len(spec.feature_shape) == 1:
            stamped[..., last] = self.value
        else:
            stamped[..., last, last] = self.value
        return stamped


@dataclass(frozen=True)
class Poison:
    """What attackers do to the samples that they train on.

    Attributes:
        effect: What happens to poisoned samples.
        attackers: Returns who attacks in a round.
        spec: What samples are.
        seed: The scenario's seed.
    """

    effect: Effect
    attackers: Callable[[int], Collection[int]]
    spec: SampleSpec
    seed: int

    def of(
        self, server_round: int | Sequence[int], clients: Sequence[int], rows: Sequence[np.ndarray],
        indices: Tensor,
    ) -> "PoisonedSamples | None":  # fmt: skip
        """Return which samples of a chunk are poisoned; None when none is.

        Args:
            server_round: The round of all slots, or each one's; nobody attacks a set-up exchange,
                round 0.
            clients: The client of each slot.
            rows: The rows of the pool that are each slot's.
            indices: int64 `[steps, slots, batch]`, rows of the pool.
        """
        rounds = of_each(server_round, len(clients))
        attacking = {r: set(self.attackers(r)) if r else set() for r in set(rounds)}
        where = torch.zeros(indices.shape, dtype=torch.bool)
        for slot, (client, mine) in enumerate(zip(clients, rows, strict=True)):
            if client in attacking[rounds[slot]]:
                draw = rng.generator(self.seed, "poisoned samples", client)
                chosen = np.asarray(mine)[draw.random(len(mine)) < self.effect.share]
                found = np.isin(indices[:, slot].cpu().numpy(), chosen)
                where[:, slot] = torch.from_numpy(found)
        if not where.any():
            return None
        return PoisonedSamples(self.effect, self.spec, where.to(indices.device))


@dataclass(frozen=True)
class PoisonedSamples:
    """Poisoned samples among those of a chunk's steps.

    Attributes:
        effect: What happens to them.
        spec: What samples are.
        where: bool `[steps, slots, batch]`, which they are.
    """

    effect: Effect
    spec: SampleSpec
    where: Tensor

    def targets(self, targets: Tensor) -> Tensor:
        """Return all steps' targets, `[steps, slots, batch]`."""
        return torch.where(self.where, self.effect.targets(targets, self.spec), targets)

    def features(self, features: Tensor, place: tuple[int | slice, ...]) -> Tensor:
        """Return the features of a place in `where`."""
        where = self.where[place]
        if not where.any():
            return features
        where = where.view(*where.shape, *(1,) * len(self.spec.feature_shape))
        return torch.where(where, self.effect.features(features, self.spec), features)


def _require_classes(spec: SampleSpec, **classes: int | None) -> None:
    if not spec.has_classes:
        raise ValueError("kind: the attack needs targets that are classes, and these are numbers")
    for key, value in classes.items():
        if value is not None and not 0 <= value < spec.num_classes:
            raise ValueError(f"{key} = {value}: must be in 0..{spec.num_classes - 1}, the classes")
