"""Who waits for nodes that will never come: in a simulation a round's nodes are known.

Flower's strategies wait, without an end, until so many nodes are there. Where the minimum is the
one that Flower sets and nobody chose, a scenario's strategy goes on with those who take part, as
with `flower:` names. A user who asked for more is told so: before round 1 where it can be known,
else at once.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.basics.errors import ScenarioError
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.federation.participation.kinds import Participation
from fedsim.messages.adapting import batch_of
from fedsim.messages.patience import (
    EVALUATION_MINIMA,
    TRAINING_MINIMA,
    Patience,
    flowers_minima,
    take_part,
)

_LOOKED_AHEAD = 50_000_000  # clients of all rounds, beyond which no more rounds are looked at


@contextlib.contextmanager
def unchosen_minima_met(strategies: Iterable[Strategy], present: int) -> Iterator[None]:
    """Lower minima that are Flower's own to the nodes that are there, for the time being.

    Args:
        strategies: A foreign strategy and those inside it.
        present: The round's nodes, at least 1.
    """
    lowered: list[tuple[Strategy, str, int]] = []
    for strategy in strategies:
        for name, unchosen in flowers_minima().items():
            if present < unchosen and vars(strategy).get(name) == unchosen:
                lowered.append((strategy, name, unchosen))
                setattr(strategy, name, present)
    try:
        yield
    finally:
        for strategy, name, before in lowered:
            if getattr(strategy, name) == present:
                setattr(strategy, name, before)


def check_minima(
    strategies: Iterable[Strategy], participation: Participation, *, clients: int, rounds: int,
    seed: int, evaluating: int,
) -> None:  # fmt: skip
    """Refuse a strategy that would wait for more nodes than a round will have.

    Args:
        strategies: A strategy and those inside it.
        participation: Who is selected when; its state stays as it is.
        clients: N, the clients registered.
        rounds: The scenario's rounds.
        seed: The scenario's seed.
        evaluating: Clients that evaluate on their own data; 0 for none.

    Raises:
        ScenarioError: Naming the strategy, the first such round, the minimum and what is there.
    """
    for strategy in strategies:
        name, wants = _wanted(strategy, "configure_train", TRAINING_MINIMA)
        if wants:
            for server_round, present in _cohorts(participation, clients, rounds, seed):
                if 0 < present < wants:
                    raise ScenarioError(_refusal(strategy, name, wants, server_round, present))
        name, wants = _wanted(strategy, "configure_evaluate", EVALUATION_MINIMA)
        if evaluating and wants > evaluating:
            raise ScenarioError(
                f"[strategy] {type(strategy).__name__} waits for {wants} nodes ({name}), and "
                f"[evaluation] clients = {evaluating} evaluate; lower {name} or raise clients"
            )


def _refusal(strategy: Strategy, name: str, wants: int, server_round: int, present: int) -> str:
    return (
        f"[strategy] round {server_round}: {type(strategy).__name__} waits for {wants} nodes "
        f"({name}), and {take_part(present)}; give {name} = 1, for who takes part is "
        "[participation]'s to say, or let more clients take part"
    )


def _wanted(strategy: Strategy, method: str, names: Iterable[str]) -> tuple[str, int]:
    """The largest minimum that somebody chose, (name, nodes); 0 where none is read."""
    unchosen = flowers_minima()
    if not _reads_minima(type(strategy), method):
        return "", 0
    chosen = [
        (value, name)
        for name in names
        if isinstance(value := getattr(strategy, name, None), int) and value > unchosen[name]
    ]
    value, name = max(chosen, default=(0, ""))
    return name, value


def _reads_minima(cls: type, method: str) -> bool:
    """Whether a class's way to configure a round is Flower's, or comes to it."""
    for each in cls.__mro__:
        own = vars(each).get(method)
        if own is None:
            continue
        if each.__module__.partition(".")[0] == "flwr":
            return True
        code = getattr(own, "__code__", None)
        return isinstance(code, CodeType) and bool(
            {method, "sample_nodes", *TRAINING_MINIMA, *EVALUATION_MINIMA} & set(code.co_names)
        )
    return False


def _cohorts(
    participation: Participation, clients: int, rounds: int, seed: int
) -> Iterator[tuple[int, int]]:
    """Every round's number of participants, as far ahead as it takes no time."""
    before, seen = participation.state(), 0
    try:
        for server_round in range(1, rounds + 1):
            present = len(participation.participants(server_round, num_clients=clients, seed=seed))
            yield server_round, present
            seen += present
            if seen > _LOOKED_AHEAD:
                return
    finally:
        participation.restore(before)


class RoundNodesGrid(GridWrapper):
    """What a foreign strategy is given to configure a round: nobody waits on it.

    Args:
        inner: The loop's Grid.
        server_round: The round.
    """

    def __init__(self, inner: Grid, server_round: int) -> None:
        super().__init__(inner)
        self._patience = Patience(
            lambda who, what, present: (
                f"round {server_round}: {who} waits for {what}, and {take_part(present)}; no more "
                "will come in this round: ask for no more, or let more take part ([participation], "
                "[evaluation] clients)"
            )
        )

    def get_node_ids(self) -> Iterable[int]:
        """Return the round's nodes."""
        nodes = list(self.inner.get_node_ids())
        self._patience.asked(len(nodes), sys._getframe(1))
        return nodes

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Any:
        """Send instructions and return the replies."""
        batch = batch_of(messages)
        if len(batch):
            self._patience.sent()
        else:
            self._patience.sent_nothing(sys._getframe(1))
        return self.inner.send_and_receive(batch, timeout=timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push instructions."""
        self._patience.sent()
        return self.inner.push_messages(messages)
