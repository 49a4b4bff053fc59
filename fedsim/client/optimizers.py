"""Steps of SGD with momentum, Adam and AdamW from a gradient. Needs torch alone.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015 (arXiv:1412.6980), Algorithm
1; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (arXiv:1711.05101),
Algorithm 2. The arithmetic follows `torch.optim`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.client.arithmetic import along
from fedsim.client.procedure import Named


class LocalOptimizer(NamedTuple):
    """What a client's optimiser does with gradients, of one client or of several, a row each.

    Attributes:
        adam: Whether it is Adam or AdamW, else SGD.
        momentum: Heavy-ball momentum of SGD, in [0, 1).
        betas: Adam's decay rates of the first and second moments, each in [0, 1).
        epsilon: Adam's denominator offset; > 0.
        decay: AdamW's weight decay, which is no part of the gradient; >= 0.
        counts_each: Whether Adam counts every tensor's steps by themselves, as it must where some
            tensors take no step while others do.
    """

    adam: bool
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    decay: float = 0.0
    counts_each: bool = False

    def moments(self, params: Named) -> Named:
        """Return the moments before the first step, which are 0."""
        if not self.adam:
            return {n: torch.zeros_like(p) for n, p in params.items()} if self.momentum else {}
        first = next(iter(params.values()))
        none = torch.zeros((), dtype=first.dtype, device=first.device)
        counts = [f"steps.{n}" for n in params] if self.counts_each else ["steps"]
        zeros = {n: torch.zeros_like(p) for n, p in params.items()}
        return (
            {f"first.{n}": z for n, z in zeros.items()}
            | {f"second.{n}": z for n, z in zeros.items()}
            | dict.fromkeys(counts, none)
        )

    def owner(self, moment: str) -> str:
        """Return the name of the tensor that a moment belongs to."""
        return moment.partition(".")[2] if self.adam else moment

    def steps(
        self, grads: Named, params: Named, moments: Named, lr: float | Tensor
    ) -> tuple[Named, Named]:
        """Return (what the parameters are to be reduced by, the moments after it).

        Args:
            grads: The gradients by name.
            params: The parameters, for weight decay.
            moments: As `moments` or the step before left them.
            lr: The step size: a number, or one per client.

        Example:
            >>> sgd, one = LocalOptimizer(adam=False, momentum=0.5), {"w": torch.ones(1)}
            >>> sgd.steps(one, one, {"w": torch.ones(1)}, 0.1)
            ({'w': tensor([0.1500])}, {'w': tensor([1.5000])})
        """
        if not self.adam:
            if self.momentum:
                moments = {n: self.momentum * moments[n] + g for n, g in grads.items()}
                grads = moments
            return {n: along(lr, g) * g for n, g in grads.items()}, moments
        taken, moments = self._adam(grads, moments, lr)
        if self.decay:
            decays = {n: along(lr, p) * self.decay * p for n, p in params.items()}
            taken = {n: s + decays[n] for n, s in taken.items()}
        return taken, moments

    def _adam(self, grads: Named, moments: Named, lr: float | Tensor) -> tuple[Named, Named]:
        beta1, beta2 = self.betas
        counts = {n: steps + 1 for n, steps in moments.items() if n.partition(".")[0] == "steps"}
        scales = {n: (1 - beta1**steps, 1 - beta2**steps) for n, steps in counts.items()}
        updated, taken = dict(counts), {}
        for name, grad in grads.items():
            first_scale, second_scale = scales[f"steps.{name}" if self.counts_each else "steps"]
            first = beta1 * moments[f"first.{name}"] + (1 - beta1) * grad
            second = beta2 * moments[f"second.{name}"] + (1 - beta2) * grad * grad
            denominator = torch.sqrt(second / along(second_scale, grad)) + self.epsilon
            taken[name] = along(lr, grad) * (first / along(first_scale, grad)) / denominator
            updated[f"first.{name}"], updated[f"second.{name}"] = first, second
        return taken, updated
