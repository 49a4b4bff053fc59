"""Local training by minibatch SGD or Adam, the procedure of federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017 (arXiv:1602.05629), Algorithm 1, ClientUpdate; Adam is Kingma and Ba's (arXiv:1412.6980,
Algorithm 1). What else a client does is a list of parts, see `clients/parts`.

Symbols: eta_l local_lr, E local_epochs, B batch_size, mu (heavy ball) momentum.

Deviations: none. The arithmetic of SGD and Adam follows `torch.optim` (weight decay is added to the
gradient; momentum without dampening starts from the first gradient).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

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
from fedsim.client.part import Here, Trained
from fedsim.client.parts import Parts
from fedsim.client.procedure import Draw, along


def _no_moments(table: Mapping[str, Any]) -> str | None:
    idle = table["optimizer"] == "sgd" and not table["momentum"]
    return 'optimizer = "sgd" and momentum = 0' if idle else None


def _undone_guidance(table: Mapping[str, Any]) -> str | None:
    if table["optimizer"] != "adam":
        return None
    return 'optimizer = "adam", whose steps are as long whatever it says; use "step"'


# what a value must be: (whether it is, in words)
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "local_lr": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "local_epochs": (lambda v: v >= 1, ">= 1"),
    "local_steps": (lambda v: v is None or v >= 1, ">= 1"),
    "batch_size": (lambda v: v >= 1, ">= 1"),
    "optimizer": (lambda v: v in ("sgd", "adam"), "sgd or adam"),
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "weight_decay": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "betas": (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "each in [0, 1)"),
    "epsilon": (lambda v: v > 0, "> 0"),
    "clip_norm": (lambda v: v is None or v > 0, "> 0"),
    "lr_decay": (lambda v: 0 < v <= 1, "in (0, 1]"),
}


@final
class LocalSGD(ClientProcedure):
    """Minibatch SGD or Adam on the client's own samples.

    Args:
        local_lr: Step size in round 1; > 0 (0 trains nothing).
        local_epochs: Passes over the client's samples per round; >= 1. Ignored with `local_steps`.
        local_steps: Steps per round instead of epochs; >= 1.
        batch_size: Samples per step; >= 1.
        last_batch: What becomes of an epoch's last batch where it is short: "keep" it, "drop" it,
            or "merge" it into the one before. Where it is the only one it is kept, but under "drop"
            and "merge" a client with one sample does not train.
        optimizer: "sgd" or "adam".
        momentum: Heavy-ball momentum of SGD, in [0, 1).
        weight_decay: L2 coefficient added to the gradient; >= 0.
        betas: Adam's decay rates of the first and second moments, each in [0, 1).
        epsilon: Adam's denominator offset; > 0.
        clip_norm: Upper bound of the gradient's Euclidean norm per step; None does not clip.
        lr_decay: Factor on the step size per round; in (0, 1].
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
        optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        clip_norm: float | None = None,
        lr_decay: float = 1.0,
        keep_optimizer: bool = False,
        parts: Sequence[ClientPart] = (),
    ) -> None:
        _require_allowed(dict(locals()))
        require_choice("last_batch", last_batch, LastBatch)
        if optimizer == "adam" and momentum:
            raise ValueError(f"momentum = {momentum!r}: adam has none of its own; leave it at 0")
        self._local_lr = local_lr
        epochs = None if local_steps else local_epochs
        self._work = Work(batch_size, epochs, local_steps, last_batch)
        self._adam = optimizer == "adam"
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._betas = betas
        self._epsilon = epsilon
        self._clip_norm = clip_norm
        self._lr_decay = lr_decay
        self._keep_optimizer = keep_optimizer
        self._parts = Parts(parts)

    @property
    def parts(self) -> Parts:
        """What else a client does."""
        return self._parts

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
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        """What its parts use of what a strategy sends."""
        return self._parts.takes

    @property
    def stacks(self) -> bool:  # type: ignore[override]
        """Whether all its parts take several clients at once, as the optimisers do."""
        return self._parts.stacks

    def descent(self, server_round: int) -> Descent | None:
        """Return the step of SGD; None with Adam, clipping or a part that is not linear."""
        strength = self._parts.strength
        if self._adam or self._clip_norm or strength is None:
            return None
        return Descent(
            self._step_size(server_round),
            self._weight_decay,
            self._momentum,
            guides_step=self._parts.guides != "gradient",
            keeps_moments=self._keep_optimizer and self._momentum > 0,
            pull=strength,
            pushes=self._parts.pushes,
            looks_back=self._parts.looks_back,
            takes=self._parts.takes,
        )

    def push(self, carry: Carry) -> Named:
        """Return what the parts add to the gradient in every step."""
        return self._parts.push(carry["parts"])

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
        if self._parts.looks_back:
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
        loss, grads, buffers = parts.wrapped(gradient, own)(
            params,
            carry["buffers"],
            batch,
            objective=parts.objective(own),
            penalty=parts.penalty(own),
        )
        lr = self._step_size(server_round)
        here = Here(params, carry["buffers"], batch, gradient, lr)
        grads, own = parts.gradient(grads, here, own)
        if self._clip_norm is not None:
            clients = loss.shape  # [] or [clients]
            squares = [(g * g).reshape(*clients, -1).sum(-1) for g in grads.values()]
            norm = torch.stack(squares).sum(0).sqrt()
            scale = torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0)
            grads = {n: g * along(scale, g) for n, g in grads.items()}
        if self._weight_decay:
            grads = {n: g + self._weight_decay * params[n] for n, g in grads.items()}
        grads = parts.direction(grads, own)
        if self._adam:
            steps, moments = self._adam_step(grads, moments, lr)
        else:
            if self._momentum:
                moments = {n: self._momentum * moments[n] + g for n, g in grads.items()}
                grads = moments
            steps = {n: lr * g for n, g in grads.items()}
        steps = parts.step(steps, own)
        params = {n: p - steps[n] for n, p in params.items()}
        after = {**carry, "params": params, "buffers": buffers, "moments": moments}
        if parts:
            after["parts"] = parts.stepped(own, here, params)
        if parts.looks_back:
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
    def has_own_model(self) -> bool:
        """Whether a part gives clients a model of their own."""
        return self._parts.has_own_model

    def own_model(self, params: Named, state: Named) -> tuple[Named, Named]:
        """Return (the client's own model, numbers that tell of its state)."""
        return self._parts.own_model(params, state), self._parts.measured(state)

    def _step_size(self, server_round: int) -> float:
        if server_round:
            return self._local_lr * self._lr_decay ** (server_round - 1)
        step_size = self._local_lr  # a set-up exchange is round 0
        for part in self._parts:
            step_size = part.setup_step_size(step_size)
        return step_size

    def _moments(self, params: Named) -> Named:
        if self._adam:
            first = next(iter(params.values()))
            zeros = {n: torch.zeros_like(p) for n, p in params.items()}
            return (
                {f"first.{n}": z for n, z in zeros.items()}
                | {f"second.{n}": z for n, z in zeros.items()}
                | {"steps": torch.zeros((), dtype=first.dtype, device=first.device)}
            )
        return {n: torch.zeros_like(p) for n, p in params.items()} if self._momentum else {}

    def _adam_step(self, grads: Named, moments: Named, lr: float) -> tuple[Named, Named]:
        """Return (what the parameters are to be reduced by, moments)."""
        beta1, beta2 = self._betas
        steps = moments["steps"] + 1
        first_scale = 1 - beta1**steps
        second_scale = 1 - beta2**steps
        updated: Named = {"steps": steps}
        taken: Named = {}
        for name, grad in grads.items():
            first = beta1 * moments[f"first.{name}"] + (1 - beta1) * grad
            second = beta2 * moments[f"second.{name}"] + (1 - beta2) * grad * grad
            denominator = torch.sqrt(second / along(second_scale, grad)) + self._epsilon
            taken[name] = lr * (first / along(first_scale, grad)) / denominator
            updated[f"first.{name}"], updated[f"second.{name}"] = first, second
        return taken, updated


def _require_allowed(values: Mapping[str, Any]) -> None:
    for name, (holds, allowed) in _ALLOWED.items():
        if not holds(values[name]):
            raise ValueError(f"{name} = {values[name]!r}: must be {allowed}")
