"""Multi-Krum: the mean of the updates that lie closest to others.

Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent", NeurIPS 2017: the Krum function and its variant Multi-Krum.

Symbols: V_i update of client i, s(i) its score, n clients that replied, f num_byzantine,
m num_selected.

Deviations:
- m is left to choose by the paper (m = 1 is Krum, m = n the mean); by default it is n - f, the most
  that can all be honest.
- The paper knows n and f. Here the clients that reply vary, and by default f is the most that n
  bear, (n - 3) // 2; with a given f, a round with fewer than 2 f + 3 replies is an error.
- With f = 0 there is nothing to withstand, and any n will do.
- Equal scores (the paper: any of them) go by the score with a neighbour more, and so on, then by
  the smaller sum of entries; what is equal by all of that shares the places it takes.
- The Flag Aggregator's released library, which has it as a baseline, sums n - f - 1 distances that
  are not squared and averages n - f - 2 updates; fedsim follows the paper.
"""

from typing import ClassVar, final

from torch import Tensor

from fedsim.aggregators import KRUM, multi_krum
from fedsim.aggregators.selection import check_selected, multi_krum_of
from fedsim.aggregators.updates import Updates
from fedsim.basics.errors import RunError, require_positive
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, NoState, State

__all__ = ["MultiKrum", "multi_krum"]


@final
class MultiKrum(FederatedStrategy):
    """Moves the model by the mean of those updates that lie closest to others.

    Clients count equally.

    Args:
        num_byzantine: f, how many of a round's clients may reply anything; >= 0. A round needs
            2 f + 3 replies. None takes the most that a round's replies bear.
        num_selected: m, how many updates are averaged; >= 1. 1 is Krum, None takes all but f.
        server_lr: Factor on the mean; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"num_byzantine": 0}, "fedavg", {"weighted": False}, tolerance=1e-12),
        Degenerate({}, "fedavg", {"weighted": False}, "identical clients", 1e-12),
    )

    def __init__(
        self,
        *,
        num_byzantine: int | None = None,
        num_selected: int | None = None,
        server_lr: float = 1.0,
    ) -> None:
        if num_byzantine is not None and num_byzantine < 0:
            raise ValueError(f"num_byzantine = {num_byzantine}: must be >= 0")
        if num_selected is not None and num_selected < 1:
            raise ValueError(f"num_selected = {num_selected}: must be >= 1")
        require_positive("server_lr", server_lr)
        self._num_byzantine = num_byzantine
        self._num_selected = num_selected
        self._server_lr = server_lr

    def check(self, clients: int, cohort: int) -> None:
        """Refuse cohorts too small for `num_byzantine` or `num_selected`."""
        if self._num_byzantine is not None or self._num_selected is not None:
            f = KRUM.bearable(cohort) if self._num_byzantine is None else self._num_byzantine
            KRUM.require(cohort, f)
            check_selected(cohort, self._num_selected)

    def init(self, params: Tensor, clients: int) -> State:
        """Nothing is remembered."""
        return NoState()

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return the model moved by the selected updates' mean; it stays when nobody answered.

        Raises:
            RunError: If the replies are too few for `num_byzantine` or `num_selected`.
        """
        if not replies.num_clients:
            return params, state, {}
        tolerated = self._tolerated(replies.num_clients, f"round {replies.server_round}")
        assert replies.params is not None
        updates = Updates.of(replies.params, replies.reference)
        mean = multi_krum_of(updates, tolerated, self._num_selected).to(params.dtype)
        return params + self._server_lr * mean, state, {"num_byzantine": tolerated}

    def _tolerated(self, clients: int, where: str) -> int:
        """The f of a round."""
        f = KRUM.bearable(clients) if self._num_byzantine is None else self._num_byzantine
        try:
            KRUM.require(clients, f)
            check_selected(clients, self._num_selected)
        except ValueError as error:
            raise RunError(f"{where}: {error}") from None
        return f
