"""How well a model does on samples that are moved to where it errs. Needs torch alone."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.basics.rng import generator
from fedsim.client.evaluation import Evaluation, Pool
from fedsim.client.perturbation import Attack, Ball, ByFeatures, Norm, starts, worst
from fedsim.client.procedure import Batch, Gradient

_TOGETHER = 2.5  # the length of all steps as a share of the radius, Madry et al.'s choice


@dataclass(frozen=True)
class RobustEvaluation:
    """An attack on a model that is measured, in balls of several radii.

    Attributes:
        radii: rho of each ball, in the units of the raw features; > 0.
        attack: "pgd", or "fgsm": one step of the length of the radius.
        norm: "inf" or "2".
        steps: S, steps of PGD; >= 1.
        step: alpha, the length of a step of PGD; None takes 2.5 rho / S, so that it can cross the
            ball.
        random_start: Whether PGD begins anywhere in the ball, else at the sample.
        box: The least and the largest value of a raw feature, or None.
    """

    radii: tuple[float, ...]
    attack: Attack = "pgd"
    norm: Norm = "inf"
    steps: int = 20
    step: float | None = None
    random_start: bool = False
    box: tuple[float, float] | None = None

    def measure(
        self,
        evaluation: Evaluation,
        gradient: Gradient,
        named: Mapping[str, Tensor],
        pool: Pool,
        seed: int,
    ) -> dict[str, float]:
        """Return a task's metrics on moved samples, NAME@RADIUS for each radius.

        Each sample is moved to the worst point that the search comes by: one where its class is
        taken for another before one where it is not, and of these the one of the highest loss. The
        sample itself and what was found in smaller balls are looked at too. So accuracy is at most
        that on the samples, and rises neither with the radius nor with more steps of one length.

        Args:
            evaluation: Measures the task's metrics.
            gradient: Gives losses and their slope by the features.
            named: The model's tensors.
            pool: Samples and targets, `[n, ...]`.
            seed: The scenario's seed, for the random start.
        """
        features = evaluation.cast(pool[0])
        start = self._start(features, seed)
        found: dict[str, float] = {}
        known: Tensor | None = None
        every = torch.arange(len(pool[1]), device=pool[1].device)
        for radius in sorted(self.radii):
            ball = Ball(self.norm, radius, self.box, gradient.units)
            parts = []
            for first in range(0, len(features), evaluation.batch):
                place = slice(first, first + evaluation.batch)
                parts.append(
                    worst(
                        features[place],
                        look_at(gradient, named, pool[1][place]),
                        ball,
                        step=self._step(radius),
                        steps=1 if self.attack == "fgsm" else self.steps,
                        start=None if start is None else start[place],
                        known=None if known is None else known[place],
                    )
                )
            known = torch.cat(parts) if parts else features
            measured = evaluation.one(dict(named), (known, pool[1]), every)
            found |= {at_radius(name, radius): value for name, value in measured.items()}
        return found

    def of_rows(
        self,
        evaluation: Evaluation,
        gradient: Gradient,
        named: Mapping[str, Tensor],
        pool: Pool,
        rows: Tensor,
        names: Collection[str],
        seed: int,
    ) -> dict[str, float]:
        """Return a client's metrics on its moved samples, see `measure`; nan without samples.

        Args:
            evaluation: See `measure`.
            gradient: See `measure`.
            named: See `measure`.
            pool: Samples and targets of all clients.
            rows: Which of them are the client's, int64 on the CPU.
            names: The task's metrics.
            seed: See `measure`.
        """
        if not len(rows):
            return {at_radius(n, radius): math.nan for radius in self.radii for n in names}
        mine = rows.to(pool[1].device)
        return self.measure(evaluation, gradient, named, (pool[0][mine], pool[1][mine]), seed)

    def _step(self, radius: float) -> float:
        if self.attack == "fgsm":
            return radius
        return _TOGETHER * radius / self.steps if self.step is None else self.step

    def _start(self, features: Tensor, seed: int) -> Tensor | None:
        if not self.random_start or self.attack == "fgsm":
            return None
        random = generator(seed, "robust evaluation")
        drawn = starts(random, len(features), tuple(features.shape[1:]), self.norm)
        return torch.from_numpy(drawn).to(features.device)


def at_radius(name: str, radius: float) -> str:
    """Return the name of a metric on samples that are moved so far.

    Example:
        >>> at_radius("accuracy", 0.10)
        'accuracy@0.1'
    """
    return f"{name}@{radius:g}"


def look_at(
    gradient: Gradient, named: Mapping[str, Tensor], targets: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what looks at moved samples of these targets: (how wrong each is, the losses' slope).

    Args:
        gradient: Gives losses and their slope by the features.
        named: The model's tensors.
        targets: `[n, ...]`.
    """
    weights = torch.ones(len(targets), device=targets.device)

    def look(points: Tensor) -> tuple[Tensor, Tensor]:
        batch = Batch(points, targets, weights.to(points.dtype), {})
        seen = gradient.by_features(dict(named), {}, batch)
        return _wrongness(seen, targets), seen.slope

    return look


def _wrongness(seen: ByFeatures, targets: Tensor) -> Tensor:
    """A number per sample: above 1 where its class is taken for another, and by the loss."""
    losses = seen.losses.double()
    score = losses / (1 + losses.abs())
    if seen.outputs.dim() != 2 or targets.dim() != 1 or targets.is_floating_point():
        return score
    return score + 2 * (seen.outputs.argmax(-1) != targets)
