"""Steps of gradient descent, taken as soon as their gradient is known. Needs torch alone."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.client.freezing import still_rows
from fedsim.client.procedure import Descent, Named

# (what is changed in place, its factor, the gradient's factor)
_Adding = Callable[[Tensor, float, float], None]


class Stepping(NamedTuple):
    """Takes steps in place, of one client or of several, one row each.

    A gradient that is a product is never laid down: the step is taken inside of the product. With a
    guidance of 1 the numbers are those without one, bit for bit, and with 0 nothing moves.

    Attributes:
        descent: What a step does.
        moments: By name, like the tensors; they go on in place. Empty without momentum.
        guidance: The factors by name, like the tensors; empty where none act.
        push: What is added to the gradient in every step by name, like the tensors; empty for none.
        still: The rows that do not move, by name; None is all of them.
    """

    descent: Descent
    moments: Named
    guidance: Named
    push: Mapping[str, Tensor] = MappingProxyType({})
    still: Mapping[str, Tensor | None] = MappingProxyType({})

    def at(self, step: int, epochs: np.ndarray | None) -> "Stepping":
        """Return what takes a certain step of the round.

        Args:
            step: The step.
            epochs: The epoch that each client is in then, int64 `[clients]`; None where nothing is
                frozen.
        """
        taking = self
        if self.descent.factor is not None:
            taking = taking._replace(descent=self.descent.at(step))
        if epochs is not None:
            taking = taking._replace(still=still_rows(self.descent.frozen, epochs))
        return taking

    def of(self, name: str, tensor: Tensor, gradient: Tensor) -> None:
        """Take the step of one tensor."""
        self._take(name, tensor, partial(_add, gradient))

    def of_product(self, name: str, tensor: Tensor, one: Tensor, other: Tensor) -> None:
        """Take the step of one tensor whose gradient is the product of two others."""
        self._take(name, tensor, partial(_add_product, one, other))

    def _take(self, name: str, tensor: Tensor, add: _Adding) -> None:
        if name not in self.still:
            self._step(name, tensor, add)
        elif (rows := self.still[name]) is not None:
            changed = [tensor, self.moments[name]] if self.descent.momentum else [tensor]
            before = [each[rows] for each in changed]
            self._step(name, tensor, add)
            for each, kept in zip(changed, before, strict=True):
                each[rows] = kept

    def _step(self, name: str, tensor: Tensor, add: _Adding) -> None:
        eta, decay, momentum = self.descent.step_size, self.descent.decay, self.descent.momentum
        guides_step = self.descent.guides_step
        factors, push = self.guidance.get(name), self.push.get(name)
        if not momentum:
            # eta * G * gradient, whichever of the two G is said to act on
            before = None if factors is None else tensor.clone()
            add(tensor, 1 - eta * decay, -eta)
            if push is not None:
                tensor.sub_(push, alpha=eta)
            if before is not None and factors is not None:
                torch.lerp(before, tensor, factors, out=tensor)
            return
        moment = self.moments[name]
        before = None if factors is None or guides_step else moment * momentum
        add(moment, momentum, 1.0)
        if decay:
            moment.add_(tensor, alpha=decay)
        if push is not None:
            moment.add_(push)
        if before is not None and factors is not None:
            torch.lerp(before, moment, factors, out=moment)
        taken = moment if factors is None or not guides_step else moment * factors
        tensor.sub_(taken, alpha=eta)


def _add(gradient: Tensor, changed: Tensor, kept: float, share: float) -> None:
    if kept != 1:
        changed.mul_(kept)
    changed.add_(gradient, alpha=share)


def _add_product(one: Tensor, other: Tensor, changed: Tensor, kept: float, share: float) -> None:
    product = changed.addmm_ if changed.dim() == 2 else changed.baddbmm_
    product(one, other, beta=kept, alpha=share)
