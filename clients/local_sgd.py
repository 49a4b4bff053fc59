"""Local training by minibatch SGD or Adam, the procedure of federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017 (arXiv:1602.05629), Algorithm 1, ClientUpdate; the proximal term is FedProx's (Li et al., MLSys
2020, arXiv:1812.06127, equation 2); Adam is Kingma and Ba's (arXiv:1412.6980, Algorithm 1). The
margin penalty is FedLD's (Zeng et al., MICCAI 2024, arXiv:2408.12300), the guidance FedLEx's
(Interno et al., IJCNN 2024, arXiv:2506.18640).

Symbols: eta_l local_lr, E local_epochs, B batch_size, mu (FedProx) proximal, mu (heavy ball)
momentum, lambda (FedLD) margin, G (FedLEx) guidance, E_exp (FedLEx) setup_epochs.

Deviations: none. The arithmetic of SGD and Adam follows `torch.optim` (weight decay is added to the
gradient; momentum without dampening starts from the first gradient).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor

from fedsim.basics.errors import require_choice
from fedsim.basics.idle import Idle, at, given
from fedsim.client import (
    GUIDANCE,
    Batch,
    Carry,
    ClientProcedure,
    Descent,
    Gradient,
    LastBatch,
    Named,
    Work,
)
from fedsim.client.objectives import Reduction, Space, margin_penalty


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
    "proximal": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "lr_decay": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "margin": (lambda v: 0 <= v < math.inf, ">= 0 and finite"),
    "guidance": (lambda v: v in ("step", "gradient"), "step or gradient"),
    "setup_epochs": (lambda v: v is None or v >= 1, ">= 1"),
    "setup_lr": (lambda v: v is None or 0 <= v < math.inf, ">= 0 and finite"),
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
        proximal: Coefficient of the proximal term mu/2 * |w - w_received|^2; >= 0.
        lr_decay: Factor on the step size per round; in (0, 1].
        keep_optimizer: Whether momentum and moments live on in the client's memory between its
            rounds instead of starting anew.
        margin: Coefficient lambda of FedLD's margin penalty; >= 0, and 0 is plain training.
        margin_space: What the penalty sees: softmax "probability" or "logit" rows.
        margin_reduction: One norm over the whole "batch", or the mean over each "sample".
        guidance: Where a guidance G that the strategy sends acts: on the "step" (FedLEx's figure)
            or on the "gradient" (its code; Adam undoes it). Nothing sent, nothing guided.
        setup_epochs: Passes in a set-up exchange such as FedLEx's exploration; None as in a round.
        setup_lr: Step size in a set-up exchange; None as in round 1.

    Raises:
        ValueError: If an argument is outside its range.
    """

    takes = (GUIDANCE,)
    stacks = True
    idle = (
        Idle(("betas", "epsilon"), at("optimizer", "sgd")),
        Idle(("keep_optimizer",), _no_moments),
        Idle(("margin_space", "margin_reduction"), at("margin", 0.0)),
        Idle(("local_epochs",), given("local_steps")),
        Idle(("guidance",), _undone_guidance),
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
        proximal: float = 0.0,
        lr_decay: float = 1.0,
        keep_optimizer: bool = False,
        margin: float = 0.0,
        margin_space: Space = "probability",
        margin_reduction: Reduction = "batch",
        guidance: Literal["step", "gradient"] = "step",
        setup_epochs: int | None = None,
        setup_lr: float | None = None,
    ) -> None:
        _require_allowed(dict(locals()))
        require_choice("last_batch", last_batch, LastBatch)
        require_choice("margin_space", margin_space, Space)
        require_choice("margin_reduction", margin_reduction, Reduction)
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
        self._proximal = proximal
        self._lr_decay = lr_decay
        self._keep_optimizer = keep_optimizer
        self._margin = margin
        self._margin_space: Space = margin_space
        self._margin_reduction: Reduction = margin_reduction
        self._guides_step = guidance == "step"
        self._setup_work = self._work
        if setup_epochs:
            self._setup_work = Work(batch_size, setup_epochs, None, last_batch)
        self._setup_lr = local_lr if setup_lr is None else setup_lr

    @property
    def work(self) -> Work:
        """How much is trained per round."""
        return self._work

    @property
    def setup_work(self) -> Work:
        """How much is trained in a set-up exchange."""
        return self._setup_work

    @property
    def needs_classes(self) -> str | None:
        """The margin penalty, which compares the logits of classes."""
        return f"margin = {self._margin}" if self._margin else None

    def descent(self, server_round: int) -> Descent | None:
        """Return the step of SGD; None with Adam, clipping, a proximal term or a penalty."""
        if self._adam or self._clip_norm or self._proximal or self._margin:
            return None
        return Descent(
            self._step_size(server_round),
            self._weight_decay,
            self._momentum,
            guides_step=self._guides_step,
            keeps_moments=self._keep_optimizer and self._momentum > 0,
        )

    def initial_state(self, params: Named) -> Named:
        """Return zero moments when the optimiser is kept, else nothing."""
        return self._moments(params) if self._keep_optimizer else {}

    def begin(self, params: Named, buffers: Named, extra: Named, state: Named) -> Carry:
        """Start from the model received, with moments from the client's memory or zero."""
        moments = dict(state) if self._keep_optimizer else self._moments(params)
        carry: Carry = {"params": params, "buffers": buffers, "moments": moments}
        if self._proximal:
            carry["received"] = params
        if any(name.startswith(f"{GUIDANCE}.") for name in extra):
            carry["guidance"] = {name: extra[f"{GUIDANCE}.{name}"] for name in params}
        return carry

    def step(
        self, carry: Carry, batch: Batch, gradient: Gradient, *, server_round: int
    ) -> tuple[Carry, Tensor]:
        """One step of the optimiser on one batch, of one client or of several."""
        params, moments = carry["params"], carry["moments"]
        penalty = self._margin_penalty if self._margin else None
        loss, grads, buffers = gradient(params, carry["buffers"], batch, penalty=penalty)
        if self._proximal:
            grads = {
                n: g + self._proximal * (params[n] - carry["received"][n]) for n, g in grads.items()
            }
        if self._clip_norm is not None:
            clients = loss.shape  # [] or [clients]
            squares = [(g * g).reshape(*clients, -1).sum(-1) for g in grads.values()]
            norm = torch.stack(squares).sum(0).sqrt()
            scale = torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0)
            grads = {n: g * _along(scale, g) for n, g in grads.items()}
        if self._weight_decay:
            grads = {n: g + self._weight_decay * params[n] for n, g in grads.items()}
        guidance = carry.get("guidance")
        if guidance is not None and not self._guides_step:
            grads = {n: g * guidance[n] for n, g in grads.items()}
        lr = self._step_size(server_round)
        if self._adam:
            steps, moments = self._adam_step(grads, moments, lr)
        else:
            if self._momentum:
                moments = {n: self._momentum * moments[n] + g for n, g in grads.items()}
                grads = moments
            steps = {n: lr * g for n, g in grads.items()}
        if guidance is not None and self._guides_step:
            steps = {n: s * guidance[n] for n, s in steps.items()}
        params = {n: p - steps[n] for n, p in params.items()}
        return {**carry, "params": params, "buffers": buffers, "moments": moments}, loss

    def finish(self, carry: Carry, state: Named) -> tuple[Named, Named]:
        """Keep the moments when asked to."""
        return {}, carry["moments"] if self._keep_optimizer else state

    def _step_size(self, server_round: int) -> float:
        # a set-up exchange is round 0
        if not server_round:
            return self._setup_lr
        return self._local_lr * self._lr_decay ** (server_round - 1)

    def _margin_penalty(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return self._margin * margin_penalty(
            outputs, space=self._margin_space, reduction=self._margin_reduction, weights=weights
        )

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
            denominator = torch.sqrt(second / _along(second_scale, grad)) + self._epsilon
            taken[name] = lr * (first / _along(first_scale, grad)) / denominator
            updated[f"first.{name}"], updated[f"second.{name}"] = first, second
        return taken, updated


def _along(scale: Tensor, tensor: Tensor) -> Tensor:
    """A number per client, or one, as a factor of that client's tensor."""
    return scale.reshape(scale.shape + (1,) * (tensor.dim() - scale.dim()))


def _require_allowed(values: Mapping[str, Any]) -> None:
    for name, (holds, allowed) in _ALLOWED.items():
        if not holds(values[name]):
            raise ValueError(f"{name} = {values[name]!r}: must be {allowed}")
