"""Adversarial training: a client learns from samples that are moved to where its loss is higher.

Li, Song and Yang, "Federated Adversarial Learning: A Framework with Convergence Analysis", ICML
2023 (arXiv:2208.03635), Algorithm 1: in every local step an adversary moves each sample in a ball
of radius rho, and the step descends the loss of the moved samples, which are constants in it. The
paper allows any adversary; here it is PGD (Madry et al., arXiv:1706.06083) or FGSM (Goodfellow et
al., arXiv:1412.6572). "trades" is Zhang et al., "Theoretically Principled Trade-off between
Robustness and Accuracy", ICML 2019 (arXiv:1901.08573), equation 5 and Algorithm 1.

Symbols: rho radius, alpha step, S steps, beta beta, lambda share_adversarial.

Deviations:
- The step's own batch is attacked; the listing keeps a set that grows over the local steps.
- TRADES begins anywhere in the ball, as PGD does; the authors' code begins within 0.001 of the
  sample. BatchNorm sees both kinds of samples at once in a step of TRADES.
- A coordinate of the slope that is 0 but for rounding moves nothing, see `Ball.ascent`.
- Where data are standardised, radius, step and box are in the units of the raw features.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_at_least, require_choice, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.client.bound import in_place_of, of_first, sum_of
from fedsim.client.part import ClientPart, Own
from fedsim.client.perturbation import (
    Attack,
    Ball,
    ByFeatures,
    Norm,
    fgsm,
    pgd,
    require_box,
    starts,
)
from fedsim.client.procedure import Batch, Draw, Gradient, Losses, Named, Objective

Loss = Literal["adversarial", "trades", "mixed"]
Statistics = Literal["kept", "batch"]
START, CLIENTS = "adversarial start", "adversarial clients"  # purposes of what is drawn


def _not(key: str, value: str) -> Callable[[Mapping[str, Any]], str | None]:
    return lambda table: None if table[key] == value else f'{key} = "{table[key]}"'


@final
class Adversarial(ClientPart):
    """Trains on samples moved within a ball to where the client's own model errs most.

    Args:
        attack: How samples are moved: "pgd" ascends in several steps, "fgsm" in one of the length
            of the radius.
        norm: Of the ball: "inf", the largest change of a feature, or "2", the Euclidean length.
        radius: rho, in the units of the raw features; >= 0, and 0 is plain training.
        step: alpha, the length of a step of PGD in that norm; > 0.
        steps: S, steps of PGD; >= 0, and 0 is plain training.
        random_start: Whether PGD begins anywhere in the ball, else at the sample.
        box: The least and the largest value that a raw feature may have, such as (0, 1) for images;
            None sets no bounds.
        loss: What a step descends: the loss of the moved samples ("adversarial"), that of the
            samples plus beta times the Kullback-Leibler divergence between the outputs of both
            ("trades", which also ascends this divergence), or both losses together ("mixed").
        beta: beta of "trades"; >= 0.
        share_adversarial: lambda of "mixed", the weight of the moved samples' loss; in [0, 1].
        statistics: What BatchNorm does while samples are moved: it goes by its statistics, as in
            evaluation and without dropout ("kept"), or by those of the samples, with the step's
            dropout ("batch"). Neither moves the statistics; the step itself does.
        share: Share of clients that train so, in [0, 1]; which, each draws once from the seed.

    Raises:
        ValueError: If an argument is outside its range, or "trades" begins at the sample.
    """

    stacks = True
    idle = (
        Idle(("step", "steps", "random_start"), at("attack", "fgsm")),
        Idle(("beta",), _not("loss", "trades")),
        Idle(("share_adversarial",), _not("loss", "mixed")),
        *(
            Idle(("attack", "norm", "step", "steps", "random_start", "box", "loss"), at(name, 0))
            for name in ("radius", "share")
        ),
    )

    def __init__(
        self,
        *,
        attack: Attack = "pgd",
        norm: Norm = "inf",
        radius: float = 0.1,
        step: float = 0.025,
        steps: int = 7,
        random_start: bool = True,
        box: tuple[float, float] | None = None,
        loss: Loss = "adversarial",
        beta: float = 6.0,
        share_adversarial: float = 0.5,
        statistics: Statistics = "kept",
        share: float = 1.0,
    ) -> None:
        for name, text, choices in (
            ("attack", attack, Attack),
            ("norm", norm, Norm),
            ("loss", loss, Loss),
            ("statistics", statistics, Statistics),
        ):
            require_choice(name, text, choices)
        for name, number in (("radius", radius), ("steps", steps), ("beta", beta)):
            require_at_least(name, number, 0)
        require_positive("step", step)
        require_box(box)
        for name, part in (("share_adversarial", share_adversarial), ("share", share)):
            if not 0 <= part <= 1:
                raise ValueError(f"{name} = {part!r}: must be in [0, 1]")
        if loss == "trades" and (attack == "fgsm" or not random_start):
            given = 'attack = "fgsm"' if attack == "fgsm" else "random_start = false"
            raise ValueError(
                f'loss = "trades" with {given}: at the sample itself the divergence has slope 0, '
                'and nothing would be moved; take attack = "pgd" with random_start = true'
            )
        self._attack, self._norm, self._radius, self._box = attack, norm, radius, box
        self._step, self._steps = step, steps
        self._random_start = random_start and attack == "pgd"
        self._loss, self._beta, self._lambda = loss, beta, share_adversarial
        self._as_in_training = statistics == "batch"
        self._share = share
        self._plain = not (radius and share and (steps or attack == "fgsm"))

    @property
    def needs_classes(self) -> str | None:
        """TRADES compares outputs as distributions over classes."""
        return 'loss = "trades"' if self._loss == "trades" and not self._plain else None

    @property
    def needs_numbers(self) -> str | None:
        """Samples are moved."""
        return None if self._plain else f"radius = {self._radius}"

    @property
    def strength(self) -> float | None:
        """0 where no sample is moved; else the change is not linear."""
        return 0.0 if self._plain else None

    @property
    def draws(self) -> Mapping[str, Draw]:
        """Where in the ball a sample begins, and whether a client trains so."""
        if self._plain:
            return {}
        found = {}
        if self._random_start:
            found[START] = Draw(lambda random, n, shape: starts(random, n, shape, self._norm))
        if self._share < 1:
            found[CLIENTS] = Draw(
                lambda random, n, _: np.full(n, random.random() < self._share, np.float32),
                once=True,
            )
        return found

    def wrapped(self, gradient: Gradient, own: Own) -> Gradient:
        """Return the gradient on moved samples."""
        if self._plain:
            return gradient

        def robust(
            params: Named,
            buffers: Named,
            batch: Batch,
            objective: Objective | None = None,
            penalty: Objective | None = None,
            inner: Objective | None = None,
        ) -> tuple[Tensor, Named, Named]:
            moved = batch._replace(features=self._moved(gradient, params, buffers, batch))
            if self._loss == "adversarial":
                return gradient(params, buffers, moved, objective, penalty, inner)
            if self._loss == "trades":
                both, further = self._divergence(batch, moved)
                count = batch.weights.shape[-1]
                first, other, within = (
                    None if each is None else of_first(each, count)
                    for each in (objective, penalty, inner)
                )
                return gradient(params, buffers, both, first, sum_of([further, other]), within)
            loss, grads, buffers = gradient(params, buffers, batch, objective, penalty, inner)
            worse, there, buffers = gradient(params, buffers, moved, objective, penalty, inner)
            mixed = {n: g + self._lambda * (there[n] - g) for n, g in grads.items()}
            return loss + self._lambda * (worse - loss), mixed, buffers

        return in_place_of(gradient, robust)

    def _moved(self, gradient: Gradient, params: Named, buffers: Named, batch: Batch) -> Tensor:
        """The batch's features, moved; of a client that does not train so, as they are."""
        features, lead = batch.features, batch.weights.dim()
        ball = Ball(self._norm, self._radius, self._box, gradient.units)

        def at(points: Tensor, losses: Losses | None = None) -> ByFeatures:
            there = batch._replace(features=points)
            return gradient.by_features(
                params, buffers, there, losses, training=self._as_in_training
            )

        clean = at(features).outputs.detach() if self._loss == "trades" else None

        def from_clean(outputs: Tensor, targets: Tensor) -> Tensor:
            assert clean is not None
            return divergence(clean, outputs)

        def look(points: Tensor) -> tuple[Tensor, Tensor]:
            seen = at(points, None if clean is None else from_clean)
            return seen.losses, seen.slope

        if self._attack == "fgsm":
            moved = fgsm(features, look, ball, lead=lead)
        else:
            start = batch.drawn[START] if self._random_start else None
            options: dict[str, Any] = {"step": self._step, "steps": self._steps, "start": start}
            moved = pgd(features, look, ball, lead=lead, **options)
        if self._share < 1:
            mine = batch.drawn[CLIENTS] > 0
            moved = torch.where(
                mine.reshape(*mine.shape, *(1,) * (moved.dim() - lead)), moved, features
            )
        return moved.detach()

    def _divergence(self, batch: Batch, moved: Batch) -> tuple[Batch, Objective]:
        """Return (samples and moved samples as one batch, what is added to the objective).

        The moved samples weigh nothing in the task's loss, as if they were padding.
        """
        count, axis = batch.weights.shape[-1], batch.weights.dim() - 1

        def joined(first: Tensor, second: Tensor) -> Tensor:
            return torch.cat([first, second], dim=axis)

        both = Batch(
            joined(batch.features, moved.features),
            joined(batch.targets, batch.targets),
            joined(batch.weights, torch.zeros_like(batch.weights)),
            {name: joined(noise, noise) for name, noise in batch.noise.items()},
            {purpose: joined(drawn, drawn) for purpose, drawn in batch.drawn.items()},
        )

        def further(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            apart = divergence(outputs[:count], outputs[count:])
            counted = weights[:count] > 0
            mean = torch.where(counted, apart, 0).sum() / counted.sum().clamp(min=1)
            return self._beta * mean

        return both, further


def divergence(outputs: Tensor, others: Tensor) -> Tensor:
    """Return KL(p || q) of each sample, p and q the softmax of two outputs, `[..., batch]`.

    Args:
        outputs: p's logits, `[..., batch, classes]`.
        others: q's, likewise.

    Example:
        >>> round(float(divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))), 6)
        0.120114
    """
    p, q = outputs.log_softmax(-1), others.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
