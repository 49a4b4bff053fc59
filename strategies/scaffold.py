"""SCAFFOLD: averaging with control variates against client drift.

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, "SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning", ICML 2020 (arXiv:1910.06378), Algorithm 1, server side; the client side is the
part `control_variate`.

Symbols: c control, S who answered, N clients, eta_g server_lr.

Deviations: N counts a client that joins late from the round of its first reply. Buffers are
averaged over those who answered, each counting the same, like updates.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_choice, require_positive
from fedsim.messages.layout import Payload
from fedsim.messages.replies import Replies
from fedsim.strategy import Degenerate, FederatedStrategy, State, weighted_sum
from fedsim.strategy.returned import returned_rows

CONTROL = "control"
Option = Literal["I", "II"]


class Control(NamedTuple):
    """The server's control variate.

    Attributes:
        control: float64 `[dim]`, c, the mean of all clients' c_i.
        clients: N.
    """

    control: Tensor
    clients: int


@final
class Scaffold(FederatedStrategy):
    """Averages updates of clients whose gradients are corrected by c - c_i.

    Args:
        option: How a client makes its c_i anew: "I" by the gradient at the model received, "II"
            (cheaper) by the mean gradient along its way.
        server_lr: eta_g, the factor on the mean update; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    linear: ClassVar[bool] = True
    degenerate: ClassVar[tuple[Degenerate, ...]] = (
        Degenerate({}, "fedavg", {"weighted": False}, "first round"),
    )
    sends: ClassVar[tuple[str, ...]] = (CONTROL,)
    parts: ClassVar[Mapping[str, Mapping[str, str]]] = {"control_variate": {"option": "option"}}
    returns: ClassVar[tuple[str, ...]] = (CONTROL,)

    def __init__(self, *, option: Option = "II", server_lr: float = 1.0) -> None:
        require_choice("option", option, Option)
        require_positive("server_lr", server_lr)
        self._option = option
        self._server_lr = server_lr

    def init(self, params: Tensor, clients: int) -> State:
        """C = 0."""
        return Control(torch.zeros(len(params), dtype=torch.float64), clients)

    def broadcast(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Send the model and c."""
        control = self.layout.unflatten(state.control.to(params.dtype))
        return Payload(params, {}, {f"{CONTROL}.{n}": t for n, t in control.items()}), Payload()

    def buffer_weights(self, state: State, replies: Replies) -> Tensor:
        """1 for everybody who answered."""
        return torch.ones(replies.num_clients, dtype=torch.float64)

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + eta_g * mean_S Delta_i; c gains sum_S (c_i+ - c_i) / N.

        The metric `control_norm` is the Euclidean norm of c.
        """
        clients = max(state.clients, int(replies.client_ids.max(initial=-1)) + 1)
        changes = returned_rows(replies, CONTROL, "control_variate", self.layout)
        assert replies.params is not None
        moved, control = scaffold_step(
            params, replies.params, state.control, changes, clients,
            server_lr=self._server_lr, reference=replies.reference,
        )  # fmt: skip
        metrics = {"control_norm": float(torch.linalg.vector_norm(control))}
        return moved, Control(control, clients), metrics


def scaffold_step(
    params: Tensor,
    trained: Tensor,
    control: Tensor,
    changes: Tensor,
    clients: int,
    *,
    server_lr: float = 1.0,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (the new model `[dim]`, the new control variate, float64 `[dim]`).

    Args:
        params: The model that was broadcast, `[dim]`.
        trained: y_i of those who answered, `[K, dim]`.
        control: c, float64 `[dim]`.
        changes: c_i+ - c_i, `[K, dim]`.
        clients: N.
        server_lr: eta_g.
        reference: What each started from, `[dim]` or `[K, dim]`; None for the model broadcast.

    Source: Karimireddy et al., ICML 2020 (arXiv:1910.06378), Algorithm 1, lines 16 and 17.

    Example:
        >>> zero = torch.zeros(1)
        >>> scaffold_step(zero, torch.ones(2, 1), zero.double(), torch.ones(2, 1), 4)
        (tensor([1.]), tensor([0.5000], dtype=torch.float64))
    """
    answered = len(trained)
    if not answered:
        return params, control
    everybody = torch.ones(answered, dtype=torch.float64)
    total = weighted_sum(everybody, trained, params if reference is None else reference)
    moved = params.double() + server_lr * (total / answered)
    return moved.to(params.dtype), control + weighted_sum(everybody, changes) / clients
