"""Local training by minibatch SGD, Adam or AdamW, the procedure of federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017 (arXiv:1602.05629), Algorithm 1, ClientUpdate; Adam is Kingma and Ba's (arXiv:1412.6980,
Algorithm 1), AdamW Loshchilov and Hutter's (arXiv:1711.05101, Algorithm 2), whose weight decay is
not a part of the gradient. What else a client does is a list of parts, see `clients/parts`.

Symbols: eta_l local_lr, E local_epochs, B batch_size, mu (heavy ball) momentum.

Deviations: none. The arithmetic follows `torch.optim`: weight decay of SGD and Adam is added to the
gradient, that of AdamW is times the step size; momentum without dampening starts from the first
gradient.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from fedsim.basics.errors import require_choice
from fedsim.basics.idle import Idle, at, given
from fedsim.client import (
    Batch,
    Carry,
    ClientPart,
    ClientProcedure,
    Descent,
    Gradient,
    LastBatch,
    Named,
    Work,
)
from fedsim.client.arithmetic import along, norm_of
from fedsim.client.freezing import where_moving, which_move
from fedsim.client.names import ModelTensors
from fedsim.client.optimizers import LocalOptimizer
from fedsim.client.part import Here, Trained
from fedsim.client.parts import Parts
from fedsim.client.procedure import Compression, Draw
from fedsim.client.step_sizes import step_sizes


def _no_moments(table: Mapping[str, Any]) -> str | None:
    idle = table["optimizer"] == "sgd" and not table["momentum"]
    return 'optimizer = "sgd" and momentum = 0' if idle else None


def _undone_guidance(table: Mapping[str, Any]) -> str | None:
    if table["optimizer"] == "sgd":
        return None
    return (
        f'optimizer = "{table["optimizer"]}", whose steps are as long whatever it says; use "step"'
    )


Optimizer = Literal["sgd", "adam", "adamw"]

# what a value must be: (whether it is, in words)
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "local_lr": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "local_epochs": (lambda v: v >= 1, ">= 1"),
    "local_steps": (lambda v: v is None or v >= 1, ">= 1"),
    "batch_size": (lambda v: v >= 1, ">= 1"),
    "optimizer": (lambda v: v in get_args(Optimizer), "sgd, adam or adamw"),
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "weight_decay": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "betas": (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "each in [0, 1)"),
    "epsilon": (lambda v: v > 0, "> 0"),
    "clip_norm": (lambda v: v is None or v > 0, "> 0"),
    "lr_decay": (lambda v: 0 < v <= 1, "in (0, 1]"),
}


@final
class LocalSGD(ClientProcedure):
    """Minibatch SGD, Adam or AdamW on the client's own samples.

    Args:
        local_lr: Step size in round 1; > 0 (0 trains nothing).
        local_epochs: Passes over the client's samples per round; >= 1. Ignored with `local_steps`.
        local_steps: Steps per round instead of epochs; >= 1.
        batch_size: Samples per step; >= 1.
        last_batch: What becomes of an epoch's last batch where it is short: "keep" it, "drop" it,
            or "merge" it into the one before. Where it is the only one it is kept, but under "drop"
            and "merge" a client with one sample does not train.
        optimizer: "sgd", "adam" or "adamw".
        momentum: Heavy-ball momentum of SGD, in [0, 1).
        weight_decay: L2 coefficient; >= 0. It is added to the gradient, or with "adamw" to what the
            step size is multiplied by.
        betas: Adam's decay rates of the first and second moments, each in [0, 1).
        epsilon: Adam's denominator offset; > 0.
        clip_norm: Upper bound of the gradient's Euclidean norm per step; None does not clip.
        lr_decay: Factor on the step size per round; in (0, 1].
        schedule: A further factor on the step size, such as `{ kind = "cosine", length = 100 }`:
            `kind` "constant", "step" (`every`, `factor`) or "cosine" (`length`, `floor`), each with
            a linear `warmup`, `over` the "rounds" of the run or the "steps" of a round. None is 1.
        keep_optimizer: Whether momentum and moments live on in the client's state between its
            rounds instead of starting anew.
        parts: What else a client does, see `clients/parts`; no two of one kind.

    Raises:
        ValueError: If an argument is outside its range.
    """

    idle = (
        Idle(("betas", "epsilon"), at("optimizer", "sgd")),
        Idle(("keep_optimizer",), _no_moments),
        Idle(("local_epochs",), given("local_steps")),
        Idle(("guidance.acts_on",), _undone_guidance),
    )

    def __init__(
        self,
        *,
        local_lr: float = 0.1,
        local_epochs: int = 1,
        local_steps: int | None = None,
        batch_size: int = 32,
        last_batch: LastBatch = "keep",
        optimizer: Optimizer = "sgd",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        clip_norm: float | None = None,
        lr_decay: float = 1.0,
        schedule: Mapping[str, Any] | None = None,
        keep_optimizer: bool = False,
        parts: Sequence[ClientPart] = (),
    ) -> None:
        _require_allowed(dict(locals()))
        require_choice("last_batch", last_batch, LastBatch)
        if optimizer != "sgd" and momentum:
            raise ValueError(
                f"momentum = {momentum!r}: {optimizer} has none of its own; leave it at 0"
            )
        self._local_lr = local_lr
        epochs = None if local_steps else local_epochs
        self._work = Work(batch_size, epochs, local_steps, last_batch)
        self._adam = optimizer != "sgd"
        decoupled = optimizer == "adamw"
        self._momentum = momentum
        self._weight_decay = 0.0 if decoupled else weight_decay  # as a part of the gradient
        self._clip_norm = clip_norm
        self._lr_decay = lr_decay
        self._schedule = step_sizes(schedule)
        self._over_steps = self._schedule.changes and self._schedule.over == "steps"
        self._keep_optimizer = keep_optimizer
        self._parts = Parts(parts)
        self._frozen = self._parts.frozen
        self._optimizer = LocalOptimizer(
            self._adam,
            momentum,
            betas,
            epsilon,
            decay=weight_decay if decoupled else 0.0,
            counts_each=bool(self._frozen),
        )

    @property
    def parts(self) -> Parts:
        """What else a client does."""
        return self._parts

    def for_model(self, tensors: ModelTensors) -> "LocalSGD":
        """Return the procedure with its parts as they train a certain model."""
        made = copy.copy(self)
        made._parts = self._parts.for_model(tensors, self._work)
        made._frozen = made._parts.frozen
        made._optimizer = self._optimizer._replace(counts_each=bool(made._frozen))
        return made

    @property
    def work(self) -> Work:
        """How much is trained per round."""
        return self._work

    @property
    def setup_work(self) -> Work:
        """How much is trained in a set-up exchange."""
        work = self._work
        for part in self._parts:
            work = part.setup_work(work)
        return work

    @property
    def needs_classes(self) -> str | None:
        """What a part says."""
        return self._parts.needs_classes

    @property
    def needs_numbers(self) -> str | None:
        """What a part says."""
        return self._parts.needs_numbers

    @property
    def draws(self) -> Mapping[str, Draw]:
        """What its parts ask to have drawn."""
        return self._parts.draws

    @property
    def holds_out(self) -> float:
        """What a part says."""
        return self._parts.holds_out

    @property
    def needs_representations(self) -> str | None:
        """What a part says."""
        return self._parts.needs_representations

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        """What its parts use of what a strategy sends."""
        return self._parts.takes

    @property
    def knows(self) -> tuple[str, ...]:  # type: ignore[override]
        """What its parts ask to know of the client's training samples."""
        return self._parts.knows

    @property
    def stacks(self) -> bool:  # type: ignore[override]
        """Whether all its parts take several clients at once, as the optimisers do."""
        return self._parts.stacks

    def descent(self, server_round: int) -> Descent | None:
        """Return the step of SGD; None with Adam, clipping or a part that is not linear."""
        strength = self._parts.strength
        if self._adam or self._clip_norm or strength is None:
            return None
        step_size, companion = self._step_size(server_round), None
        if (beside := self._parts.companion) is not None:
            _, pull, size = beside
            companion = Descent(step_size if size is None else size, pull=pull, pushes=pull > 0)
            if size is None:
                companion = companion._replace(factor=self._factor_over_steps)
        return Descent(
            step_size,
            self._weight_decay,
            self._momentum,
            guides_step=self._parts.guides != "gradient",
            keeps_moments=self._keep_optimizer and self._momentum > 0,
            pull=strength,
            pushes=self._parts.pushes,
            looks_back=self._parts.looks_back,
            takes=self._parts.takes,
            companion=companion,
            factor=self._factor_over_steps,
            frozen=self._frozen if server_round else (),  # a set-up exchange explores all
        )

    @property
    def follows_rounds(self) -> bool:
        """Whether the step size changes over the rounds."""
        return self._lr_decay != 1 or (self._schedule.changes and not self._over_steps)

    @property
    def _factor_over_steps(self) -> Callable[[int], float] | None:
        return self._schedule.at if self._over_steps else None

    def push(self, carry: Carry) -> Named:
        """Return what the parts add to the gradient in every step."""
        return self._parts.push(carry["parts"])

    def companion(self, carry: Carry) -> tuple[Named, Named]:
        """Return (where a part's own model starts, what is added to its gradient)."""
        return self._parts.companion_of(carry["parts"])

    def accompanied(self, carry: Carry, companion: Named) -> Carry:
        """Return the carry with a part's own model after its descent."""
        return {**carry, "parts": self._parts.accompanied(carry["parts"], companion)}

    def initial_state(self, params: Named) -> Named:
        """Return zero moments when the optimiser is kept, and what the parts begin with."""
        own = self._moments(params) if self._keep_optimizer else {}
        return own | self._parts.initial_state(params)

    def begin(self, params: Named, buffers: Named, extra: Named, state: Named) -> Carry:
        """Start from the model received, with moments from the client's state or zero."""
        moments = self._moments(params)
        if self._keep_optimizer:
            moments = {name: state[name] for name in moments}
        carry: Carry = {"params": params, "buffers": buffers, "moments": moments}
        if self._parts:
            carry["parts"] = self._parts.begin(params, extra, state)
        if self._counts:
            first = next(iter(params.values()))
            none = torch.zeros((), dtype=first.dtype, device=first.device)
            carry |= {"received": params, "steps": none, "path": none}
        return carry

    def step(
        self, carry: Carry, batch: Batch, gradient: Gradient, *, server_round: int
    ) -> tuple[Carry, Tensor]:
        """One step of the optimiser on one batch, of one client or of several."""
        params, moments, own = carry["params"], carry["moments"], carry.get("parts", {})
        parts = self._parts
        lr: float | Tensor = self._step_size(server_round)
        if self._over_steps:
            lr = lr * self._schedule.each(carry["steps"])
        here = Here(params, carry["buffers"], batch, gradient, lr)
        seen = parts.look(here, own)
        loss, grads, buffers = parts.wrapped(gradient, own)(
            params,
            carry["buffers"],
            batch,
            objective=parts.objective(seen),
            penalty=parts.penalty(seen),
            inner=parts.inner_penalty(seen),
        )
        grads, own = parts.gradient(grads, here, own)
        moves = self._moving(params, batch, server_round)
        if moves:  # what takes no step counts for no bound either
            grads = where_moving(moves, grads, {n: torch.zeros_like(g) for n, g in grads.items()})
        if self._clip_norm is not None:
            scale = torch.clamp(self._clip_norm / (norm_of(grads, loss.shape) + 1e-6), max=1.0)
            grads = {n: g * along(scale, g) for n, g in grads.items()}
        if self._weight_decay:
            grads = {n: g + self._weight_decay * params[n] for n, g in grads.items()}
        grads = parts.direction(grads, own)
        steps, moved_moments = self._optimizer.steps(grads, params, moments, lr)
        steps = parts.step(steps, own)
        moved = {n: p - steps[n] for n, p in params.items()}
        if moves:
            moved = where_moving(moves, moved, params)
            of_moments = {name: moves[self._optimizer.owner(name)] for name in moments}
            moved_moments = where_moving(of_moments, moved_moments, moments)
        params, moments = moved, moved_moments
        after = {**carry, "params": params, "buffers": buffers, "moments": moments}
        if parts:
            after["parts"] = parts.stepped(own, here, params)
        if self._counts:
            after |= {"steps": carry["steps"] + 1, "path": carry["path"] + lr}
        return after, loss

    def finish(self, carry: Carry, state: Named) -> tuple[Named, Named]:
        """Keep the moments when asked to, and what the parts say."""
        moments = carry["moments"] if self._keep_optimizer else {}
        if not self._parts.looks_back:
            own = {name: t for name, t in state.items() if name not in moments}
            return {}, {**own, **moments}
        trained = Trained(
            carry["received"],
            carry["params"],
            carry["steps"],
            carry["path"],
            None if self._adam else self._momentum,
        )
        extra, kept = self._parts.finish(carry["parts"], trained, state)
        return extra, {**kept, **moments}

    @property
    def compression(self) -> Compression | None:
        """The part that compresses the reply."""
        return self._parts.compression

    @property
    def has_own_model(self) -> bool:
        """Whether a part gives clients a model of their own."""
        return self._parts.has_own_model

    def own_model(self, params: Named, state: Named) -> tuple[Named, Named]:
        """Return (the client's own model, numbers that tell of its state)."""
        return self._parts.own_model(params, state), self._parts.measured(state)

    @property
    def _counts(self) -> bool:
        """Whether the carry counts steps and adds up their sizes."""
        return self._parts.looks_back or self._over_steps

    def _step_size(self, server_round: int) -> float:
        if server_round:
            step_size = self._local_lr * self._lr_decay ** (server_round - 1)
            if self._schedule.changes and not self._over_steps:
                step_size *= self._schedule.at(server_round - 1)
            return step_size
        step_size = self._local_lr  # a set-up exchange is round 0
        for part in self._parts:
            step_size = part.setup_step_size(step_size)
        return step_size

    def _moments(self, params: Named) -> Named:
        return self._optimizer.moments(params)

    def _moving(self, params: Named, batch: Batch, server_round: int) -> Named:
        """Return whether each parameter takes this step; nothing where all do."""
        if not self._frozen or not server_round:
            return {}
        assert batch.epoch is not None
        return which_move(self._frozen, params, batch.epoch)


def _require_allowed(values: Mapping[str, Any]) -> None:
    for name, (holds, allowed) in _ALLOWED.items():
        if not holds(values[name]):
            raise ValueError(f"{name} = {values[name]!r}: must be {allowed}")
