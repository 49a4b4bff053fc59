"""Clients whose features differ: rotated, shifted, scaled or noisy, each in a way of its own.

The features of a client change once, after the server's test set and the local splits were drawn:
its training samples and its local test split alike. The server's test set stays as it was. What
happens to client c is a function of (seed, c).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError
from fedsim.basics.samples import SampleSpec
from fedsim.data.federated import Features, Ints

Floats = npt.NDArray[np.float32]

# what features in float32 bear
_MOST = {"feature_noise": 1e12, "feature_shift": 1e6, "feature_scale": 10.0}
_BLOCK = 4096  # samples at a time: bounds the memory that statistics of the pool take


class FeatureSkew(NamedTuple):
    """How the features of clients differ; the keys of `[partition]` of the same names.

    Attributes:
        rotation: Degrees.
        feature_noise: Variance of the last client's noise.
        feature_shift: Standard deviation of a client's shift of a feature.
        feature_scale: Standard deviation of the logarithm of a client's factor on a feature.
    """

    rotation: float | tuple[float, ...] = 0.0
    feature_noise: float = 0.0
    feature_shift: float = 0.0
    feature_scale: float = 0.0

    @property
    def active(self) -> dict[str, Any]:
        """The keys that change something, with their values."""
        return {key: value for key, value in self._asdict().items() if np.any(value)}

    def check(self, clients: int | None) -> None:
        """Refuse values that no data set can have, and a list that does not fit the clients.

        Raises:
            ScenarioError: Naming the key.
        """
        angles = self.rotation if isinstance(self.rotation, tuple) else (self.rotation,)
        for angle in angles:
            if not math.isfinite(angle):
                raise ScenarioError(f"[partition] rotation = {angle}: must be finite")
        if isinstance(self.rotation, tuple) and clients not in (None, len(angles)):
            raise ScenarioError(
                f"[partition] rotation has {len(angles)} values for {clients} clients: "
                "give one number, or one per client"
            )
        for key, most in _MOST.items():
            value = getattr(self, key)
            if not 0 <= value <= most:
                raise ScenarioError(f"[partition] {key} = {value}: must be in [0, {most:g}]")

    def check_samples(self, spec: SampleSpec) -> None:
        """Refuse data whose features cannot differ like that.

        Raises:
            ScenarioError: Naming the key.
        """
        for key in self.active:
            if spec.vocabulary:
                raise ScenarioError(
                    f"[partition] {key}: the features are tokens and not numbers; leave it out"
                )
        if np.any(self.rotation) and len(spec.feature_shape) not in (2, 3):
            raise ScenarioError(
                f"[partition] rotation = {self.rotation}: only images can be rotated, and a sample "
                f"has shape {spec.feature_shape}; leave it out"
            )


NO_SKEW = FeatureSkew()


def skewed(features: Features, offsets: Ints, rows: Ints, skew: FeatureSkew, seed: int) -> Floats:
    """Return a copy of the pool in which every client's rows are its own.

    Args:
        features: The pool, `[n, ...]`; images `[n, height, width]` or `[n, channels, height,
            width]`.
        offsets: Where each client's rows begin in `rows`, `[clients + 1]`.
        rows: The numbers of the clients' rows, client by client.
        skew: How they differ.
        seed: The scenario's seed.

    Raises:
        ScenarioError: If a client's features are no longer finite.
    """
    clients = len(offsets) - 1
    pool = np.array(features, dtype=np.float32)
    angles = rotation_angles(skew.rotation, clients)
    mean, deviation, least = _moments(pool, rows)
    for client_id in range(clients):
        mine = rows[offsets[client_id] : offsets[client_id + 1]]
        if not len(mine):
            continue
        x = pool[mine].astype(np.float64)
        if angles[client_id]:
            x = rotated(x, angles[client_id], least)
        if skew.feature_scale or skew.feature_shift:
            scale = _normal(seed, "feature scale", client_id, mean.shape) * skew.feature_scale
            shift = _normal(seed, "feature shift", client_id, mean.shape) * skew.feature_shift
            x = mean + (x - mean) * np.exp(scale) + shift * deviation
        if skew.feature_noise:
            spread = math.sqrt(skew.feature_noise * (client_id + 1) / clients)
            x = x + spread * _normal(seed, "feature noise", client_id, x.shape)
        with np.errstate(over="ignore"):  # refused below, by name
            pool[mine] = x
        if not np.isfinite(pool[mine]).all():
            keys = ", ".join(f"{key} = {value}" for key, value in skew.active.items())
            raise ScenarioError(
                f"[partition] {keys}: client {client_id}'s features are no longer finite in "
                "float32; lower it"
            )
    return pool


def rotation_angles(rotation: float | tuple[float, ...], clients: int) -> npt.NDArray[np.float64]:
    """Return each client's angle in degrees: as listed, or evenly spread over [-r, r].

    Example:
        >>> rotation_angles(30.0, 5).tolist()
        [-30.0, -15.0, 0.0, 15.0, 30.0]
    """
    if isinstance(rotation, tuple):
        return np.asarray(rotation, dtype=np.float64)
    places = 2 * np.arange(clients) - (clients - 1)
    return rotation * places / max(clients - 1, 1)


def rotated(
    images: npt.NDArray[np.float64], degrees: float, fill: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return images turned counter-clockwise around their centre, bilinearly interpolated.

    Args:
        images: `[n, height, width]` or `[n, channels, height, width]`, row 0 at the top.
        degrees: The angle.
        fill: What stands where nothing was before, `[channels, 1, 1]` or `[1, 1]`.
    """
    import torch
    from torch.nn import functional

    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # in coordinates that go from -1 to 1 along each side; where each new pixel comes from
    turn = torch.tensor(
        [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], dtype=torch.float64
    )
    above = images - fill
    stack = torch.from_numpy(above.reshape(len(images), -1, height, width))
    grid = functional.affine_grid(turn[None], [1, 1, height, width], align_corners=False)
    turned = functional.grid_sample(
        stack, grid.expand(len(stack), -1, -1, -1), padding_mode="zeros", align_corners=False
    )
    return np.asarray(turned.numpy().reshape(images.shape) + fill, dtype=np.float64)


def _moments(pool: Floats, rows: Ints) -> tuple[npt.NDArray[np.float64], ...]:
    """Mean, standard deviation and least value of each feature; of images, of each channel."""
    axes = (0, *range(1, pool.ndim)[-2:]) if pool.ndim > 2 else (0,)
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    count = len(rows) * math.prod(pool.shape[axis] for axis in axes[1:])

    def average(
        of: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    ) -> npt.NDArray[np.float64]:
        sums = (of(pool[b].astype(np.float64)).sum(axis=axes, keepdims=True) for b in blocks)
        return np.asarray(sum(sums) / count)

    least = np.minimum.reduce([pool[block].min(axis=axes, keepdims=True) for block in blocks])
    mean = average(lambda x: x)
    deviation = np.sqrt(average(lambda x: (x - mean) ** 2))
    # rounded to float32: the last bits of a long sum differ from one NumPy to another
    return tuple(
        np.asarray(statistic.astype(np.float32), dtype=np.float64)[0]
        for statistic in (mean, deviation, least)
    )


def _normal(
    seed: int, purpose: str, client_id: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    return rng.generator(seed, purpose, client_id).standard_normal(shape)
