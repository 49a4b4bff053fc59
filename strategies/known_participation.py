"""Averaging with weights of one over the true participation rates.

The baseline "known participation statistics" of Wang and Ji, "A Lightweight Method for Tackling
Unknown Participation Statistics in Federated Averaging", ICLR 2024 (arXiv:2306.03401): the bar for
methods that must estimate the rates. No real server knows them.

Symbols: Delta_n update of client n, p_n rates, eta server_lr, N all clients registered.

Deviations:
- Without known rates everybody's is taken for 1, which a warning says; the paper always has them.
- A client that joins after round 1 is refused, for its rate is not known.
"""

import logging
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.errors import require_positive
from fedsim.strategy import Degenerate, LinearStrategy, State

_log = logging.getLogger("fedsim")


class Rates(NamedTuple):
    """How often clients take part.

    Attributes:
        rates: float64 `[N]`, p.
    """

    rates: Tensor


@final
class KnownParticipation(LinearStrategy):
    """Weights each client by one over the rate at which it takes part.

    Args:
        rates: p_n, one per client, each in (0, 1]; left out, the simulation tells them.
        server_lr: eta, the factor on the step; > 0.

    Raises:
        ValueError: If an argument is outside its range.
    """

    degenerate: ClassVar[tuple[Degenerate, ...]] = (Degenerate({}, "fedavg", {"weighted": False}),)

    def __init__(self, *, rates: Sequence[float] | None = None, server_lr: float = 1.0) -> None:
        for client_id, rate in enumerate(rates or ()):
            if not 0 < rate <= 1:
                raise ValueError(f"rates = {rate!r} for client {client_id}: must be in (0, 1]")
        require_positive("server_lr", server_lr)
        self._rates = None if rates is None else np.array(rates, dtype=np.float64)
        self._declared: np.ndarray | None = None
        self._server_lr = server_lr

    def declare_rates(self, rates: np.ndarray) -> None:
        """Say how often each client takes part, float64 `[N]`; rates of the scenario go first."""
        self._declared = rates

    def check(self, clients: int, cohort: int) -> None:
        """Refuse rates that are not one per client."""
        if self._rates is not None and len(self._rates) != clients:
            raise ValueError(
                f"rates has {len(self._rates)} values for {clients} clients: give one per client"
            )

    def init(self, params: Tensor, clients: int) -> State:
        """Take the rates that are known.

        Raises:
            ValueError: If there are not as many as clients.
        """
        self.check(clients, clients)
        known = self._declared if self._rates is None else self._rates
        if known is None:
            _log.warning(
                "known_participation: nobody says at which rates clients take part, so all count "
                "the same; give [strategy] rates, or a [participation] whose rates are known"
            )
            known = np.ones(clients)
        return Rates(torch.tensor(known))

    def weights(self, state: State, client_ids: np.ndarray, num_examples: Tensor) -> Tensor:
        """1 / p_n.

        Raises:
            ValueError: If a client's rate is not known.
        """
        strangers = client_ids[client_ids >= len(state.rates)]
        if len(strangers):
            raise ValueError(
                f"client {strangers[0]} joined after round 1 and its participation rate is not "
                "known; use fedau, which estimates it"
            )
        weights: Tensor = 1 / state.rates[client_ids]
        return weights

    def apply(
        self, state: State, params: Tensor, weighted_sum: Tensor, weight_sum: float
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Return x + (eta / N) sum_n Delta_n / p_n; the model stays when nobody answered."""
        if not weight_sum:
            return params, state, {}
        clients = len(state.rates)
        moved = params.double() + self._server_lr * (weighted_sum / clients)
        metrics = {"effective_participation": weight_sum / clients}
        return moved.to(params.dtype), state, metrics
