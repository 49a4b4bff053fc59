"""Augmentation of training samples whose draws are data. Needs torch alone.

The draws come from (seed, round, client, step), as dropout's noise does, and are applied to a
step's samples before the model sees them: so they are the same whichever executor, chunk or worker
trains a client, and evaluation never sees them.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import ScenarioError
from fedsim.basics.samples import SampleSpec


class Draws(NamedTuple):
    """One step's draws.

    Attributes:
        shift: int64 `[..., 2]`, from where on a crop is taken of the padded image, down and right.
        mirrored: bool `[...]`.
        noise: float32 `[..., *feature_shape]`, standard normal; None without noise.
    """

    shift: Tensor
    mirrored: Tensor
    noise: Tensor | None

    def of(self, place: int | slice | tuple[int | slice, ...]) -> "Draws":
        """Return the draws at a place of the leading dimensions."""
        noise = None if self.noise is None else self.noise[place]
        return Draws(self.shift[place], self.mirrored[place], noise)


@final
class Augmentation:
    """Random crop, then horizontal flip, then Gaussian noise.

    Args:
        crop: Pixels of zero padding on each side; a random crop of the old size is then taken;
            >= 0, and 0 does not crop.
        flip: Probability of a mirror image, in [0, 1].
        noise: Standard deviation of what is added to every feature, in the features' unit; >= 0.

    Raises:
        ScenarioError: If a value is outside its range.
    """

    def __init__(self, *, crop: int = 0, flip: float = 0.0, noise: float = 0.0) -> None:
        for name, value, holds, allowed in (
            ("crop", crop, crop >= 0, ">= 0"),
            ("flip", flip, 0 <= flip <= 1, "in [0, 1]"),
            ("noise", noise, 0 <= noise < math.inf, ">= 0 and finite"),
        ):
            if not holds:
                raise ScenarioError(f"[task] augment.{name} = {value}: must be {allowed}")
        self._crop, self._flip, self._noise = crop, flip, noise

    def check(self, spec: SampleSpec) -> None:
        """Refuse samples to which it does not apply.

        Raises:
            ScenarioError: If features are tokens, are no images and to be cropped or flipped, or
                could be cropped away.
        """
        if spec.vocabulary and (self._crop or self._flip or self._noise):
            raise ScenarioError("[task] augment: the data's features are tokens, not numbers")
        for name, value in (("crop", self._crop), ("flip", self._flip)):
            if value and len(spec.feature_shape) != 3:
                raise ScenarioError(
                    f"[task] augment.{name} = {value}: needs images (channels, height, width), the "
                    f"data's features have shape {spec.feature_shape}; only noise can be added"
                )
        side = min(spec.feature_shape[1:], default=0)
        if self._crop and self._crop >= side:
            raise ScenarioError(
                f"[task] augment.crop = {self._crop}: must be at most {side - 1}, or a crop may "
                f"hold nothing of an image of {side} pixels"
            )

    def draw(self, random: np.random.Generator, batch: int, shape: tuple[int, ...]) -> Draws:
        """Draw for one client's step, `[batch]` samples whether they are padding or not."""
        shift = random.integers(0, 2 * self._crop + 1, size=(batch, 2))
        mirrored = random.random(batch) < self._flip
        noise = random.standard_normal((batch, *shape), dtype=np.float32) if self._noise else None
        return Draws(
            torch.from_numpy(shift),
            torch.from_numpy(mirrored),
            None if noise is None else torch.from_numpy(noise),
        )

    def apply(self, features: Tensor, draws: Draws) -> Tensor:
        """Return the augmented features, `[..., *feature_shape]` as they came.

        Args:
            features: Samples with any leading dimensions.
            draws: One for each.
        """
        if self._crop or self._flip:
            features = _cropped(features, draws.shift, draws.mirrored, self._crop)
        if draws.noise is not None:
            features = features + self._noise * draws.noise.to(features.dtype)
        return features


def augmentation_of(table: Mapping[str, Any] | None, spec: SampleSpec) -> Augmentation | None:
    """Return what an `augment` table describes, or None where it does nothing.

    Raises:
        ScenarioError: If a value is impossible or does not fit the data.
    """
    if not table or not any(table.values()):
        return None
    augmentation = Augmentation(**table)
    augmentation.check(spec)
    return augmentation


def _cropped(images: Tensor, shift: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Crop and flip by picking pixels: exact, and the same on every device."""
    *lead, channels, height, width = images.shape
    flat = images.reshape(-1, channels, height, width)
    shift = shift.reshape(-1, 2) - padding
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored.reshape(-1, 1), columns.flip(0), columns) + shift[:, 1:]
    rows = torch.arange(height, device=images.device) + shift[:, :1]
    picked = flat[
        torch.arange(len(flat), device=images.device)[:, None, None, None],
        torch.arange(channels, device=images.device)[:, None, None],
        rows.clamp(0, height - 1)[:, None, :, None],
        columns.clamp(0, width - 1)[:, None, None, :],
    ]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None]
    inside = inside & ((columns >= 0) & (columns < width))[:, None, None, :]
    return torch.where(inside, picked, 0).reshape(*lead, channels, height, width)
