"""Objectives bound to what a client carries, and gradients made of functions. Needs torch alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.client.perturbation import ByFeatures, Units
from fedsim.client.procedure import Batch, Gradient, Named, Objective


@dataclass(frozen=True)
class BoundObjective:
    """An objective that depends on what the client carries, of one client or of several.

    A procedure that `stacks` may use it: several clients' objectives are computed from one row of
    `own` each.

    Attributes:
        function: `(own, outputs, targets, weights) -> scalar`, of one client.
        own: A tree of tensors, of several clients with a row each.
    """

    function: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    own: Any

    def __call__(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the objective of one client."""
        return self.function(self.own, outputs, targets, weights)


def as_bound(objective: Objective) -> BoundObjective:
    """Return an objective as one that says what it uses of a client: nothing, where it is none."""
    if isinstance(objective, BoundObjective):
        return objective
    return BoundObjective(
        lambda own, outputs, targets, weights: objective(outputs, targets, weights), {}
    )


def sum_of(found: Sequence[Objective | None]) -> Objective | None:
    """Return the sum of those functions that are there, or None."""
    penalties = [each for each in found if each is not None]
    if len(penalties) < 2:
        return penalties[0] if penalties else None
    bound = [as_bound(each) for each in penalties]

    def all_of_them(owns: Any, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        terms = [
            each.function(mine, outputs, targets, weights)
            for each, mine in zip(bound, owns, strict=True)
        ]
        return torch.stack(terms).sum(0)

    return BoundObjective(all_of_them, [each.own for each in bound])


@dataclass(frozen=True)
class GradientFunctions:
    """A `Gradient` made of its functions.

    Attributes:
        function: Loss and gradient.
        outputs: The outputs.
        representations: What goes into the last layer.
        by_features: Losses and their slope by the features.
        by_outputs: The loss's slope by the outputs.
        units: How the features were measured before they were standardised; None as they are.
    """

    function: Callable[..., tuple[Tensor, Named, Named]]
    outputs: Callable[[Named, Named, Batch], Tensor]
    representations: Callable[[Named, Named, Batch], Tensor]
    by_features: Callable[..., ByFeatures]
    by_outputs: Callable[[Tensor, Batch], Tensor]
    units: Units | None = None

    def __call__(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        objective: Objective | None = None,
        penalty: Objective | None = None,
        inner: Objective | None = None,
    ) -> tuple[Tensor, Named, Named]:
        """Return (objective, gradients by name, buffers after the forward pass)."""
        return self.function(params, buffers, batch, objective, penalty, inner)


def in_place_of(
    gradient: Gradient, function: Callable[..., tuple[Tensor, Named, Named]]
) -> GradientFunctions:
    """Return a gradient with another function for loss and gradient; all else of it stays.

    Args:
        gradient: The gradient.
        function: Takes its place; it is called with the same arguments.
    """
    return GradientFunctions(
        function,
        gradient.outputs,
        gradient.representations,
        gradient.by_features,
        gradient.by_outputs,
        gradient.units,
    )


def of_first(objective: Objective, count: int) -> Objective:
    """Return an objective of the first samples of a larger batch, bound as it was.

    Args:
        objective: Of `count` samples.
        count: How many samples of one client come first.
    """
    bound = as_bound(objective)

    def function(own: Any, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return bound.function(own, outputs[:count], targets[:count], weights[:count])

    return BoundObjective(function, bound.own)
