"""EF21 and EF21-W: compressed changes of what is remembered of every client.

Richtarik, Sokolov and Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically
Faster Error Feedback", NeurIPS 2021 (arXiv:2106.05203), Algorithm 2; weights and step sizes of
Richtarik, Gasanov and Burlachenko, "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of
Smoothness Constants", ICLR 2024 (arXiv:2402.10774), Algorithm 2 and Theorem 3. The client side is
the part `ef21`.

Symbols: g_i memory of client i, g their weighted sum, w_i weights, n clients, gamma the step size,
L smoothness of the mean objective, L_i of the clients', alpha contraction of the compressor.

Deviations:
- Updates are in place of gradients: with one full step of size gamma at the clients and server_lr =
  1 it is the algorithm.
- g_i = 0 before a client first answers.
- Buffers are averaged over those who answered, each counting the same.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import RunError, require_positive
from fedsim.basics.idle import Idle
from fedsim.client.compressors import IDLE as COMPRESSOR_IDLE
from fedsim.client.compressors import compressor as named
from fedsim.messages.codecs import MEMORY, SINCE
from fedsim.messages.encoded import read_memory
from fedsim.messages.layout import Payload
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, State, weighted_sum

_log = logging.getLogger("fedsim")


class Memories(NamedTuple):
    """The server's state.

    Attributes:
        memories: `[n, dim]`, g_i / (n w_i).
        since: int64 `[n]`, the round in which each client last answered; 0 before.
    """

    memories: Tensor
    since: Tensor


@final
class EF21(FederatedStrategy):
    """Adds what clients send to what it remembers of them, and steps by the mean of that.

    It remembers n x d numbers.

    Args:
        compressor: "top_k", "random_k", "qsgd", "sign" or "natural".
        share: K / d of top_k and random_k, in (0, 1].
        levels: s of qsgd, from 1 on.
        server_lr: Factor on the step; > 0.
        client_smoothness: L_i of every client, for the weights w_i = L_i / sum_j L_j of EF21-W;
            None is EF21, w_i = 1 / n. With top_k, random_k, sign and qsgd both are one algorithm.

    Raises:
        ValueError: If an argument is outside its range.
    """

    linear: ClassVar[bool] = True
    sends: ClassVar[tuple[str, ...]] = ("ef21",)
    returns: ClassVar[tuple[str, ...]] = (MEMORY,)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "ef21": {"compressor": "compressor", "share": "share", "levels": "levels"}
    }
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({"share": 1.0}, "fedavg", {"weighted": False}, tolerance=1e-12),
    )

    idle: ClassVar[tuple[Idle, ...]] = COMPRESSOR_IDLE

    def __init__(
        self,
        *,
        compressor: str = "top_k",
        share: float = 0.05,
        levels: int = 8,
        server_lr: float = 1.0,
        client_smoothness: Sequence[float] | None = None,
    ) -> None:
        require_positive("server_lr", server_lr)
        named(compressor, share=share, levels=levels)  # or refused
        for place, constant in enumerate(client_smoothness or ()):
            require_positive(f"client_smoothness[{place}]", constant)
        self._server_lr = server_lr
        self._smoothness = None if client_smoothness is None else tuple(client_smoothness)

    def check(self, clients: int, cohort: int) -> None:
        """Refuse constants of another number of clients."""
        if self._smoothness is not None and len(self._smoothness) != clients:
            raise ValueError(
                f"client_smoothness: {len(self._smoothness)} constants for {clients} clients; "
                "give one for each"
            )

    def init(self, params: Tensor, clients: int) -> State:
        """g_i = 0."""
        return Memories(params.new_zeros((clients, len(params))), torch.zeros(clients).long())

    def broadcast(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Return the model, and for each client the round of g_i and n w_i."""
        memories = _with_room(state, cohort)
        since = memories.since[cohort]
        scale = self._scales(len(memories.since))[cohort]
        return Payload(params), Payload(extra={"ef21.since": since, "ef21.scale": scale})

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """1 for everybody who answered."""
        return torch.ones(replies.num_clients, dtype=torch.float64)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + server_lr * g, with g = sum_i w_i u_i after what came, u_i = g_i / (n w_i)."""
        ids, memories = replies.client_ids, _with_room(state, replies.client_ids)
        if len(ids):
            memories = _remembered(memories, replies)
        clients = len(memories.since)
        nothing = torch.zeros_like(params)
        total = weighted_sum(self._scales(clients), memories.memories, nothing)
        moved = params.double() + self._server_lr * (total / clients)
        return moved.to(params.dtype), memories, {}

    def _scales(self, clients: int) -> Tensor:
        """Return n w_i, float64 `[n]`."""
        if self._smoothness is None:
            return torch.ones(clients, dtype=torch.float64)
        constants = torch.tensor(self._smoothness, dtype=torch.float64)
        return constants * (clients / math.fsum(self._smoothness))


def _with_room(state: State, ids: np.ndarray) -> Memories:
    """The memories, with zeros for clients that joined later."""
    assert isinstance(state, Memories)
    more = int(ids.max(initial=-1)) + 1 - len(state.since)
    if more <= 0:
        return state
    zeros = state.memories.new_zeros((more, state.memories.shape[1]))
    return Memories(
        torch.cat([state.memories, zeros]), torch.cat([state.since, zeros[:, 0].long()])
    )


def _remembered(state: Memories, replies: Replies) -> Memories:
    """The memories after these replies."""
    named = {n: t for n, t in replies.encoded.items() if n.startswith(f"{MEMORY}.")}
    told = named.pop(f"{MEMORY}.{SINCE}", None)
    if told is None:
        raise RunError(
            f"round {replies.server_round}: clients returned no change of what is remembered of "
            'them; give them the part: [client] parts = [{ name = "ef21" }]'
        )
    ids, told = torch.from_numpy(replies.client_ids), told.reshape(-1).long()
    # a client that forgot starts from 0; what is written against any other round cannot be read
    fits = (told == state.since[ids]) | (told == 0)
    for client in ids[~fits].tolist():
        _log.warning(
            "client %d, round %d: wrote against a round that is not remembered; what is remembered "
            "of it stays", client, replies.server_round,
        )  # fmt: skip
    ids, told, named = ids[fits], told[fits], {n: t[fits] for n, t in named.items()}
    base = torch.where((told == 0)[:, None], 0, state.memories[ids])
    memories, since = state.memories.clone(), state.since.clone()
    memories[ids], since[ids] = read_memory(base, named), replies.server_round
    return Memories(memories, since)


def step_size(
    smoothness: float,
    client_smoothness: Sequence[float],
    contraction: float,
    *,
    rule: Literal["reloaded", "original"] = "reloaded",
    rate: float = 1.0,
) -> float:
    """Return the largest gamma for which the analysis holds, for gradients of whole clients.

    Error Feedback Reloaded, Theorem 3: 1 / (L + L_AM * sqrt(beta / theta)) with L_AM the arithmetic
    mean of the L_i; the original analysis has their quadratic mean in its place. Below rate 1 every
    client answers with that probability; the constants are then our own derivation from the same
    descent argument, with the free constant at half of its bound.

    Args:
        smoothness: L of the mean objective; > 0.
        client_smoothness: L_i; > 0.
        contraction: alpha of the compressor, in (0, 1]: K / d of top_k and random_k.
        rule: "reloaded", which EF21 and EF21-W share, or "original".
        rate: p, the probability that a client takes part in a round, in (0, 1].

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> round(1 / step_size(1.0, [1.0], 0.05) - 1, 1)
        38.5
    """
    require_positive("smoothness", smoothness)
    for constant in client_smoothness:
        require_positive("client_smoothness", constant)
    for name, value in (("contraction", contraction), ("rate", rate)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} = {value!r}: must be in (0, 1]")
    count = len(client_smoothness)
    mean = math.fsum(client_smoothness) / count
    if rule == "original":
        mean = math.sqrt(math.fsum(constant**2 for constant in client_smoothness) / count)
    theta = 1 - math.sqrt(1 - contraction)
    beta = (1 - contraction) / theta
    if rate < 1:
        rho = rate * theta / (2 * (1 - rate))
        beta = rate * beta + (1 - rate) * (1 + 1 / rho)
        theta = rate * theta - (1 - rate) * rho
    return 1 / (smoothness + mean * math.sqrt(beta / theta))
