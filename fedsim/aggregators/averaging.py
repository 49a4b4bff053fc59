"""The average of a tensor and its neighbours', plain and with its variance kept. Torch alone.

What a node of a gossip protocol makes of one tensor; `fedsim.strategy.gossip` moves whole models.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from fedsim.aggregators.sums import weighted_sum
from fedsim.basics.errors import require_choice

Target = Literal["received", "all"]


def variance(values: Tensor) -> Tensor:
    """Return the population variance of all entries, a float64 scalar."""
    values = values.double()
    return (values - values.mean()).square().mean()


def rescale(mix: Tensor, target: float) -> Tensor:
    """Return `mix` stretched about its mean to a variance of `target`, in float64.

    It stays as it is when it has one element, or next to no variance of its own (1e-12 of the
    target: what averaging has cancelled is not there to be stretched), or one that is not finite.
    """
    mix = mix.double()
    about = mix - mix.mean()
    own = float(about.square().mean())
    if mix.numel() == 1 or not math.isfinite(own + target) or own <= 1e-12 * max(target, 1e-30):
        return mix
    # in this form a factor of 1 changes no bit
    return mix + (math.sqrt(target / own) - 1) * about


def plain_average(
    own: Tensor, received: Tensor, *, self_weight: float = 0.5, weights: Tensor | None = None
) -> Tensor:
    """Return beta own + (1 - beta) mean(received); see `variance_corrected_average`."""
    mix, _ = _mixed(own, received, self_weight, weights)
    return mix.reshape(own.shape).to(own.dtype)


def variance_corrected_average(
    own: Tensor,
    received: Tensor,
    *,
    self_weight: float = 0.5,
    weights: Tensor | None = None,
    target: Target = "received",
    target_scale: float = 1.0,
) -> Tensor:
    """Return the average of a tensor and its neighbours', with the variance that they have.

    mix = beta own + (1 - beta) mean(received), stretched about its mean until its variance is the
    mean of theirs. Computed in float64 and rounded once.

    Args:
        own: The node's own tensor, `[...]`, floating point.
        received: Its neighbours', `[neighbours, ...]`; those that hold NaN or infinity are
            discarded.
        self_weight: beta, in [0, 1].
        weights: `[neighbours]`, of the received among each other; >= 0, alike if None.
        target: Whose mean variance: that of "received" (the authors' code), or of "all", own
            included with its weight; then the factor is never below 1.
        target_scale: Factor on that variance; anything but 1 compounds from round to round.

    Returns:
        `[...]`, in the dtype and on the device of `own`; `own` itself when nothing is left to
        average.

    Raises:
        TypeError: If `own` is not floating point.
        ValueError: If shapes do not fit, weights are negative, or `target` is neither of its two.

    Example:
        >>> own = torch.tensor([1.0, -1.0, 0.0, 0.0])
        >>> variance_corrected_average(own, torch.tensor([[0.0, 0.0, 1.0, -1.0]]))
        tensor([ 0.7071, -0.7071,  0.7071, -0.7071])
    """
    require_choice("target", target, Target)
    mix, (rows, shares) = _mixed(own, received, self_weight, weights)
    if len(rows):
        variances = torch.stack([variance(row) for row in rows])
        mean = _mean(shares, variances[:, None], variances[:1])
        tau = target_variance(variance(own), mean, self_weight, target)
        mix = rescale(mix, target_scale * float(tau))
    return mix.reshape(own.shape).to(own.dtype)


def target_variance(own: Tensor, received: Tensor, self_weight: float, target: Target) -> Tensor:
    """Return tau: the received variances' mean, or that of all with the weights of the mix."""
    return received if target == "received" else received + self_weight * (own - received)


def _mixed(
    own: Tensor, received: Tensor, self_weight: float, weights: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The mix, float64 `[dim]`, and the rows that it is made of with their shares."""
    if not own.is_floating_point():
        raise TypeError(f"own has dtype {own.dtype}: only floating-point tensors are averaged")
    if received.shape[1:] != own.shape:
        raise ValueError(
            f"received has shape {tuple(received.shape)}: must be [neighbours, "
            f"{', '.join(map(str, own.shape))}]"
        )
    rows, flat = received.reshape(len(received), own.numel()), own.reshape(-1)
    shares = torch.ones(len(rows)).double() if weights is None else weights.double().cpu()
    if shares.shape != (len(rows),) or (shares < 0).any():
        raise ValueError(f"weights = {shares.tolist()}: must be >= 0, one per neighbour")
    keep = torch.isfinite(rows).all(dim=1).cpu() & (shares > 0)
    rows, shares = rows[keep.to(rows.device)], shares[keep]
    shares = shares / shares.sum()
    return flat.double() + (1 - self_weight) * weighted_sum(shares, rows, flat), (rows, shares)


def _mean(shares: Tensor, rows: Tensor, reference: Tensor) -> Tensor:
    """The weighted mean of rows, taken from a reference so that equal rows give it exactly."""
    return reference.double() + weighted_sum(shares, rows, reference)
