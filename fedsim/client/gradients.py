"""The loss and its gradient, of one client's batch or of many clients' under vmap."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.nn.utils.stateless import _reparametrize_module

from fedsim.client.bound import GradientFunctions
from fedsim.client.mixtures import is_mixture, outputs_of
from fedsim.client.perturbation import ByFeatures, Units
from fedsim.client.procedure import Batch, Gradient, Losses, Named, Objective


class SampleLosses(Protocol):
    """The losses of a task, as `fedsim.tasks.Task` offers them.

    One that also has `slopes`, as classification does, spares autograd's graph.
    """

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss per sample."""


class Gradients:
    """The loss of a task on a model's outputs, and its gradient in two ways, see `Gradient`.

    Args:
        model: The model; its tensors are given at each call.
        task: Has one loss per sample.
        units: How the features were measured before they were standardised; None as they are.
    """

    def __init__(self, model: nn.Module, task: SampleLosses, units: Units | None = None) -> None:
        self._model, self._task, self.units = model, task, units
        self._fixed = [n for n, p in model.named_parameters() if not p.requires_grad]

    @property
    def together(self) -> Gradient:
        """The gradient so that vmap may take many clients at once."""
        return self._with(self._functional, self._slopes, self._by_outputs)

    @property
    def alone(self) -> Gradient:
        """The gradient of one client, whose model may update its buffers in place."""
        return self._with(self._in_place, self._slopes_in_place, self._by_outputs_in_place)

    def _with(
        self,
        function: Callable[..., tuple[Tensor, Named, Named]],
        by_features: Callable[..., ByFeatures],
        by_outputs: Callable[[Tensor, Batch], Tensor],
    ) -> Gradient:
        looks = (self.outputs, self.representations)
        return GradientFunctions(function, *looks, by_features, by_outputs, self.units)

    def outputs(self, params: Named, buffers: Named, batch: Batch) -> Tensor:
        """Return the outputs on a batch, without a graph and with no buffer changed."""
        return self._looked(params, buffers, batch, reveals=False)[0]

    def representations(self, params: Named, buffers: Named, batch: Batch) -> Tensor:
        """Return what goes into the last layer, `[batch, width]`, likewise."""
        return self._looked(params, buffers, batch, reveals=True)[1]

    def _looked(
        self, params: Named, buffers: Named, batch: Batch, *, reveals: bool
    ) -> tuple[Tensor, Tensor]:
        named = {**params, **{n: b.clone() for n, b in buffers.items()}, **batch.noise}
        with torch.no_grad():
            return self._passed(named, batch, reveals=reveals)

    def _passed(self, named: Named, batch: Batch, *, reveals: bool) -> tuple[Tensor, Tensor]:
        """Return (the outputs, what goes into the last layer or the outputs again)."""
        return self._revealed(
            lambda: functional_call(self._model, named, (batch.features,)), reveals=reveals
        )

    def _revealed(self, run: Callable[[], Tensor], *, reveals: bool) -> tuple[Tensor, Tensor]:
        if not reveals:
            outputs = run()
            return outputs, outputs
        last = last_linear(self._model)
        if last is None:
            raise ValueError("the model's last module is no Linear layer")
        inside: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, given: inside.append(given[0]))
        try:
            outputs = run()
        finally:
            hook.remove()
        return outputs, inside[-1]

    def _functional(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        objective: Objective | None = None,
        penalty: Objective | None = None,
        inner: Objective | None = None,
    ) -> tuple[Tensor, Named, Named]:
        """Return (loss, gradients, buffers) so that vmap may take many clients at once."""

        def loss_of(params: Named) -> tuple[Tensor, Tensor]:
            named = {**params, **buffers, **batch.noise}
            outputs, inside = self._passed(named, batch, reveals=inner is not None)
            minimised, loss = self.loss(outputs, batch, objective, penalty)
            if inner is not None:
                minimised = minimised + inner(inside, batch.targets, batch.weights)
            return minimised, loss

        grads, (_, loss) = grad_and_value(loss_of, has_aux=True)(params)
        return loss, grads, buffers

    def _in_place(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        objective: Objective | None = None,
        penalty: Objective | None = None,
        inner: Objective | None = None,
    ) -> tuple[Tensor, Named, Named]:
        """Return (loss, gradients, buffers) of a model that may update its buffers in place.

        Raises:
            ValueError: If the model assigns a parameter anew, or makes another kind of a buffer.
        """
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        named = {**leaves, **{n: b.clone() for n, b in buffers.items()}, **batch.noise}
        held = {
            n: (named[n], named[n].data_ptr(), named[n]._version)
            for n in self._fixed
            if n in buffers
        }
        # what the model assigns anew is in `named` afterwards
        with _held(self._model, named):
            outputs, inside = self._revealed(
                lambda: self._model(batch.features), reveals=inner is not None
            )
            minimised, loss = self.loss(outputs, batch, objective, penalty)
            if inner is not None:
                minimised = minimised + inner(inside, batch.targets, batch.weights)
            slopes = torch.autograd.grad(minimised, list(leaves.values()), allow_unused=True)
        _require_still(named, held)
        after = {n: _kept_as(n, named[n], b) for n, b in buffers.items()}
        if replaced := [n for n, leaf in leaves.items() if named[n] is not leaf]:
            raise ValueError(f"the model assigns its parameter '{replaced[0]}' anew in a pass")
        grads = {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(leaves.items(), slopes, strict=True)
        }
        return loss.detach(), grads, after

    def _slopes(
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
            named = {**params, **buffers, **batch.noise}
            outputs = outputs_of(self._model, named, features)
            each = (losses or self._task.sample_losses)(outputs, batch.targets)
            return each.sum(), (outputs, each)

        with self._as(training):
            slope, (_, (outputs, each)) = grad_and_value(total, has_aux=True)(batch.features)
        return ByFeatures(outputs, each, slope)

    def _slopes_in_place(
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
        held = {} if is_mixture(named) else dict(named)
        with self._as(training), torch.enable_grad(), _held(self._model, held):
            outputs = outputs_of(self._model, named, leaf)
            each = (losses or self._task.sample_losses)(outputs, batch.targets)
            (slope,) = torch.autograd.grad(each.sum(), leaf)
        return ByFeatures(outputs.detach(), each.detach(), slope)

    def _by_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the loss's slope by outputs so that vmap may take many clients at once."""
        slope: Tensor = grad(lambda given: self.loss(given, batch, None, None)[0])(outputs)
        return slope

    def _by_outputs_in_place(self, outputs: Tensor, batch: Batch) -> Tensor:
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.loss(leaf, batch, None, None)[0], leaf)
        return slope

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


@contextlib.contextmanager
def _held(model: nn.Module, named: dict[str, Tensor]) -> Iterator[None]:
    """Have a model hold these tensors for a while; `named` has those assigned anew afterwards.

    `functional_call` does so for a forward pass alone, and activation checkpointing computes layers
    once more in the backward pass, with what they hold then.
    """
    with _reparametrize_module(model, named, tie_weights=True):
        yield


def _require_still(named: Named, held: Mapping[str, tuple[Tensor, int, int]]) -> None:
    """Refuse a model that changes its frozen parameters itself: no reply holds that.

    Raises:
        ValueError: Naming the parameter, and what to do.
    """
    for name, (tensor, place, version) in held.items():
        if (named[name] is tensor, tensor.data_ptr(), tensor._version) != (True, place, version):
            raise ValueError(
                f"the model changes its parameter '{name}' in a pass, and requires_grad is False: "
                "what becomes of it is neither sent nor kept; make it a buffer"
            )


def last_linear(model: nn.Module) -> nn.Linear | None:
    """Return the last module of a model if it is a linear layer.

    Example:
        >>> last_linear(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        Linear(in_features=3, out_features=2, bias=True)
        >>> last_linear(nn.Sequential(nn.Linear(4, 3), nn.ReLU())) is None
        True
    """
    *_, last = model.modules()
    return last if isinstance(last, nn.Linear) else None


def _kept_as(name: str, tensor: Tensor, before: Tensor) -> Tensor:
    """The new value of a buffer, which must be like the one before."""
    if tensor.shape != before.shape or tensor.dtype != before.dtype:
        raise ValueError(
            f"buffer '{name}' is {before.dtype} {list(before.shape)} before a step and "
            f"{tensor.dtype} {list(tensor.shape)} after it; it must keep dtype and shape"
        )
    return tensor.detach()
