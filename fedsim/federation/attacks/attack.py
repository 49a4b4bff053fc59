"""The parts of an attack: who attacks in which round, and what the attackers see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.basics import rng
from fedsim.basics.errors import ScenarioError, require_choice
from fedsim.client.batching.poison import Effect

Sees = Literal["nothing", "own update", "honest updates", "data"]
Schedule = Literal["fixed", "random", "intermittent"]


class Seen(NamedTuple):
    """What the attackers of a round know: no more than their attack says that it sees.

    Attributes:
        updates: `[K, dim]`, what training gave the clients, in client order: each that replied, or
            the Byzantine ones alone.
        is_byzantine: bool `[K]`, whose updates are replaced.
        client_ids: int64 `[K]`.
        server_round: The round.
        seed: The scenario's seed.
    """

    updates: Tensor
    is_byzantine: Tensor
    client_ids: np.ndarray
    server_round: int
    seed: int

    @property
    def own(self) -> Tensor:
        """What training gave the Byzantine clients, `[f, dim]`."""
        return self.updates[self.is_byzantine]

    @property
    def honest(self) -> Tensor:
        """What training gave the others, float64 `[K - f, dim]`."""
        return self.updates[~self.is_byzantine].double()

    def generators(self) -> list[np.random.Generator]:
        """Return a generator for each Byzantine client."""
        clients = self.client_ids[self.is_byzantine.numpy()].tolist()
        return [rng.generator(self.seed, "attack", self.server_round, c) for c in clients]

    def limited(self, sees: Sees) -> "Seen":
        """Return what is left when an attack sees so much."""
        if sees == "honest updates":
            return self
        mine = self.is_byzantine
        return self._replace(
            updates=self.own, is_byzantine=mine[mine], client_ids=self.client_ids[mine.numpy()]
        )


Forge = Callable[[Seen], Tensor]


@dataclass(frozen=True)
class Attack:
    """Who attacks when, and with what.

    Attributes:
        forge: Returns the updates that the Byzantine clients send instead, `[f, dim]`; None when
            they send what training gave.
        num_byzantine: How many of all clients are Byzantine, drawn once for the whole run; None is
            one, or as many as are named.
        clients: Who is, when that is not drawn.
        fraction: How many are, as a share of all clients, rounded down.
        schedule: "fixed", they attack in every round; "random", as many are drawn anew in each;
            "intermittent", each of them attacks in a round with probability `active_rate`.
        active_rate: In (0, 1], of "intermittent"; None is 0.5.
        sees: What `forge` is told.
        effect: What becomes of the samples that attackers train on; None leaves them.
        victim: The client that `forge` goes by, when it names one.
    """

    forge: Forge | None
    num_byzantine: int | None = None
    clients: list[int] | None = None
    fraction: float | None = None
    schedule: Schedule = "fixed"
    active_rate: float | None = None
    sees: Sees = "honest updates"
    effect: Effect | None = None
    victim: int | None = None

    def __post_init__(self) -> None:
        named = self.clients
        if named is not None and (not named or len(set(named)) != len(named)):
            why = "nobody is named" if not named else "a client is named twice"
            raise ScenarioError(f"[attack] clients = {named}: {why}; name each attacker once")
        if named is not None and self.victim in named:
            raise ScenarioError(
                f"[attack] victim = {self.victim}: clients names it as an attacker; name an honest "
                "client"
            )
        if named is not None and self.num_byzantine not in (None, len(named)):
            raise ScenarioError(
                f"[attack] num_byzantine = {self.num_byzantine}: clients names {len(named)}; leave "
                "one of the two out"
            )
        if self.fraction is not None:
            if not 0 <= self.fraction <= 1:
                raise ScenarioError(f"[attack] fraction = {self.fraction}: must be in [0, 1]")
            other = "clients" if named is not None else "num_byzantine"
            if named is not None or self.num_byzantine is not None:
                raise ScenarioError(
                    f"[attack] fraction = {self.fraction}: {other} says who attacks; leave one of "
                    "the two out"
                )
        try:
            require_choice("schedule", self.schedule, Schedule)
        except ValueError as error:
            raise ScenarioError(f"[attack] {error}") from None
        if self.schedule == "random" and named is not None:
            raise ScenarioError(
                '[attack] schedule = "random" draws who attacks, and clients names them; leave one '
                "of the two out"
            )
        if self.active_rate is not None:
            if self.schedule != "intermittent":
                raise ScenarioError(
                    f"[attack] active_rate = {self.active_rate}: is without effect with schedule = "
                    f'"{self.schedule}"; leave it out'
                )
            if not 0 < self.active_rate <= 1:
                raise ScenarioError(f"[attack] active_rate = {self.active_rate}: must be in (0, 1]")

    def check(self, num_clients: int) -> None:
        """Refuse attackers that a federation of so many clients cannot have.

        Raises:
            ScenarioError: Naming the key.
        """
        if self.num_byzantine is not None and not 0 <= self.num_byzantine <= num_clients:
            raise ScenarioError(
                f"[attack] num_byzantine = {self.num_byzantine}: must be in 0..{num_clients}, the "
                "number of clients"
            )
        if self.fraction and not self._size(num_clients):
            raise ScenarioError(
                f"[attack] fraction = {self.fraction:g}: of {num_clients} clients nobody attacks; "
                f"must be 0 or at least {1 / num_clients:.3g}"
            )
        named = [("clients", client) for client in self.clients or []]
        if self.victim is not None:
            named.append(("victim", self.victim))
        for key, client in named:
            if not 0 <= client < num_clients:
                raise ScenarioError(
                    f"[attack] {key}: there is no client {client}; allowed: 0..{num_clients - 1}"
                )

    def byzantine_clients(
        self, num_clients: int, seed: int, server_round: int | None = None
    ) -> np.ndarray:
        """Return who attacks in a round, int64 in ascending order.

        Args:
            num_clients: N, the clients registered.
            seed: The scenario's seed.
            server_round: The round; None asks for all who attack in any round.

        Raises:
            ScenarioError: As `check` does.
        """
        self.check(num_clients)
        if self.schedule == "random" and server_round is None:
            return np.arange(num_clients)
        if self.clients is not None:
            everyone = np.unique(np.array(self.clients, dtype=np.int64))
        else:
            rounds = (server_round,) if self.schedule == "random" and server_round else ()
            draw = rng.generator(seed, "attack", *rounds)
            size = self._size(num_clients)
            chosen = draw.choice(num_clients, size=size, replace=False, shuffle=False)
            everyone = np.sort(chosen).astype(np.int64)
        if self.schedule != "intermittent" or server_round is None:
            return everyone
        rate = 0.5 if self.active_rate is None else self.active_rate
        draws = (rng.generator(seed, "attack now", server_round, c) for c in everyone.tolist())
        return everyone[[bool(draw.random() < rate) for draw in draws]]

    def _size(self, num_clients: int) -> int:
        if self.fraction is not None:
            return int(self.fraction * num_clients * (1 + 1e-12))
        return 1 if self.num_byzantine is None else self.num_byzantine


def nobody_is_honest(seen: Seen) -> bool:
    """Tell whether there is nobody whose update an attacker could go by."""
    return bool(torch.all(seen.is_byzantine))
