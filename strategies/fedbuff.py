"""FedBuff: a server step for every few replies, late ones counting less.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek and Huba, "Federated Learning with Buffered
Asynchronous Aggregation", AISTATS 2022 (arXiv:2106.06639), Algorithm 1, server side. The buffer is
the clock's: `[clock] trigger = "count"` with `count` = K, and `restart = "at_once"`, so that a
client that has answered is replaced by another.

Symbols: Delta_k update of client k, s_k its staleness, K the replies of an aggregation, eta_g
server_lr.

Deviations:
- What makes a step of the mean, such as momentum, is `[strategy.server]`.
- Under other triggers K is the number of replies that are there.
- No reply is left in a buffer: at the end of a run jobs are under way, and nobody waits for them.
"""

from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators.staleness import Discount, discount
from fedsim.basics.errors import require_choice, require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, LinearStrategy, NoState, State, weighted_sum


@final
class FedBuff(LinearStrategy):
    """Moves the model by the mean of the replies' updates, each times a discount for its age.

    Args:
        staleness: What an update of age s counts: "polynomial", (1 + s)^-exponent; "constant", 1.
        exponent: Of the polynomial; > 0. The paper's is 1/2.
        max_staleness: Updates older than this do not count, nor among the K; at least 0, or "none".
        weighted: Whether clients count by their examples besides; the paper's do not.
        server_lr: eta_g, the factor on the step; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}),
        Degenerate({"weighted": True}, "fedavg", {}),
    )
    reads_staleness: ClassVar[bool] = True

    def __init__(
        self,
        *,
        staleness: Discount = "polynomial",
        exponent: float = 0.5,
        max_staleness: int | str = "none",
        weighted: bool = False,
        server_lr: float = 1.0,
    ) -> None:
        require_choice("staleness", staleness, Discount)
        require_positive("exponent", exponent)
        require_positive("server_lr", server_lr)
        if max_staleness != "none" and not (isinstance(max_staleness, int) and max_staleness >= 0):
            raise ValueError(
                f'max_staleness = {max_staleness!r}: must be an integer >= 0, or "none"'
            )
        self._staleness, self._exponent, self._weighted = staleness, exponent, weighted
        self._max_staleness = None if max_staleness == "none" else int(max_staleness)
        self._server_lr = server_lr

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """1, or n_k: what a reply counts that is not late."""
        return num_examples.double() if self._weighted else torch.ones(len(client_ids)).double()

    def reply_weights(self, state: State, replies: Replies) -> Tensor:
        """The weights times the discount; 0 for what is too old."""
        known = discount(replies.staleness, self._staleness, exponent=self._exponent)
        return self._young(state, replies) * known

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Take the discounted sum; a discount makes the step smaller, for K counts whole."""
        assert replies.params is not None
        weights = self.reply_weights(state, replies)
        total = weighted_sum(weights, replies.params, replies.reference)
        young = self._young(state, replies)
        params, state, _ = self.apply(state, params, total, float(young.sum()))
        return params, state, {"too_old": int((young == 0).sum())}

    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + (eta_g / K) sum_k s(s_k) Delta_k; the model stays when nobody answered."""
        if not weight_sum:
            return params, state, {}
        moved = params.double() + self._server_lr * (weighted_sum / weight_sum)
        return moved.to(params.dtype), state, {}

    def _young(self, state: State, replies: Replies) -> Tensor:
        """The weights of replies that are not too old, and 0."""
        weights = self.weights(state, replies.client_ids, replies.num_examples)
        if self._max_staleness is None:
            return weights
        return weights * (replies.staleness <= self._max_staleness)
