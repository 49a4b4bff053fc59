"""Perturbations of samples in a ball that raise a loss: PGD and FGSM. Needs torch alone.

Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018 (arXiv:1706.06083), section 2.1: PGD; Goodfellow, Shlens and Szegedy,
"Explaining and Harnessing Adversarial Examples", ICLR 2015 (arXiv:1412.6572), section 3: FGSM.

Everything is a pure function of tensors, for one client `[batch, *sample]`, for several at once
`[clients, batch, *sample]`, and under `torch.func.vmap`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least, require_choice

Norm = Literal["inf", "2"]
Attack = Literal["pgd", "fgsm"]
Look = Callable[[Tensor], tuple[Tensor, Tensor]]  # points -> (a score per sample, slope by points)

_TIE = 64  # times the dtype's precision: a coordinate of a slope that is smaller counts as 0


class ByFeatures(NamedTuple):
    """What a model makes of samples, and where their losses rise.

    Attributes:
        outputs: `[batch, ...]`.
        losses: `[batch]`.
        slope: The gradient of each sample's loss by its features, `[batch, *sample]`.
    """

    outputs: Tensor
    losses: Tensor
    slope: Tensor


class Units(NamedTuple):
    """How features were measured before they were standardised, x = mean + deviation * feature.

    Attributes:
        mean: Of the raw features; broadcasts to a sample.
        deviation: Theirs, > 0; likewise.
    """

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Ball:
    """Where a sample may be moved to, in the units of the raw features.

    Attributes:
        norm: "inf", the largest change of a feature, or "2", the Euclidean length of all changes.
        radius: rho >= 0, the largest norm of a change.
        box: The least and the largest value of a raw feature, or None. A feature that lies outside
            already is moved no further out.
        units: The raw features' mean and deviation where the model's features are standardised;
            None where they are the raw ones.
    """

    norm: Norm
    radius: float
    box: tuple[float, float] | None = None
    units: Units | None = None

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, Norm)
        require_at_least("radius", self.radius, 0)
        require_box(self.box)

    def raw(self, changes: Tensor) -> Tensor:
        """Return changes of the model's features as changes of the raw ones."""
        return changes if self.units is None else changes * self.units.deviation

    def scaled(self, changes: Tensor) -> Tensor:
        """Return changes of the raw features as changes of the model's."""
        return changes if self.units is None else changes / self.units.deviation

    def ascent(self, slope: Tensor, lead: int = 1) -> Tensor:
        """Return the raw change of norm 1 along which a loss rises most; 0 where its slope is.

        Under "inf" that is the slope's sign. A coordinate that is 0 but for rounding counts as 0,
        so that no change hangs on how a zero was rounded.

        Args:
            slope: The loss's gradient by the model's features.
            lead: Dimensions before those of a sample.
        """
        slope = self.scaled(slope)
        flat = slope.reshape(*slope.shape[:lead], -1)
        if self.norm == "inf":
            least = _TIE * torch.finfo(slope.dtype).eps * flat.abs().amax(-1, keepdim=True)
            return torch.where(flat.abs() > least, flat.sign(), 0).reshape(slope.shape)
        # by the largest first: the squares of a saturated loss's slope would all be 0
        largest = flat.abs().amax(-1, keepdim=True)
        near_one = flat / torch.where(largest > 0, largest, 1)
        length = near_one.square().sum(-1, keepdim=True).sqrt()
        return (near_one / torch.where(length > 0, length, 1)).reshape(slope.shape)

    def held(self, changes: Tensor, features: Tensor, lead: int = 1) -> Tensor:
        """Return raw changes brought back into the ball, and then into the box.

        Args:
            changes: Changes of the raw features.
            features: The model's features that are changed.
            lead: Dimensions before those of a sample.
        """
        if self.norm == "inf":
            changes = changes.clamp(-self.radius, self.radius)
        else:
            flat = changes.reshape(*changes.shape[:lead], -1)
            length = flat.square().sum(-1, keepdim=True).sqrt()
            shrunk = self.radius / torch.where(length > self.radius, length, self.radius or 1)
            changes = (flat * shrunk).reshape(changes.shape)
        if self.box is None:
            return changes
        low, high = self.box
        raw = self.raw(features)
        raw = raw if self.units is None else raw + self.units.mean
        return changes.maximum((low - raw).clamp(max=0)).minimum((high - raw).clamp(min=0))


def pgd(
    features: Tensor,
    look: Look,
    ball: Ball,
    *,
    step: float,
    steps: int,
    start: Tensor | None = None,
    lead: int = 1,
) -> Tensor:
    """Return the samples after projected gradient ascent on their losses.

    Args:
        features: The samples, `[..., *sample]`.
        look: Returns, at points like `features`, a number per sample and the slope of the losses by
            the points; the number is not used here.
        ball: Where a sample may be moved to.
        step: alpha > 0, the norm of a step, in the raw features' units.
        steps: S >= 0.
        start: Where in the ball to begin, as shares of the radius, see `starts`; None begins at the
            samples.
        lead: Dimensions before those of a sample.

    Returns:
        Points of the ball, like `features`.

    Source: Madry et al., ICLR 2018, section 2.1.

    Example:
        >>> slope = torch.tensor([[2.0, -1.0]])
        >>> ball = Ball("inf", 0.3)
        >>> pgd(torch.zeros(1, 2), lambda x: ((x * slope).sum(1), slope), ball, step=0.2, steps=2)
        tensor([[ 0.3000, -0.3000]])
    """
    changes = _begun(features, ball, start, lead)
    for _ in range(steps):
        _, slope = look(features + ball.scaled(changes))
        changes = ball.held(changes + step * ball.ascent(slope, lead), features, lead)
    return features + ball.scaled(changes)


def fgsm(features: Tensor, look: Look, ball: Ball, *, lead: int = 1) -> Tensor:
    """Return the samples after one step from themselves to the ball's border.

    Under the norm "inf" it is the fast gradient sign method, under "2" its normalised likeness.

    Args:
        features: The samples.
        look: See `pgd`.
        ball: Where a sample may be moved to.
        lead: Dimensions before those of a sample.

    Source: Goodfellow et al., ICLR 2015, section 3.
    """
    return pgd(features, look, ball, step=ball.radius, steps=1, lead=lead)


def worst(
    features: Tensor,
    look: Look,
    ball: Ball,
    *,
    step: float,
    steps: int,
    start: Tensor | None = None,
    known: Tensor | None = None,
    lead: int = 1,
) -> Tensor:
    """Return for each sample the point of the highest score that PGD comes by, itself included.

    So more steps never make it lower, nor does a larger ball whose search is given what that in a
    smaller one has found.

    Args:
        features: The samples.
        look: See `pgd`.
        ball: Where a sample may be moved to.
        step: See `pgd`.
        steps: See `pgd`.
        start: See `pgd`; None begins at the samples.
        known: Points of the ball that are looked at besides, like `features`.
        lead: Dimensions before those of a sample.
    """
    best, (highest, slope) = features, look(features)

    def better(points: Tensor, score: Tensor) -> None:
        nonlocal best, highest
        found = score > highest
        best = torch.where(found.reshape(*found.shape, *(1,) * (best.dim() - lead)), points, best)
        highest = torch.where(found, score, highest)

    if known is not None:
        better(known, look(known)[0])
    changes = _begun(features, ball, start, lead)
    if start is not None:
        points = features + ball.scaled(changes)
        score, slope = look(points)
        better(points, score)
    for _ in range(steps):
        changes = ball.held(changes + step * ball.ascent(slope, lead), features, lead)
        points = features + ball.scaled(changes)
        score, slope = look(points)
        better(points, score)
    return best


def starts(
    random: np.random.Generator, count: int, sample: tuple[int, ...], norm: Norm
) -> np.ndarray:
    """Draw points of the unit ball uniformly, float32 `[count, *sample]`.

    Args:
        random: The generator.
        count: How many.
        sample: Shape of one.
        norm: The ball's.
    """
    if norm == "inf":
        uniform: np.ndarray = random.random((count, *sample), dtype=np.float32)
        return 2 * uniform - 1
    direction = random.standard_normal((count, math.prod(sample)), dtype=np.float32)
    length = np.sqrt((direction * direction).sum(axis=1, keepdims=True))
    share = random.random((count, 1)) ** (1 / max(direction.shape[1], 1))
    inside = direction / np.maximum(length, np.finfo(np.float32).tiny) * share
    drawn: np.ndarray = inside.astype(np.float32).reshape(count, *sample)
    return drawn


def require_box(box: tuple[float, float] | None) -> None:
    """Refuse a box that holds nothing.

    Raises:
        ValueError: If it is not two numbers, the first below the second.
    """
    if box is not None and not (len(box) == 2 and -math.inf < box[0] < box[1] < math.inf):
        raise ValueError(f"box = {box!r}: must be two finite numbers, the least and the largest")


def _begun(features: Tensor, ball: Ball, start: Tensor | None, lead: int) -> Tensor:
    """The first changes."""
    if start is None:
        return torch.zeros_like(features)
    return ball.held(ball.radius * start.to(features.dtype), features, lead)
