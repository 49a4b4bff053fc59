"""The attacks: each function says what the attackers see, and what they send or train on.

A new one is one function here and one line in `ATTACKS` (`named.py`): its keyword arguments, and
those that say who attacks when, are the keys of `[attack]`.
"""

import functools
import inspect
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.updates import Updates
from fedsim.basics.errors import ScenarioError
from fedsim.basics.ties import EPSILON
from fedsim.client.batching.poison import Effect, FlippedLabels, Trigger
from fedsim.federation.attacks.attack import Attack, Forge, Schedule, Seen, Sees, nobody_is_honest

_LARGEST = torch.finfo(torch.float32).max  # what features in float32 bear

Direction = Literal["deviation", "mean", "sign"]


def _who(
    *,
    num_byzantine: int | None = None,
    clients: list[int] | None = None,
    fraction: float | None = None,
    schedule: Schedule = "fixed",
    active_rate: float | None = None,
) -> None:
    """Say who attacks when.

    Args:
        num_byzantine: How many clients attack, drawn among all of them; one if left out.
        clients: Who attacks instead.
        fraction: How many attack instead, as a share of all clients, rounded down.
        schedule: "fixed", they attack in every round; "random", as many are drawn anew in each;
            "intermittent", each attacks in a round with probability active_rate.
        active_rate: Of "intermittent", in (0, 1]; 0.5 if left out.
    """


def _attack(sees: Sees) -> Callable[[Callable[..., Any]], Callable[..., Attack]]:
    """Make an attack of a function that returns how updates are forged, an effect on data, or both.

    Args:
        sees: What it is told; an attack that needs less is given less.
    """

    def wrap(make: Callable[..., Any]) -> Callable[..., Attack]:
        who = inspect.signature(_who).parameters

        @functools.wraps(make)
        def factory(**given: Any) -> Attack:
            own = {key: value for key, value in given.items() if key not in who}
            others = {key: value for key, value in given.items() if key in who}
            made = make(**own)
            forge, effect = made if isinstance(made, tuple) else (made, None)
            victim = own.get("victim")  # of those that go by one client
            return Attack(forge, **others, sees=sees, effect=effect, victim=victim)

        mine = inspect.signature(make).parameters
        factory.__signature__ = inspect.Signature([*mine.values(), *who.values()])  # type: ignore[attr-defined]
        text, common = inspect.getdoc(make) or "", inspect.getdoc(_who) or ""
        arguments = common.split("Args:\n", 1)[1]
        head, marker, rest = text.partition("Args:\n")
        factory.__doc__ = f"{head}{marker}{arguments}\n{rest}" if marker else (
            f"{text}\n\nArgs:\n{arguments}"
        )  # fmt: skip
        return factory

    return wrap


@_attack("nothing")
def uniform(*, scale: float = 1.0) -> Forge:
    """A gradient of independent random numbers, uniform in [0, 1).

    The attack of the Flag Aggregator's experiments (arXiv:2302.05865). The numbers are not centred:
    any two attackers pull in nearly the same direction.

    Args:
        scale: Factor on the gradient.
    """

    def forge(seen: Seen) -> Tensor:
        dim = seen.updates.shape[1]
        gradients = np.stack([draw.random(dim) for draw in seen.generators()])
        return -scale * torch.from_numpy(gradients)

    return forge


@_attack("nothing")
def gaussian(*, mean: float = 0.0, deviation: float = 1.0) -> Forge:
    """An update of independent normal numbers, as byzfl has it; each attacker draws its own.

    Args:
        mean: Of the numbers.
        deviation: Their standard deviation; >= 0.

    Raises:
        ScenarioError: If `deviation` is negative.
    """
    if deviation < 0:
        raise ScenarioError(f"[attack] deviation = {deviation}: must be >= 0")

    def forge(seen: Seen) -> Tensor:
        dim = seen.updates.shape[1]
        draws = np.stack([draw.normal(mean, deviation, dim) for draw in seen.generators()])
        return torch.from_numpy(draws)

    return forge


@_attack("nothing")
def infinity(*, finite: bool = False) -> Forge:
    """An update of infinities, as byzfl has it; admission refuses it by name.

    Args:
        finite: Send the largest number of the model's type instead, which admission lets pass.
    """

    def forge(seen: Seen) -> Tensor:
        largest = torch.finfo(seen.updates.dtype).max if finite else torch.inf
        return torch.full(seen.own.shape, largest, dtype=torch.float64)

    return forge


@_attack("own update")
def sign_flip() -> Forge:
    """The client's own update, reversed.

    byzfl's reverses the honest clients' mean instead: `ipm` with factor 1.
    """
    return lambda seen: -seen.own


@_attack("own update")
def scaled_reverse(*, factor: float = 10.0) -> Forge:
    """The client's own update, reversed and made longer.

    Args:
        factor: How much longer.
    """
    return lambda seen: -factor * seen.own


@_attack("honest updates")
def alie(*, z: float | None = None) -> Forge:
    """A Little Is Enough: z standard deviations below the honest clients' mean, per coordinate.

    Baruch, Baruch and Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed
    Learning", NeurIPS 2019 (arXiv:1902.06156). All attackers send the same update. Deviations:
    mean and standard deviation are those of the honest clients that replied (the paper estimates
    them on the attackers' own data); with nobody honest the attackers send their own.

    Args:
        z: How many standard deviations; None computes the paper's z_max of each round.
    """

    def forge(seen: Seen) -> Tensor:
        honest, attackers = seen.honest, len(seen.own)
        if nobody_is_honest(seen):
            return seen.own
        distance = alie_z(len(seen.updates), attackers) if z is None else z
        forged = honest.mean(dim=0) - distance * honest.std(dim=0, correction=0)
        return forged.expand(attackers, -1)

    return forge


@_attack("honest updates")
def ipm(*, factor: float = 10.0) -> Forge:
    """Inner product manipulation: the honest clients' mean, reversed, times a factor.

    Xie, Koyejo and Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
    Manipulation", UAI 2019 (arXiv:1903.03936). A factor below 1 hides among the honest updates; one
    above (n - f) / f turns the plain mean round. With nobody honest the attackers send their own.

    Args:
        factor: epsilon.
    """

    def forge(seen: Seen) -> Tensor:
        if nobody_is_honest(seen):
            return seen.own
        return (-factor * seen.honest.mean(dim=0)).expand(len(seen.own), -1)

    return forge


@_attack("honest updates")
def mimic(*, victim: int | None = None) -> Forge:
    """A copy of one honest client's update, so that it counts many times.

    Karimireddy, He and Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing",
    ICLR 2022 (arXiv:2006.09365). Deviation: the paper learns over rounds whom to copy; here it is
    said, as in byzfl. With nobody honest the attackers send their own.

    Args:
        victim: The client that is copied; None, and where it does not reply or is not honest, the
            first honest one.
    """

    def forge(seen: Seen) -> Tensor:
        if nobody_is_honest(seen):
            return seen.own
        honest = seen.client_ids[~seen.is_byzantine.numpy()]
        found = np.flatnonzero(honest == victim).tolist() if victim is not None else []
        return seen.honest[found[0] if found else 0].expand(len(seen.own), -1)

    return forge


@_attack("honest updates")
def min_max(*, direction: Direction = "deviation") -> Forge:
    """The furthest update in a bad direction that is no further from any honest one than two are.

    Shejwalkar and Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and
    Defenses for Federated Learning", NDSS 2021: mean + gamma p with the largest gamma such that its
    distance to no honest update exceeds the largest between two of them. Deviation: gamma is
    computed, where the paper searches by halving. With nobody honest the attackers send their own.

    Args:
        direction: p: the honest updates' standard "deviation", their unit "mean", or the "sign" of
            their mean; each negative.
    """
    if direction not in get_args(Direction):
        raise ScenarioError(f"[attack] direction = {direction!r}: must be deviation, mean or sign")

    def forge(seen: Seen) -> Tensor:
        if nobody_is_honest(seen):
            return seen.own
        honest = seen.honest
        mean = honest.mean(dim=0)
        bad = honest.std(dim=0, correction=0)
        if direction != "deviation":
            size = honest.abs().mean(dim=0)  # a mean that cancels is zero and has no sign
            mean_or_zero = torch.where(mean.abs() > 16 * EPSILON * size, mean, 0.0)
            length = mean_or_zero.norm().clamp(min=1e-300)
            bad = mean_or_zero.sign() if direction == "sign" else mean_or_zero / length
        largest = Updates.of(honest).squared_distances().max()
        # |mean - bad gamma - x|^2 <= largest, a quadratic inequality in gamma for each x
        apart, square = mean - honest, bad @ bad
        along = apart @ bad
        room = (largest - apart.square().sum(dim=1)).clamp(min=0)
        roots = (along + (along.square() + square * room).sqrt()) / square
        gamma = float(roots.min()) if square > 0 else 0.0
        forged: Tensor = mean - gamma * bad
        return forged.expand(len(seen.own), -1)

    return forge


@_attack("own update")
def packet_loss(*, rate: float = 0.1, packet_bytes: int = 1500) -> Forge:
    """Packets of the update that get lost: runs of coordinates that are zero. A fault, not malice.

    Args:
        rate: Probability that a packet is lost, in [0, 1].
        packet_bytes: Bytes of a packet, >= 1; it holds whole coordinates, at least one.

    Raises:
        ScenarioError: If an argument is outside its range.
    """
    if not 0 <= rate <= 1:
        raise ScenarioError(f"[attack] rate = {rate}: must be in [0, 1]")
    if packet_bytes < 1:
        raise ScenarioError(f"[attack] packet_bytes = {packet_bytes}: must be >= 1")

    def forge(seen: Seen) -> Tensor:
        dim, run = seen.updates.shape[1], max(1, packet_bytes // seen.updates.element_size())
        arrived = np.stack([draw.random(-(-dim // run)) >= rate for draw in seen.generators()])
        return seen.own * torch.from_numpy(arrived.repeat(run, axis=1)[:, :dim])

    return forge


@_attack("data")
def label_flip(
    *, source: int | None = None, target: int | None = None
) -> tuple[Forge | None, Effect]:
    """Wrong targets at the attackers, who train on them as the others do on theirs.

    Args:
        source: The class whose samples get one; all classes if left out.
        target: The class that they get; C - 1 minus their own if left out.
    """
    return None, FlippedLabels(source, target)


@_attack("data")
def backdoor(
    *, target: int = 0, size: int = 2, value: float = 1.0, share: float = 0.5, boost: float = 1.0
) -> tuple[Forge | None, Effect]:
    """A pattern in some of the attackers' samples, all with one target: the model learns both.

    Bagdasaryan, Veit, Hua, Estrin and Shmatikov, "How To Backdoor Federated Learning", AISTATS 2020
    (arXiv:1807.00459), with a pattern as in Gu et al., "BadNets", 2017 (arXiv:1708.06733).
    `test/attack_success` is the share of the server's test samples of other classes that the model
    takes for the target once they have the pattern.

    Args:
        target: The class.
        size: Of the pattern, >= 1: the last so many rows and columns of a picture, or the last so
            many numbers of a vector.
        value: What the features are there, as the model sees them.
        share: Which share of an attacker's samples has it, in (0, 1].
        boost: Factor on the attackers' updates, to count for more; > 0.

    Raises:
        ScenarioError: If an argument is outside its range.
    """
    for key, number, holds, allowed in (
        ("size", size, size >= 1, ">= 1"),
        ("value", value, abs(value) <= _LARGEST, f"in [-{_LARGEST:.2g}, {_LARGEST:.2g}]"),
        ("share", share, 0 < share <= 1, "in (0, 1]"),
        ("boost", boost, boost > 0, "> 0"),
    ):
        if not holds:
            raise ScenarioError(f"[attack] {key} = {number}: must be {allowed}")

    def forge(seen: Seen) -> Tensor:
        return boost * seen.own

    return None if boost == 1 else forge, Trigger(target, size, value, share)


def alie_z(clients: int, num_byzantine: int) -> float:
    """Return the z_max of A Little Is Enough: the largest z that a majority still supports.

    With s = floor(n / 2 + 1) - f supporters needed among the n - f honest clients, it is the normal
    quantile of (n - f - s) / (n - f). At least one supporter is needed, and z is at least 0.

    Args:
        clients: n, the clients that replied.
        num_byzantine: f < n of them attack.

    Example:
        >>> round(alie_z(50, 24), 2)
        1.43
    """
    honest = clients - num_byzantine
    supporters = max(1, clients // 2 + 1 - num_byzantine)
    return NormalDist().inv_cdf(max(0.5, (honest - supporters) / honest))
