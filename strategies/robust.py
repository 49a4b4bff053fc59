"""Robust aggregation: a rule that bears f Byzantine updates, with what comes before it.

The rules, their papers, their bounds on f and the libraries' variants are in `fedsim.aggregators`;
`coordinate_median`, `multi_krum` and `unit_mean` are strategies of their own as well.

Deviations:
- The papers know n and f. Here the clients that reply vary, and by default f is the most that they
  bear; with a given f, a round with fewer replies than it asks for is an error.
- Clients count equally (variant "flower" of Krum: by examples) and may train for several steps,
  where most papers have one gradient.
- Centred clipping starts from the update of the round before, in its first round from zero. The
  paper clips momentum that clients send; here it is what they send.
- BatchNorm statistics are averaged by examples: the rules are about what is trained.
"""

from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fedsim.aggregators import BeforeName, Recipe, Round, RuleName, Variant
from fedsim.aggregators.updates import Updates
from fedsim.basics.errors import RunError, require_positive
from fedsim.basics.rng import generator
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, State


class Centre(NamedTuple):
    """What a rule begins from.

    Attributes:
        centre: float64 `[dim]`, the update of the round before; `[0]` unless it is asked for.
    """

    centre: Tensor


@final
class Robust(FederatedStrategy):
    """Moves the model by what a robust rule makes of the clients' updates.

    Args:
        rule: mean, coordinate_median, trimmed_mean, geometric_median, krum, multi_krum, bulyan,
            meamed, phocas, centred_clipping or unit_mean.
        variant: "paper", or a library's where it differs: "byzfl", "flower", "flag" (the Flag
            Aggregator's authors).
        num_byzantine: f, how many of a round's clients may reply anything; >= 0. None takes the
            most that a round's replies bear.
        before: What is done to the updates first, in this order: "nnm" (nearest-neighbour mixing),
            "bucketing", "clipping", "arc" (adaptive robust clipping).
        num_selected: How many updates multi_krum averages; >= 1. None takes n - f (flag: n - f - 2;
            flower: 1).
        clip_radius: tau of centred_clipping; > 0. None takes the median distance from its centre.
        clip_iterations: L of centred_clipping; >= 1. None is 1.
        bucket_size: How many updates "bucketing" puts together; >= 1. None is 2.
        clip_norm: The length that "clipping" allows; > 0. None takes the median length.
        server_lr: Factor on the aggregate; > 0.

    Raises:
        ValueError: If an argument is outside its range, or without effect.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"num_byzantine": 0}, "fedavg", {"weighted": False}, tolerance=1e-12),
        Degenerate({"rule": "bulyan"}, "fedavg", {"weighted": False}, "identical clients", 1e-12),
    )

    def __init__(
        self,
        *,
        rule: RuleName = "trimmed_mean",
        variant: Variant = "paper",
        num_byzantine: int | None = None,
        before: tuple[BeforeName, ...] = (),
        num_selected: int | None = None,
        clip_radius: float | None = None,
        clip_iterations: int | None = None,
        bucket_size: int | None = None,
        clip_norm: float | None = None,
        server_lr: float = 1.0,
    ) -> None:
        require_positive("server_lr", server_lr)
        self._recipe = Recipe(
            rule, variant, num_byzantine, tuple(before), num_selected, clip_radius,
            clip_iterations, bucket_size, clip_norm,
        )  # fmt: skip
        self._server_lr = server_lr

    def check(self, clients: int, cohort: int) -> None:
        """Refuse cohorts too small for `num_byzantine` or `num_selected`."""
        self._recipe.check(cohort)

    def init(self, params: Tensor, clients: int) -> State:
        """The first centre is zero."""
        size = len(params) if self._recipe.rule == "centred_clipping" else 0
        return Centre(torch.zeros(size, dtype=torch.float64))

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return the model moved by the aggregate; it stays when nobody answered.

        Raises:
            RunError: If the replies are too few for `num_byzantine` or `num_selected`.
        """
        if not replies.num_clients:
            return params, state, {}
        assert replies.params is not None
        updates = Updates.of(replies.params, replies.reference)
        try:
            tolerated = self._recipe.check(len(updates))
        except ValueError as error:
            raise RunError(f"round {replies.server_round}: {error}") from None
        draw = generator(self.seed, "buckets", replies.server_round)
        examples = replies.num_examples.double()
        found = self._recipe.aggregate(updates, Round(tolerated, draw, state.centre, examples))
        moved = params + self._server_lr * found.to(params.dtype)
        after = Centre(found) if len(state.centre) else state
        return moved, after, {"num_byzantine": tolerated}
