"""Server optimisers: what the server makes of the mean update, as an optimiser of a gradient.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar and McMahan, "Adaptive Federated
Optimization", ICLR 2021 (arXiv:2003.00295), Algorithms 1 and 2; momentum as Hsu, Qi and Brown,
"Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019
(arXiv:1909.06335), has it (FedAvgM). The mean update Delta stands for the negative gradient.

Each rule is a pure function of what is remembered and the mean update, `[dim]` in float64; beside
it stands a record of its hyperparameters, which a scenario names in `[strategy.server]`.

Symbols: Delta mean_update, m and v of `Moments`, eta lr, beta_1 beta1, beta_2 beta2, tau tau.

Deviations: none as they come. The paper gives v_{-1} >= tau^2 and no bias correction; here v begins
at tau^2. Time is counted in updates that were observed: a round without a reply changes nothing.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedsim.basics.errors import require_choice, require_positive
from fedsim.basics.idle import Idle, at

BiasCorrection = Literal["none", "adam"]
FirstMoment = Literal["tau2", "zero"]


class Moments(NamedTuple):
    """What a server optimiser remembers.

    Attributes:
        m: float64 `[dim]`, the momentum.
        v: float64 `[dim]`, the second moment; `[0]` for SGD, which has none.
        steps: Updates taken.
    """

    m: Tensor
    v: Tensor
    steps: int


Step = tuple[Tensor, Moments]


def sgd(moments: Moments, mean_update: Tensor, *, lr: float, momentum: float = 0.0) -> Step:
    """Return (eta m, moments) with m = momentum m + Delta: FedAvgM, and FedAvg without momentum.

    Args:
        moments: What is remembered.
        mean_update: Delta, float64 `[dim]`.
        lr: eta.
        momentum: beta, the factor on the momentum; in [0, 1).

    Source: Hsu, Qi and Brown 2019 (arXiv:1909.06335), section 4.3.

    Example:
        >>> start = ServerSGD().init(torch.zeros(1))
        >>> _, after = sgd(start, torch.tensor([1.0]).double(), lr=1.0, momentum=0.5)
        >>> sgd(after, torch.tensor([1.0]).double(), lr=1.0, momentum=0.5)[0].tolist()
        [1.5]
    """
    m = momentum * moments.m + mean_update
    return lr * m, Moments(m, moments.v, moments.steps + 1)


def adagrad(
    moments: Moments, mean_update: Tensor, *, lr: float, beta1: float = 0.0, tau: float = 1e-3
) -> Step:
    """Return the step of FedAdagrad and the new moments: v = v + Delta^2.

    Args:
        moments: What is remembered.
        mean_update: Delta, float64 `[dim]`.
        lr: eta.
        beta1: Share of the momentum kept; in [0, 1).
        tau: What is added to the square root of v; > 0.

    Source: Reddi et al., ICLR 2021 (arXiv:2003.00295), Algorithm 2.
    """
    return _adapted(moments, mean_update, moments.v + mean_update**2, lr, beta1, tau)


def adam(
    moments: Moments,
    mean_update: Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    correction: int | None = None,
) -> Step:
    """Return the step of FedAdam and the new moments: v = beta_2 v + (1 - beta_2) Delta^2.

    Args:
        moments: What is remembered.
        mean_update: Delta, float64 `[dim]`.
        lr: eta.
        beta1: Share of the momentum kept; in [0, 1).
        beta2: Share of the second moment kept; in [0, 1).
        tau: What is added to the square root of v; > 0.
        correction: t of Kingma and Ba's bias correction, which multiplies eta by
            sqrt(1 - beta_2^t) / (1 - beta_1^t); None corrects nothing, as the paper.

    Source: Reddi et al., ICLR 2021 (arXiv:2003.00295), Algorithm 2.
    """
    if correction is not None:
        lr = lr * math.sqrt(1 - beta2**correction) / (1 - beta1**correction)
    v = beta2 * moments.v + (1 - beta2) * mean_update**2
    return _adapted(moments, mean_update, v, lr, beta1, tau)


def yogi(
    moments: Moments,
    mean_update: Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Step:
    """Return the step of FedYogi and the new moments.

    v = v - (1 - beta_2) Delta^2 sign(v - Delta^2): where nothing moves, v stays, which Adam's
    forgets. The rule jumps where v is Delta^2: rounding then decides whether v grows or shrinks by
    (1 - beta_2) Delta^2.

    Args:
        moments: What is remembered.
        mean_update: Delta, float64 `[dim]`.
        lr: eta.
        beta1: Share of the momentum kept; in [0, 1).
        beta2: One minus the share of Delta^2 by which v moves; in [0, 1).
        tau: What is added to the square root of v; > 0.

    Source: Reddi et al., ICLR 2021 (arXiv:2003.00295), Algorithm 2.
    """
    square = mean_update**2
    v = moments.v - (1 - beta2) * square * torch.sign(moments.v - square)
    return _adapted(moments, mean_update, v, lr, beta1, tau)


def _adapted(
    moments: Moments, mean_update: Tensor, v: Tensor, lr: float, beta1: float, tau: float
) -> Step:
    """Return eta m / (sqrt(v) + tau), m = beta_1 m + (1 - beta_1) Delta; and what to remember."""
    m = beta1 * moments.m + (1 - beta1) * mean_update
    return lr * m / (v.sqrt() + tau), Moments(m, v, moments.steps + 1)


class ServerOptimizer(abc.ABC):
    """A rule with its hyperparameters.

    Attributes:
        idle: Which of its keys have no effect beside which values.
    """

    idle: ClassVar[tuple[Idle, ...]] = ()

    @abc.abstractmethod
    def init(self, params: Tensor) -> Moments:
        """Return what is remembered before the first update to a model `[dim]`."""

    @abc.abstractmethod
    def step(self, moments: Moments, mean_update: Tensor) -> Step:
        """Return (step, moments): the step is added to the model.

        Args:
            moments: What is remembered; it is not changed in place.
            mean_update: Delta, float64 `[dim]`.
        """

    def rest(self, moments: Moments) -> Moments:
        """Return what is remembered after a round in which nothing was observed: the same."""
        return moments


@dataclass(frozen=True, kw_only=True)
class ServerSGD(ServerOptimizer):
    """Gradient descent with momentum; FedAvg's own rule at lr = 1 without momentum.

    Args:
        lr: eta, the factor on the momentum; > 0.
        momentum: beta of m = beta m + Delta; in [0, 1).

    Raises:
        ValueError: If an argument is outside its range.
    """

    lr: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        require_positive("lr", self.lr)
        _require_share("momentum", self.momentum)

    def init(self, params: Tensor) -> Moments:
        """No momentum."""
        still = torch.zeros_like(params, dtype=torch.float64)
        return Moments(still, still[:0].clone(), 0)

    def step(self, moments: Moments, mean_update: Tensor) -> Step:
        """Return eta m and what to remember."""
        return sgd(moments, mean_update, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True, kw_only=True)
class _Adaptive(ServerOptimizer):
    """What the three adaptive rules share."""

    lr: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3
    v_init: FirstMoment = "tau2"
    flower_compat: bool = False

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("v_init",), at("flower_compat", True)),)

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        require_positive("lr", self.lr)
        _require_share("beta1", self.beta1)
        require_positive("tau", self.tau)
        require_choice("v_init", self.v_init, FirstMoment)

    def init(self, params: Tensor) -> Moments:
        """No momentum; v is tau^2, or 0."""
        still = torch.zeros_like(params, dtype=torch.float64)
        first = 0.0 if self.flower_compat or self.v_init == "zero" else self.tau**2
        return Moments(still, torch.full_like(still, first), 0)


@dataclass(frozen=True, kw_only=True)
class ServerAdagrad(_Adaptive):
    """FedAdagrad's rule: steps shrink with the sum of all squared updates.

    Args:
        lr: eta; without momentum no coordinate ever moves by more than this; > 0.
        beta1: Share of the momentum kept; in [0, 1), 0 in the paper.
        tau: Degree of adaptivity, what is added to the square root of v; > 0.
        v_init: What v begins at: "tau2" (the paper's tau^2) or "zero".
        flower_compat: Whether to compute what Flower's FedAdagrad does: v begins at 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    beta1: float = 0.0

    def step(self, moments: Moments, mean_update: Tensor) -> Step:
        """Return eta m / (sqrt(v) + tau) and what to remember."""
        return adagrad(moments, mean_update, lr=self.lr, beta1=self.beta1, tau=self.tau)


@dataclass(frozen=True, kw_only=True)
class ServerAdam(_Adaptive):
    """FedAdam's rule: steps over the root of a mean of squared updates that forgets.

    Args:
        lr: eta; > 0.
        beta1: Share of the momentum kept; in [0, 1).
        beta2: Share of the second moment kept; in [0, 1).
        tau: Degree of adaptivity, what is added to the square root of v; > 0.
        v_init: What v begins at: "tau2" (the paper's tau^2) or "zero".
        bias_correction: "none" (the paper) or "adam": eta times
            sqrt(1 - beta2^t) / (1 - beta1^t) in the t-th update.
        flower_compat: Whether to compute what Flower's FedAdam does: v begins at 0, and eta is
            corrected with t + 1 for t, rounds without a reply counted.

    Raises:
        ValueError: If an argument is outside its range.
    """

    beta2: float = 0.99
    bias_correction: BiasCorrection = "none"

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("v_init", "bias_correction"), at("flower_compat", True)),
    )

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        super().__post_init__()
        _require_share("beta2", self.beta2)
        require_choice("bias_correction", self.bias_correction, BiasCorrection)

    def step(self, moments: Moments, mean_update: Tensor) -> Step:
        """Return eta m / (sqrt(v) + tau) and what to remember."""
        t = moments.steps + 1
        correction = t if self.bias_correction == "adam" else None
        if self.flower_compat:
            correction = t + 1
        return adam(
            moments, mean_update, lr=self.lr, beta1=self.beta1, beta2=self.beta2, tau=self.tau,
            correction=correction,
        )  # fmt: skip

    def rest(self, moments: Moments) -> Moments:
        """Flower counts the server's rounds, whichever clients answered."""
        return moments._replace(steps=moments.steps + 1) if self.flower_compat else moments


@dataclass(frozen=True, kw_only=True)
class ServerYogi(_Adaptive):
    """FedYogi's rule: Adam's, whose second moment moves by a bounded amount and forgets nothing.

    Args:
        lr: eta; > 0.
        beta1: Share of the momentum kept; in [0, 1).
        beta2: One minus the share of the squared update by which v moves; in [0, 1).
        tau: Degree of adaptivity, what is added to the square root of v; > 0.
        v_init: What v begins at: "tau2" (the paper's tau^2) or "zero".
        flower_compat: Whether to compute what Flower's FedYogi does: v begins at 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        super().__post_init__()
        _require_share("beta2", self.beta2)

    def step(self, moments: Moments, mean_update: Tensor) -> Step:
        """Return eta m / (sqrt(v) + tau) and what to remember."""
        return yogi(
            moments, mean_update, lr=self.lr, beta1=self.beta1, beta2=self.beta2, tau=self.tau
        )


SERVER_OPTIMIZERS: dict[str, Callable[..., ServerOptimizer]] = {
    "sgd": ServerSGD,
    "adagrad": ServerAdagrad,
    "adam": ServerAdam,
    "yogi": ServerYogi,
}


def _require_share(name: str, value: float) -> None:
    """Refuse what is no share of a moment that may be kept.

    Raises:
        ValueError: If it is not in [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name} = {value!r}: must be in [0, 1)")
