"""A robust rule with what comes before it, as a scenario names it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators import before as mixing
from fedsim.aggregators import coordinatewise, geometric, selection
from fedsim.aggregators.bounds import BULYAN, KRUM, MAJORITY, Bound
from fedsim.aggregators.updates import Updates
from fedsim.basics.errors import require_choice
from fedsim.basics.ties import Jump

RuleName = Literal[
    "mean", "coordinate_median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "bulyan",
    "meamed", "phocas", "centred_clipping", "unit_mean",
]  # fmt: skip
Variant = Literal["paper", "byzfl", "flower", "flag"]
BeforeName = Literal["nnm", "bucketing", "clipping", "arc"]


class Round(NamedTuple):
    """What a rule may use of a round besides the updates.

    Attributes:
        num_byzantine: f.
        draw: For what is random.
        centre: Where centred clipping begins, float64 `[dim]`.
        num_examples: float64 `[n]`, for Flower's Krum.
    """

    num_byzantine: int
    draw: np.random.Generator
    centre: Tensor
    num_examples: Tensor | None = None

    def bucketed(self, means: Tensor) -> "Round":
        """Return it for buckets, `[buckets, n]`, each with the examples of all who are in it."""
        if self.num_examples is None:
            return self
        return self._replace(num_examples=(means > 0).double() @ self.num_examples)


class _Rule(NamedTuple):
    """A rule and what is known of it.

    Attributes:
        aggregate: What it makes of updates.
        bound: How many it needs.
        degree: By which power of a factor its result grows when the updates grow by that factor;
            None if it knows a length of its own.
        jumps: Where it is discontinuous.
    """

    aggregate: Callable[["Recipe", Updates, Round], Tensor]
    bound: Bound = MAJORITY
    degree: int | None = 1
    jumps: tuple[Jump, ...] = ()


def _flower_krum(recipe: "Recipe", updates: Updates, given: Round) -> Tensor:
    return selection.multi_krum_of(
        updates, given.num_byzantine, recipe.selected or 1, weights=given.num_examples,
        neighbours=max(1, len(updates) - given.num_byzantine - 2),
    )  # fmt: skip


_CHOSEN = (
    Jump(
        ("clients",),
        ("lattice",),
        "one of updates has to be chosen that neither distances nor sums of entries tell apart",
    ),
)
_RULES: dict[tuple[str, str], _Rule] = {
    ("mean", "paper"): _Rule(
        lambda _, u, given: u.combined(torch.full((len(u),), 1 / len(u), dtype=torch.float64))
    ),
    ("coordinate_median", "paper"): _Rule(lambda _, u, given: coordinatewise.median_of(u)),
    ("coordinate_median", "flag"): _Rule(
        lambda _, u, given: coordinatewise.median_of(u, lower=True)
    ),
    ("trimmed_mean", "paper"): _Rule(
        lambda _, u, given: coordinatewise.trimmed_mean_of(u, given.num_byzantine)
    ),
    ("geometric_median", "paper"): _Rule(lambda _, u, given: geometric.geometric_median_of(u)),
    ("geometric_median", "byzfl"): _Rule(
        lambda _, u, given: geometric.smoothed_median_of(u), degree=None
    ),
    ("multi_krum", "paper"): _Rule(
        lambda r, u, given: selection.multi_krum_of(u, given.num_byzantine, r.selected), KRUM
    ),
    ("multi_krum", "byzfl"): _Rule(
        lambda r, u, given: selection.krum_byzfl_of(u, given.num_byzantine, r.selected)
    ),
    ("multi_krum", "flower"): _Rule(_flower_krum, KRUM),
    ("multi_krum", "flag"): _Rule(
        lambda r, u, given: selection.krum_flag_of(u, given.num_byzantine, r.selected), KRUM
    ),
    ("bulyan", "paper"): _Rule(
        lambda _, u, given: selection.bulyan_of(u, given.num_byzantine), BULYAN, jumps=_CHOSEN
    ),
    ("bulyan", "flower"): _Rule(
        lambda _, u, given: selection.bulyan_of(u, given.num_byzantine, repeated=False), BULYAN
    ),
    ("bulyan", "flag"): _Rule(
        lambda _, u, given: selection.bulyan_flag_of(u, given.num_byzantine), BULYAN
    ),
    ("meamed", "paper"): _Rule(
        lambda _, u, given: coordinatewise.meamed_of(u, given.num_byzantine)
    ),
    ("meamed", "flag"): _Rule(
        lambda _, u, given: coordinatewise.meamed_of(u, given.num_byzantine, lower=True)
    ),
    ("phocas", "paper"): _Rule(
        lambda _, u, given: coordinatewise.phocas_of(u, given.num_byzantine)
    ),
    ("centred_clipping", "paper"): _Rule(
        lambda r, u, given: geometric.centred_clipping_of(
            u, given.centre, r.clip_radius, r.clip_iterations or 1
        )
    ),
    ("unit_mean", "paper"): _Rule(lambda _, u, given: geometric.unit_mean_of(u)[0], degree=0),
}
for _variant in ("paper", "byzfl", "flower", "flag"):  # Krum is Multi-Krum of one
    _RULES["krum", _variant] = _RULES["multi_krum", _variant]


@dataclass(frozen=True)
class Recipe:
    """A rule and what comes before it.

    Attributes:
        rule: The rule.
        variant: Whose: "paper", or a library's where it differs.
        num_byzantine: f; None takes the most that a round's updates bear.
        before: What is done to the updates first, in this order: "nnm" (nearest-neighbour mixing),
            "bucketing", "clipping", "arc" (adaptive robust clipping).
        num_selected: m of multi_krum; None takes n - f (flag n - f - 2, flower 1).
        clip_radius: tau of centred_clipping; None takes the median distance from its centre.
        clip_iterations: L of centred_clipping; None is 1.
        bucket_size: s of "bucketing"; None is 2.
        clip_norm: Length of "clipping"; None takes the median of the updates' lengths.

    Raises:
        ValueError: If a value is outside its range, a variant not defined, or a key without effect.
    """

    rule: RuleName = "trimmed_mean"
    variant: Variant = "paper"
    num_byzantine: int | None = None
    before: Sequence[BeforeName] = ()
    num_selected: int | None = None
    clip_radius: float | None = None
    clip_iterations: int | None = None
    bucket_size: int | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        require_choice("rule", self.rule, RuleName)
        require_choice("variant", self.variant, Variant)
        for name in self.before:
            require_choice("before", name, BeforeName)
        if (self.rule, self.variant) not in _RULES:
            known = [variant for rule, variant in _RULES if rule == self.rule]
            raise ValueError(
                f"variant = {self.variant!r} of rule = {self.rule!r}: is not defined; allowed: "
                f"{', '.join(known)}"
            )
        for key, value, least in (
            ("num_byzantine", self.num_byzantine, 0),
            ("num_selected", self.num_selected, 1),
            ("clip_iterations", self.clip_iterations, 1),
            ("bucket_size", self.bucket_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{key} = {value}: must be >= {least}")
        for key, length in (("clip_radius", self.clip_radius), ("clip_norm", self.clip_norm)):
            if length is not None and not 0 < length < math.inf:
                raise ValueError(f"{key} = {length}: must be > 0 and finite")
        for key, given, owner, used in (
            ("num_selected", self.num_selected, "rule", self.rule == "multi_krum"),
            ("clip_radius", self.clip_radius, "rule", self.rule == "centred_clipping"),
            ("clip_iterations", self.clip_iterations, "rule", self.rule == "centred_clipping"),
            ("bucket_size", self.bucket_size, "before", "bucketing" in self.before),
            ("clip_norm", self.clip_norm, "before", "clipping" in self.before),
        ):
            if given is not None and not used:
                chosen = self.rule if owner == "rule" else list(self.before)
                raise ValueError(
                    f"{key} = {given}: is without effect with {owner} = {chosen!r}; leave it out"
                )
        if self.num_byzantine and self.rule == "mean":
            raise ValueError(
                f"num_byzantine = {self.num_byzantine} with rule = 'mean': a mean bears none, "
                "whatever comes before it; use at most 0, or another rule"
            )

    @property
    def selected(self) -> int | None:
        """How many updates Multi-Krum averages."""
        return 1 if self.rule == "krum" else self.num_selected

    @property
    def bound(self) -> Bound:
        """What the rule itself asks for."""
        return _RULES[self.rule, self.variant].bound

    def check(self, updates: int) -> int:
        """Return f for so many updates.

        Raises:
            ValueError: If they do not bear `num_byzantine`, with the bound, or are too few for
                `num_selected`.
        """
        if self.num_byzantine is not None:
            self._require(updates, self.num_byzantine)
            tolerated = self.num_byzantine
        else:
            tolerated = self.bearable(updates)
        if self.num_selected is not None:
            selection.check_selected(self._left(updates), self.num_selected)
        return tolerated

    def bearable(self, updates: int) -> int:
        """Return the largest f that so many updates bear."""
        if self.rule == "mean":
            return 0
        found = self.bound.bearable(self._left(updates))
        return min(found, MAJORITY.bearable(updates)) if self.before else found

    def aggregate(self, updates: Updates, given: Round) -> Tensor:
        """Return the aggregate of n >= 1 updates, float64 `[dim]`; `check` says with which f."""
        for name in self.before:
            if name == "nnm":
                updates = mixing.nearest_neighbour_mixing(updates, given.num_byzantine)
            elif name == "bucketing":
                means = mixing.bucketing(len(updates), self._size, given.draw)
                updates, given = updates.mixed(means), given.bucketed(means)
            elif name == "clipping":
                updates = mixing.clipping(updates, self.clip_norm)
            else:
                updates = mixing.adaptive_clipping(updates, given.num_byzantine)
        return _RULES[self.rule, self.variant].aggregate(self, updates, given)

    @property
    def _size(self) -> int:
        return 2 if self.bucket_size is None else self.bucket_size

    def _left(self, updates: int) -> int:
        """How many updates the rule sees."""
        for _ in range(list(self.before).count("bucketing")):
            updates = -(-updates // self._size)
        return updates

    def _require(self, updates: int, num_byzantine: int) -> None:
        MAJORITY.require(updates, num_byzantine)
        try:
            self.bound.require(self._left(updates), num_byzantine)
        except ValueError as error:
            buckets = f" (of {updates} updates)" if self._left(updates) != updates else ""
            raise ValueError(f"{error}{buckets}") from None


def degree(rule: str, variant: str = "paper") -> int | None:
    """Return the power of a factor on the updates by which a rule's result grows, or None.

    Example:
        >>> degree("krum"), degree("unit_mean"), degree("geometric_median", "byzfl")
        (1, 0, None)
    """
    return _RULES[rule, variant].degree


def jumps(rule: str, variant: str = "paper") -> tuple[Jump, ...]:
    """Return where a rule is discontinuous; elsewhere rounding moves its result by rounding."""
    return _RULES[rule, variant].jumps


def rules() -> dict[str, list[str]]:
    """Return the variants of every rule by its name.

    Example:
        >>> rules()["bulyan"]
        ['paper', 'flower', 'flag']
    """
    return {
        name: [variant for rule, variant in _RULES if rule == name] for name in get_args(RuleName)
    }
