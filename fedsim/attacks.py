"""Clients whose updates are not what training gave: attackers, and links that lose packets.

An attack is a pure function from everybody's updates to those that the Byzantine clients send. A
new one is one factory here and one line in `ATTACKS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from fedsim import rng
from fedsim.cohort import Cohort, Replies
from fedsim.errors import RunError, ScenarioError
from fedsim.grids import GridWrapper
from fedsim.layout import Layout


class Seen(NamedTuple):
    """What the attackers of a round know: everything.

    Attributes:
        updates: `[K, dim]`, what training gave each client that replied, in client order.
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

    def generators(self) -> list[np.random.Generator]:
        """Return a generator for each Byzantine client."""
        clients = self.client_ids[self.is_byzantine.numpy()].tolist()
        return [rng.generator(self.seed, "attack", self.server_round, c) for c in clients]


@dataclass(frozen=True)
class Attack:
    """Who attacks, and with what.

    Attributes:
        forge: Returns the updates that the Byzantine clients send instead, `[f, dim]`.
        num_byzantine: How many of all clients are Byzantine, drawn once for the whole run; None is
            one, or as many as are named.
        clients: Who is, when that is not drawn.
    """

    forge: Callable[[Seen], Tensor]
    num_byzantine: int | None = None
    clients: list[int] | None = None

    def __post_init__(self) -> None:
        named = self.clients
        if named is not None and (not named or len(set(named)) != len(named)):
            why = "nobody is named" if not named else "a client is named twice"
            raise ScenarioError(f"[attack] clients = {named}: {why}; name each attacker once")
        if named is not None and self.num_byzantine not in (None, len(named)):
            raise ScenarioError(
                f"[attack] num_byzantine = {self.num_byzantine}: clients names {len(named)}; leave "
                "one of the two out"
            )

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
        for client in self.clients or []:
            if not 0 <= client < num_clients:
                raise ScenarioError(
                    f"[attack] clients: there is no client {client}; allowed: 0..{num_clients - 1}"
                )

    def byzantine_clients(self, num_clients: int, seed: int) -> np.ndarray:
        """Return who is Byzantine, int64 in ascending order.

        Args:
            num_clients: N, the clients registered.
            seed: The scenario's seed.

        Raises:
            ScenarioError: As `check` does.
        """
        self.check(num_clients)
        if self.clients is not None:
            return np.unique(np.array(self.clients, dtype=np.int64))
        draw = rng.generator(seed, "attack")
        size = 1 if self.num_byzantine is None else self.num_byzantine
        chosen = draw.choice(num_clients, size=size, replace=False, shuffle=False)
        return np.sort(chosen).astype(np.int64)


class AttackGrid(GridWrapper):
    """Replaces the updates that Byzantine clients reply to training; nothing else of a reply.

    A set-up exchange and evaluation stay as they are: the attacks are defined on the updates of a
    round. Clients whose training failed or is not finite do not attack. Stands inside an
    `AdmissionGrid`, which then judges what was forged.

    Args:
        inner: The Grid around which this one stands.
        attack: Who attacks, and with what.
        layout: The model's layout.
        seed: The scenario's seed.
    """

    def __init__(self, inner: Grid, attack: Attack, layout: Layout, *, seed: int) -> None:
        super().__init__(inner)
        self.attack, self.layout, self.seed = attack, layout, seed

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions and return the replies, with those to training attacked."""
        batch = messages if isinstance(messages, Cohort) else list(messages)
        replies = self.inner.send_and_receive(batch, timeout=timeout)
        kinds = (
            {batch.message_type}
            if isinstance(batch, Cohort)
            else {m.metadata.message_type for m in batch}
        )
        if MessageType.TRAIN not in kinds:
            return replies
        if not isinstance(replies, Replies):
            sent = batch if isinstance(batch, Cohort) else Cohort.from_messages(batch, self.layout)
            if sent is None:
                raise RunError(
                    "replies cannot be attacked: the strategy sent messages of several kinds or "
                    "contents in one call; leave out [attack]"
                )
            replies = Replies.from_messages(replies, sent)
        byzantine = self.attack.byzantine_clients(self.num_clients, self.seed)
        return attacked(replies, self.attack.forge, byzantine, self.seed)


def attacked(
    replies: Replies, forge: Callable[[Seen], Tensor], byzantine: np.ndarray, seed: int
) -> Replies:
    """Return replies in which the Byzantine clients' models are reference + forged update.

    Args:
        replies: To training; they stay as they are.
        forge: See `Attack`.
        byzantine: The Byzantine clients' ids, whether they replied or not.
        seed: The scenario's seed.
    """
    honest = replies.admit()  # nobody can compute with what is not finite
    places = np.flatnonzero(np.isin(honest.client_ids, byzantine))
    if not len(places):
        return replies
    assert honest.params is not None
    assert honest.reference is not None
    is_byzantine = torch.zeros(honest.num_clients, dtype=torch.bool)
    is_byzantine[places] = True
    seen = Seen(honest.update, is_byzantine, honest.client_ids, honest.server_round, seed)
    start = honest.reference if honest.reference.dim() == 1 else honest.reference[is_byzantine]
    params = honest.params.clone()  # the rows are the engine's
    params[is_byzantine] = (start + forge(seen)).to(params.dtype)
    built = {p: message for p, message in honest._built.items() if p not in places}
    return replace(honest, params=params, admitted=False, _built=built)


def uniform(
    *, scale: float = 1.0, num_byzantine: int | None = None, clients: list[int] | None = None
) -> Attack:
    """A gradient of independent random numbers, uniform in [0, 1).

    The attack of the Flag Aggregator's experiments (arXiv:2302.05865). The numbers are not centred:
    any two attackers pull in nearly the same direction.

    Args:
        scale: Factor on the gradient.
        num_byzantine: How many clients attack, drawn among all of them; one if left out.
        clients: Who attacks instead.
    """

    def forge(seen: Seen) -> Tensor:
        dim = seen.updates.shape[1]
        gradients = np.stack([draw.random(dim) for draw in seen.generators()])
        return -scale * torch.from_numpy(gradients)

    return Attack(forge, num_byzantine, clients)


def sign_flip(*, num_byzantine: int | None = None, clients: list[int] | None = None) -> Attack:
    """The client's own update, reversed.

    Args:
        num_byzantine: How many clients attack, drawn among all of them; one if left out.
        clients: Who attacks instead.
    """
    return Attack(lambda seen: -seen.own, num_byzantine, clients)


def scaled_reverse(
    *, factor: float = 10.0, num_byzantine: int | None = None, clients: list[int] | None = None
) -> Attack:
    """The client's own update, reversed and made longer.

    Args:
        factor: How much longer.
        num_byzantine: How many clients attack, drawn among all of them; one if left out.
        clients: Who attacks instead.
    """
    return Attack(lambda seen: -factor * seen.own, num_byzantine, clients)


def alie(
    *, z: float | None = None, num_byzantine: int | None = None, clients: list[int] | None = None
) -> Attack:
    """A Little Is Enough: z standard deviations below the honest clients' mean, per coordinate.

    Baruch, Baruch and Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed
    Learning", NeurIPS 2019 (arXiv:1902.06156). All attackers send the same update. Deviations:
    mean and standard deviation are those of the honest clients that replied (the paper estimates
    them on the attackers' own data); with nobody honest the attackers send their own.

    Args:
        z: How many standard deviations; None computes the paper's z_max of each round.
        num_byzantine: How many clients attack, drawn among all of them; one if left out.
        clients: Who attacks instead.
    """

    def forge(seen: Seen) -> Tensor:
        honest = seen.updates[~seen.is_byzantine].double()
        attackers = len(seen.own)
        if not len(honest):
            return seen.own
        distance = alie_z(len(seen.updates), attackers) if z is None else z
        forged = honest.mean(dim=0) - distance * honest.std(dim=0, correction=0)
        return forged.expand(attackers, -1)

    return Attack(forge, num_byzantine, clients)


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


def packet_loss(
    *,
    rate: float = 0.1,
    packet_bytes: int = 1500,
    num_byzantine: int | None = None,
    clients: list[int] | None = None,
) -> Attack:
    """Packets of the update that get lost: runs of coordinates that are zero. A fault, not malice.

    Args:
        rate: Probability that a packet is lost, in [0, 1].
        packet_bytes: Bytes of a packet, >= 1; it holds whole coordinates, at least one.
        num_byzantine: How many clients have such a link, drawn among all of them; one if left out.
        clients: Who has one instead.

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

    return Attack(forge, num_byzantine, clients)


ATTACKS: dict[str, Callable[..., Attack]] = {
    "uniform": uniform,
    "sign_flip": sign_flip,
    "scaled_reverse": scaled_reverse,
    "alie": alie,
    "packet_loss": packet_loss,
}
