"""The loss and its gradient, of one client's batch or of many clients' under vmap."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from fedsim.client.perturbation import Units
from fedsim.client.procedure import Batch, ByFeatures, Losses, Named, Objective


class SampleLosses(Protocol):
    """The losses of a task, as `fedsim.tasks.Task` offers them.

    One that also has `slopes`, as classification does, spares autograd's graph.
    """

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss per sample."""


@dataclass(frozen=True)
class Ways:
    """The ways to a gradient that a procedure's step is given, see `Gradient`.

    Attributes:
        by_params: Loss and gradient by the parameters.
        by_features: Losses and their slope by the features.
        units: How the features were measured before they were standardised.
    """

    by_params: Callable[..., tuple[Tensor, Named, Named]]
    by_features: Callable[..., ByFeatures]
    units: Units | None = None

    def __call__(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        objective: Objective | None = None,
        penalty: Objective | None = None,
    ) -> tuple[Tensor, Named, Named]:
        """Return (loss, gradients, buffers)."""
        return self.by_params(params, buffers, batch, objective, penalty)


class Gradients:
    """The loss of a task on a model's outputs, and its gradient in two ways.

    Args:
        model: The model; its tensors are given at each call.
        task: Has one loss per sample.
        units: How the features were measured before they were standardised; None as they are.
    """

    def __init__(self, model: nn.Module, task: SampleLosses, units: Units | None = None) -> None:
        self._model, self._task, self.units = model, task, units

    @property
    def together(self) -> Ways:
        """The ways under vmap."""
        return Ways(self.functional, self.slopes, self.units)

    @property
    def alone(self) -> Ways:
        """The ways of one client."""
        return Ways(self.in_place, self.slopes_in_place, self.units)

    def functional(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        objective: Objective | None = None,
        penalty: Objective | None = None,
    ) -> tuple[Tensor, Named, Named]:
        """Return (loss, gradients, buffers) so that vmap may take many clients at once."""

        def loss_of(params: Named) -> tuple[Tensor, Tensor]:
            outputs = functional_call(
                self._model, (params, buffers, dict(batch.noise)), (batch.features,)
            )
            return self.loss(outputs, batch, objective, penalty)

        grads, (_, loss) = grad_and_value(loss_of, has_aux=True)(params)
        return loss, grads, buffers

    def in_place(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        objective: Objective | None = None,
        penalty: Objective | None = None,
    ) -> tuple[Tensor, Named, Named]:
        """Return (loss, gradients, buffers) of a model that may update its buffers in place.

        Raises:
            ValueError: If the model assigns a parameter anew, or makes another kind of a buffer.
        """
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        named = {**leaves, **{n: b.clone() for n, b in buffers.items()}, **batch.noise}
        # what the model assigns anew is in `named` afterwards
        outputs = functional_call(self._model, named, (batch.features,))
        after = {n: _kept_as(n, named[n], b) for n, b in buffers.items()}
        if replaced := [n for n, leaf in leaves.items() if named[n] is not leaf]:
            raise ValueError(f"the model assigns its parameter '{replaced[0]}' anew in a pass")
        minimised, loss = self.loss(outputs, batch, objective, penalty)
        grads = torch.autograd.grad(minimised, list(leaves.values()), allow_unused=True)
        found = {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(leaves.items(), grads, strict=True)
        }
        return loss.detach(), found, after

    def slopes(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        losses: Losses | None = None,
        *,
        training: bool = False,
    ) -> ByFeatures:
        """Return the losses' slope by the features so that vmap may take many clients at once."""

        def total(features: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            named = (params, buffers, dict(batch.noise))
            outputs = functional_call(self._model, named, (features,))
            each = (losses or self._task.sample_losses)(outputs, batch.targets)
            return each.sum(), (outputs, each)

        with self._as(training):
            slope, (_, (outputs, each)) = grad_and_value(total, has_aux=True)(batch.features)
        return ByFeatures(outputs, each, slope)

    def slopes_in_place(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        losses: Losses | None = None,
        *,
        training: bool = False,
    ) -> ByFeatures:
        """Return the losses' slope by the features of a model that may update its buffers."""
        named = {**params, **{n: b.clone() for n, b in buffers.items()}, **batch.noise}
        leaf = batch.features.detach().requires_grad_()
        with self._as(training), torch.enable_grad():
            outputs = functional_call(self._model, named, (leaf,))
            each = (losses or self._task.sample_losses)(outputs, batch.targets)
            (slope,) = torch.autograd.grad(each.sum(), leaf)
        return ByFeatures(outputs.detach(), each.detach(), slope)

    @contextlib.contextmanager
    def _as(self, training: bool) -> Iterator[None]:
        """Have the model as in training or as in evaluation for a while."""
        before = self._model.training
        if before != training:
            self._model.train(training)
        try:
            yield
        finally:
            if before != training:
                self._model.train(before)

    def loss(
        self, outputs: Tensor, batch: Batch, objective: Objective | None, penalty: Objective | None
    ) -> tuple[Tensor, Tensor]:
        """Return (what is minimised, the objective without the penalty)."""
        if objective is not None:
            loss = objective(outputs, batch.targets, batch.weights)
        else:
            losses = self._task.sample_losses(outputs, batch.targets)
            # `where` and not a product: a padding sample's loss may be anything
            kept = torch.where(batch.weights > 0, losses, torch.zeros_like(losses))
            loss = kept.sum() / batch.weights.sum().clamp(min=1)
        if penalty is None:
            return loss, loss
        return loss + penalty(outputs, batch.targets, batch.weights), loss


def _kept_as(name: str, tensor: Tensor, before: Tensor) -> Tensor:
    """The new value of a buffer, which must be like the one before."""
    if tensor.shape != before.shape or tensor.dtype != before.dtype:
        raise ValueError(
            f"buffer '{name}' is {before.dtype} {list(before.shape)} before a step and "
            f"{tensor.dtype} {list(tensor.shape)} after it; it must keep dtype and shape"
        )
    return tensor.detach()
