"""FedLEx: federated loss exploration, a guidance map for local steps.

Interno, Olhofer, Jin and Hammer, "Federated Loss Exploration for Improved Convergence on Non-IID
Data", IJCNN 2024 (arXiv:2506.18640), the equations of its architecture figure. Before round 1 some
clients explore: they train from the initial model, and parameters that move far are taken for worth
moving. Their maps, scaled to [0, 1] and averaged, multiply every later local step.

The client side is two parts of `local_sgd`: `exploration` says how clients explore (E_exp), and
`guidance` where the map acts.

Symbols: D_i squared deviation of explorer i, G_i its map, G guidance, C_exp explorers.

Deviations:
- Explorers train copies of the initial model (the figure); the released code lets them train one
  shared model in turn, from which round 1 then starts.
- Minimum and maximum are taken per explorer and tensor; the figure does not say.
- A tensor whose deviation is constant gets the map 1 (no restriction); the code gives NaN. It is
  constant when it differs by no more than the rounding of the weights, of some hundred steps: the
  two output biases of a two-class softmax always move equally far, whatever their last digits say.
- The map acts in the round whose participants it is averaged over (in the code in the next one).
- Exploring for a fixed number of epochs; the code stops early by a patience.
- A client without samples explores nothing and has no map.
- The code's robust scaling, which yields negative factors, is not offered.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_choice
from fedsim.basics.rng import generator
from fedsim.client import GUIDANCE
from fedsim.messages.layout import Payload
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, LinearStrategy, Setup, State

Deviation = Literal["squared", "absolute"]
Order = Literal["normalise-then-average", "average-then-normalise"]
_ROUNDING = 128  # of a weight after an exploration, in roundings of its dtype; up to 8 were seen


def guidance(
    initial: Tensor,
    explored: Tensor,
    *,
    deviation: Deviation = "squared",
    order: Order = "normalise-then-average",
) -> Tensor:
    """Return one tensor's guidance, between 0 and 1.

    Args:
        initial: The tensor before exploration, `[...]`.
        explored: Each explorer's after it, `[explorers, ...]`; those whose deviation is not finite
            are dropped.
        deviation: How a parameter's way is measured: (a - b)^2 or |a - b|.
        order: The figure scales each explorer's map to [0, 1] and then averages; the released code
            averages first.

    Returns:
        `[...]` in the dtype of `initial`; 1 everywhere without explorers, and where nothing
        deviates more than anything else.

    Raises:
        ValueError: If `deviation` or `order` is neither of its two.

    Example:
        >>> guidance(torch.zeros(3), torch.tensor([[1.0, 2.0, 3.0]]), deviation="absolute")
        tensor([0.0000, 0.5000, 1.0000])
    """
    require_choice("deviation", deviation, Deviation)
    require_choice("order", order, Order)
    rows = explored.reshape(len(explored), initial.numel())
    away = _deviations(rows, initial.reshape(-1), deviation)
    away = away[torch.isfinite(away).all(dim=1)]
    if not len(away):
        return torch.ones_like(initial)
    if order == "normalise-then-average":
        found = _normalised(away, explored.dtype).mean(dim=0)
    else:
        found = _normalised(away.mean(dim=0)[None], explored.dtype)[0]
    return found.reshape(initial.shape).to(initial.dtype)


def _deviations(rows: Tensor, initial: Tensor, deviation: Deviation) -> Tensor:
    """How far each parameter of a tensor went, float64; alike where that is so but for rounding."""
    after, before = rows.double(), initial.double()
    way = (after - before).abs()
    low, high = way.amin(dim=1, keepdim=True), way.amax(dim=1, keepdim=True)
    size = after.abs().amax(dim=1, keepdim=True).clamp(min=float(before.abs().max()))
    alike = high - low <= _ROUNDING * torch.finfo(rows.dtype).eps * size
    way = torch.where(alike, high, way)
    return way**2 if deviation == "squared" else way


def _normalised(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row scaled to [0, 1]; a row that is constant but for rounding becomes 1."""
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    width = high - low
    differs = width > _ROUNDING * torch.finfo(dtype).eps * high
    return torch.where(differs, (rows - low) / width, 1.0)  # 0 / 0 is not taken


class Maps(NamedTuple):
    """What exploration found, and the server's momentum.

    Attributes:
        explorers: int64 `[E]`, who explored, ascending.
        maps: `[E, dim]`, their maps: scaled to [0, 1], or raw and in float64 when averaged first;
            `[1, dim]`, the mean of them, when not every client was to explore.
        velocity: float64 `[dim]`, the server's momentum.
        mean: Mean of the guidance over all explorers and parameters.
        frozen: Share of the parameters whose guidance is 0.
    """

    explorers: Tensor
    maps: Tensor
    velocity: Tensor
    mean: float
    frozen: float


@final
class FedLEx(LinearStrategy):
    """Federated averaging whose clients' steps are multiplied by an explored guidance.

    When every client explores, a round's guidance is averaged over its participants, else over all
    explorers. Without anybody's map the guidance is 1.

    Args:
        explorers: C_exp, the share of clients that explore; in (0, 1], at least one does.
        deviation: "squared" (the paper) or "absolute".
        order: The figure's order or the released code's, see `guidance`.
        floor: Lower bound of the guidance, in [0, 1]; 0 can freeze parameters for good, 1 switches
            the guidance off.
        server_lr: Factor on the mean update; > 0.
        server_momentum: mu of v = mu v + (1 - mu) * mean update, in [0, 1) (0.9 in the released
            configuration).
        weighted: Whether clients count by their examples.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({"floor": 1.0}, "fedavg", {}),)
    sends: ClassVar[tuple[str, ...]] = (GUIDANCE,)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"guidance": {}}

    def __init__(
        self,
        *,
        explorers: float = 1.0,
        deviation: Deviation = "squared",
        order: Order = "normalise-then-average",
        floor: float = 0.0,
        server_lr: float = 1.0,
        server_momentum: float = 0.0,
        weighted: bool = True,
    ) -> None:
        for name, value, holds, allowed in (
            ("explorers", explorers, 0 < explorers <= 1, "in (0, 1]"),
            ("floor", floor, 0 <= floor <= 1, "in [0, 1]"),
            ("server_lr", server_lr, 0 < server_lr < math.inf, "> 0 and finite"),
            ("server_momentum", server_momentum, 0 <= server_momentum < 1, "in [0, 1)"),
        ):
            if not holds:
                raise ValueError(f"{name} = {value!r}: must be {allowed}")
        require_choice("deviation", deviation, Deviation)
        require_choice("order", order, Order)
        self._explorers = explorers
        self._deviation: Deviation = deviation
        self._averages_first = order == "average-then-normalise"
        self._floor = floor
        self._server_lr = server_lr
        self._server_momentum = server_momentum
        self._weighted = weighted

    def init(self, params: Tensor, clients: int) -> State:
        """Nobody has explored."""
        nobody = torch.zeros(0, dtype=torch.int64)
        still = torch.zeros(len(params), dtype=torch.float64)
        dtype = torch.float64 if self._averages_first else params.dtype
        return Maps(nobody, torch.zeros((0, len(params)), dtype=dtype), still, 1.0, 0.0)

    def setup(self, state: State, params: Tensor, clients: int) -> Setup:
        """Let the explorers train from the initial model."""
        count = max(1, math.floor(self._explorers * clients + 1e-9))
        chosen = generator(self.seed, "explorers").choice(clients, count, replace=False)
        return Setup(np.sort(chosen).astype(np.int64), Payload())

    def finish_setup(self, state: State, params: Tensor, replies: Replies) -> State:
        """Keep the maps of those who explored: who has no sample has not."""
        assert replies.params is not None
        parts = self.layout.slices.values()
        ways = [_deviations(replies.params[:, p], params[p], self._deviation) for p in parts]
        away = torch.cat(ways, dim=1)
        explored = torch.isfinite(away).all(dim=1) & (replies.num_examples > 0)
        away = away[explored]
        maps = away if self._averages_first else self._per_tensor(away, params.dtype)
        if self._explorers < 1 and len(maps):  # the same for all rounds
            maps = maps.mean(dim=0, keepdim=True)
        kept = state._replace(
            explorers=torch.from_numpy(replies.client_ids)[explored], maps=maps.to(state.maps.dtype)
        )
        found = self._guidance(kept, params, replies.client_ids)
        return kept._replace(
            mean=float(found.double().mean()), frozen=float((found == 0).double().mean())
        )

    def broadcast(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Return the model and the round's guidance."""
        found = self.layout.unflatten(self._guidance(state, params, cohort))
        return Payload(params, {}, {f"{GUIDANCE}.{n}": g for n, g in found.items()}), Payload()

    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """n_k, or 1."""
        return num_examples.double() if self._weighted else torch.ones(len(client_ids)).double()

    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return the model moved by the mean update's momentum; it stays when nobody answered."""
        metrics = {"guidance_mean": state.mean, "guidance_frozen": state.frozen}
        if not weight_sum:
            return params, state, metrics
        mu = self._server_momentum
        velocity = mu * state.velocity + (1 - mu) * (weighted_sum / weight_sum)
        moved = params.double() + self._server_lr * velocity
        return moved.to(params.dtype), state._replace(velocity=velocity), metrics

    def _guidance(self, state: State, params: Tensor, cohort: np.ndarray) -> Tensor:
        """The guidance of a round, `[dim]` in the parameters' dtype."""
        if not len(state.explorers):
            return torch.ones_like(params)
        here = np.isin(state.explorers.numpy(), cohort)
        rows = state.maps if self._explorers < 1 or not here.any() else state.maps[here]
        mean = rows.double().mean(dim=0)
        if self._averages_first:
            mean = self._per_tensor(mean[None], params.dtype)[0]
        bounded: Tensor = mean.clamp(min=self._floor).to(params.dtype)
        return bounded

    def _per_tensor(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Each tensor of each row scaled to [0, 1]."""
        parts = [_normalised(rows[:, part], dtype) for part in self.layout.slices.values()]
        return torch.cat(parts, dim=1)
