"""Training of a chunk whose model is a chain of known layers, without autograd or `torch.func`.

Dense chains train all clients of a chunk together, each layer one batched product. The clients are
in descending order of their steps. In a descent a client that has finished leaves the products:
there is no padding but that of a client's own last batch; other steps keep the chunk's shape, and
large models take them one client after another. So do chains with convolutions, in the memory
format in which convolutions are fastest.

The bits of a product of at least two matrices depend neither on how many there are nor on their
place (a test holds torch to it), so in a descent a client's bits depend on nothing but itself; a
last client that goes on alone is doubled. Under other steps they depend on the number of slots
besides, as under vmap.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from fedsim.client.batching.batches import Batches
from fedsim.client.batching.schedule import phases
from fedsim.client.bound import BoundObjective, GradientFunctions, as_bound
from fedsim.client.chains.chain import Chain
from fedsim.client.chains.stepping import Stepping
from fedsim.client.gradients import SampleLosses
from fedsim.client.perturbation import ByFeatures, Units
from fedsim.client.procedure import (
    Batch,
    Carry,
    ClientProcedure,
    Gradient,
    Losses,
    Named,
    Objective,
)

Loss = Callable[[Tensor, Batch, Objective | None, Objective | None], tuple[Tensor, Tensor]]


class ChainTraining:
    """Trains clients of one model with one procedure.

    Args:
        chain: The model.
        task: Its losses.
        procedure: Local training.
        loss: Gives (what is minimised, the objective without the penalty) of one client.
        units: How the features were measured before they were standardised; None as they are.
    """

    def __init__(
        self,
        chain: Chain,
        task: SampleLosses,
        procedure: ClientProcedure,
        loss: Loss,
        units: Units | None = None,
    ) -> None:
        self.chain, self._task, self._procedure, self._loss = chain, task, procedure, loss
        self._units = units

    # --- several clients at once ----------------------------------------------------------

    def descend_together(self, params: Named, batches: Batches, stepping: Stepping) -> np.ndarray:
        """Train by gradient descent, in place; returns each slot's sum of losses, float64.

        Args:
            params: `[slots, ...]`, at least two, in descending order of their steps. Contiguous
                tensors let a product take all slots at once.
            batches: The slots' batches.
            stepping: Takes the steps, its tensors likewise.
        """
        schedule = batches.schedule
        losses = torch.zeros(batches.shares.shape, dtype=batches.shares.dtype)
        for first, end, active in phases(schedule.steps):
            mine, moments, guidance, push = (
                _first(named, active)
                for named in (params, stepping.moments, stepping.guidance, stepping.push)
            )
            taking = stepping._replace(moments=moments, guidance=guidance, push=push)
            for step in range(first, end):
                batch = _doubled(batches.together(step, active, tells_epoch=False))
                shares = batches.shares[step, :active].expand(len(batch.weights), -1)
                outputs, kept = self.chain.forward(mine, batch.features, batch.noise)
                found, slope = self._slopes(outputs, batch.targets, shares)
                epochs = schedule.epochs[:active, step] if stepping.descent.frozen else None
                self.chain.backward(slope, kept, mine, taking.at(step, epochs))
                losses[step, :active] = found[:active]
            if active == 1:
                for whole, part in ((params, mine), (stepping.moments, moments)):
                    for name, tensor in whole.items():
                        tensor[:1] = part[name][:1]
        return _sums(_means(losses, batches.shares), schedule.counts)

    def step_together(
        self, carry: Carry, batches: Batches, server_round: int
    ) -> tuple[Carry, np.ndarray]:
        """Train by the procedure's own steps; returns (carry, each slot's sum of losses).

        The chunk keeps its shape and steps that a slot does not take are undone: reductions over
        the slots' tensors, such as a norm for clipping, have other bits for other numbers of rows.

        Args:
            carry: From `begin`, `[slots, ...]`, at least two, in descending order of their steps.
            batches: The slots' batches.
            server_round: The round.
        """
        schedule = batches.schedule
        losses = torch.zeros(schedule.counts.T.shape, dtype=torch.float64)
        for step in range(schedule.num_steps):
            moved, loss = self._procedure.step(
                carry, batches.together(step), self.gradient, server_round=server_round
            )
            losses[step] = loss
            active = torch.from_numpy(schedule.counts[:, step] > 0)
            carry = moved if schedule.all_active(step) else _kept(active, moved, carry)
        # what stands where nobody took a step may be anything
        losses = torch.where(torch.from_numpy(schedule.counts.T > 0), losses, 0.0)
        return carry, _sums(losses, schedule.counts)

    # --- one client -----------------------------------------------------------------------

    def descend_alone(
        self, params: Named, batches: Batches, slot: int, stepping: Stepping
    ) -> float:
        """Train one client by gradient descent, in place; returns its sum of losses."""
        schedule = batches.schedule
        every = batches.shares[:, slot : slot + 1]
        losses = torch.zeros(every.shape, dtype=every.dtype)
        for step in range(int(schedule.steps[slot])):
            batch = batches.single(slot, step)
            count = len(batch.targets)
            shares = every[step, 0, :count]
            outputs, kept = self.chain.forward(params, self._fast(batch.features), batch.noise)
            losses[step, 0, :count], slope = self._slopes(outputs, batch.targets, shares)
            epochs = schedule.epochs[slot : slot + 1, step] if stepping.descent.frozen else None
            self.chain.backward(slope, kept, params, stepping.at(step, epochs))
        return float(_sums(_means(losses, every), schedule.counts[slot : slot + 1])[0])

    # --- gradients ------------------------------------------------------------------------

    @property
    def gradient(self) -> Gradient:
        """The gradient for a procedure's step, of one client or of several."""
        return GradientFunctions(
            self._by_params,
            self._outputs,
            self._representations,
            self._by_features,
            self._by_outputs,
            self._units,
        )

    def _by_params(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        objective: Objective | None = None,
        penalty: Objective | None = None,
        inner: Objective | None = None,
    ) -> tuple[Tensor, Named, Named]:
        outputs, kept = self._passed(self.chain, params, batch)
        loss, slope = self._slope(outputs, batch, objective, penalty)
        within = None
        if inner is not None:
            within = _slope_of(inner, self.chain.representations(kept), batch)
        grads: Named = {}
        with torch.no_grad():
            self.chain.backward(slope, kept, params, grads, within)
        return loss, {name: grads[name] for name in params}, buffers

    def _outputs(self, params: Named, buffers: Named, batch: Batch) -> Tensor:
        return self._passed(self.chain, params, batch)[0]

    def _representations(self, params: Named, buffers: Named, batch: Batch) -> Tensor:
        return self.chain.representations(self._passed(self.chain, params, batch)[1])

    def _by_features(
        self,
        params: Named,
        buffers: Named,
        batch: Batch,
        losses: Losses | None = None,
        *,
        training: bool = False,
    ) -> ByFeatures:
        chain = self.chain if training else self.chain.in_evaluation()
        outputs, kept = self._passed(chain, params, batch)
        if losses is None:
            each, slope = self._slopes(outputs, batch.targets, torch.ones_like(batch.weights))
        else:
            leaf = outputs.detach().requires_grad_()
            with torch.enable_grad():
                each = losses(leaf, batch.targets)
                (slope,) = torch.autograd.grad(each.sum(), leaf)
        with torch.no_grad():
            # convolutions leave their own order in memory
            by_features = chain.slope(slope, kept, params).contiguous()
        return ByFeatures(outputs, each.detach(), by_features)

    def _by_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._slope(outputs, batch, None, None)[1]

    def _passed(self, chain: Chain, params: Named, batch: Batch) -> tuple[Tensor, list[Any]]:
        """Return (the outputs, what the pass back needs); the batch stays as it is."""
        features = batch.features.clone() if chain.spoils else batch.features
        with torch.no_grad():
            return chain.forward(params, self._fast(features), batch.noise)

    def _slope(
        self,
        outputs: Tensor,
        batch: Batch,
        objective: Objective | None,
        penalty: Objective | None,
    ) -> tuple[Tensor, Tensor]:
        """Return (the objective, the gradient of what is minimised by the outputs)."""
        if objective is None and penalty is None:
            shares = batch.weights / batch.weights.sum(-1, keepdim=True).clamp(min=1)
            return self._mean_slope(outputs, batch.targets, shares)
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            if batch.weights.dim() == 2:
                given = [None if each is None else as_bound(each) for each in (objective, penalty)]

                def of_one(outputs: Tensor, targets: Tensor, weights: Tensor, owns: Any) -> Any:
                    one = Batch(batch.features, targets, weights, {})
                    terms = [
                        None if each is None else BoundObjective(each.function, own)
                        for each, own in zip(given, owns, strict=True)
                    ]
                    return self._loss(outputs, one, *terms)

                owns = [{} if each is None else each.own for each in given]
                minimised, loss = vmap(of_one)(leaf, batch.targets, batch.weights, owns)
            else:
                minimised, loss = self._loss(leaf, batch, objective, penalty)
            (slope,) = torch.autograd.grad(minimised.sum(), leaf)
        return loss.detach(), slope

    def _mean_slope(
        self, outputs: Tensor, targets: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (the task's mean loss, its gradient by the outputs).

        Args:
            outputs: The model's outputs.
            targets: The samples' targets.
            shares: What each sample counts for in the mean; 0 for padding.
        """
        losses, slope = self._slopes(outputs, targets, shares)
        return _means(losses, shares), slope

    def _slopes(self, outputs: Tensor, targets: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Return (each sample's loss, the gradient of their weighted sum by the outputs).

        Args:
            outputs: The model's outputs, `[batch, ...]`, or `[clients, batch, ...]`.
            targets: The samples' targets.
            shares: What each sample counts for, `[batch]` or `[clients, batch]`.
        """
        own = getattr(self._task, "slopes", None)
        found: tuple[Tensor, Tensor] | None = None if own is None else own(outputs, targets, shares)
        if found is not None:
            return found
        leaf = outputs.detach().requires_grad_()
        several = shares.dim() == 2
        with torch.enable_grad():
            losses = self._task.sample_losses(
                leaf.flatten(0, 1) if several else leaf,
                targets.flatten(0, 1) if several else targets,
            ).view(shares.shape)
            # a scalar: what autograd is told of anything else makes it load a second of modules
            (slope,) = torch.autograd.grad((losses * shares).sum(), leaf)
        return losses.detach(), slope

    def _fast(self, features: Tensor) -> Tensor:
        """The features in the memory format in which convolutions are fastest."""
        if not self.chain.convolves or features.dim() != 4:
            return features
        batch, channels, height, width = features.shape
        if channels == 1:
            # strides that torch takes for that format: one channel alone would be of either, and
            # all layers above would be of the slower one
            flat = features.contiguous()
            return flat.as_strided((batch, 1, height, width), (height * width, 1, width, 1))
        return features.contiguous(memory_format=torch.channels_last)


def _slope_of(function: Objective, values: Tensor, batch: Batch) -> Tensor:
    """Return a function's gradient by the values that it is of, of one client's or of several."""
    leaf = values.detach().requires_grad_()
    with torch.enable_grad():
        if batch.weights.dim() == 2:
            bound = as_bound(function)
            found = vmap(bound.function)(bound.own, leaf, batch.targets, batch.weights)
        else:
            found = function(leaf, batch.targets, batch.weights)
        (slope,) = torch.autograd.grad(found.sum(), leaf)
    return slope


def owned(named: Named) -> Named:
    """Return copies that may be changed, in the memory format in which they are fastest."""
    return {
        name: torch.empty_like(
            tensor,
            memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format,
        ).copy_(tensor)
        for name, tensor in named.items()
    }


def _first(named: Mapping[str, Tensor], count: int) -> Named:
    """The rows of the first slots; a lone one is copied and doubled."""
    if count == 1:
        return {name: tensor[:1].repeat_interleave(2, 0) for name, tensor in named.items()}
    return {name: tensor[:count] for name, tensor in named.items()}


def _doubled(batch: Batch) -> Batch:
    """The batch of two equal clients where there is one."""
    if len(batch.weights) > 1:
        return batch
    twice = [tensor.repeat_interleave(2, 0) for tensor in batch[:3]]
    noise: Mapping[str, Tensor] = {n: t.repeat_interleave(2, 0) for n, t in batch.noise.items()}
    return Batch(twice[0], twice[1], twice[2], noise)


def _kept(active: Tensor, moved: Carry, carry: Carry) -> Carry:
    """The rows of `moved` that took the step, the others as they were."""

    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(active.view(-1, *(1,) * (new.dim() - 1)), new, old)

    kept: Carry = pytree.tree_map(pick, moved, carry)
    return kept


def _means(losses: Tensor, shares: Tensor) -> Tensor:
    """Return each step's mean loss; the samples are along the last axis."""
    # `where` and not a product: a padding sample's loss may be anything
    return (torch.where(shares > 0, losses, 0) * shares).sum(-1)


def _sums(losses: Tensor, counts: np.ndarray) -> np.ndarray:
    """Sum `[steps, slots]` losses times samples in order of the steps: trailing zeros are exact."""
    if not len(losses):
        return np.zeros(len(counts))
    total: np.ndarray = np.cumsum(losses.numpy() * counts.T, axis=0)[-1]
    return total
