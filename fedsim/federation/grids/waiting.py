"""Who waits for nodes that will never come: in a simulation a round's nodes are known.

Flower's strategies wait, without an end, until so many nodes are there. Where the minimum is the
one that Flower sets and nobody chose, a scenario's strategy goes on with those who take part, as
with `flower:` names. Whoever asked for more is told so: before round 1 where it can be known, else
at once.
"""

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.federation.participation.kinds import Participation
from fedsim.messages import flower_internals as internals

_TRAIN = ("min_available_nodes", "min_train_nodes")
_EVALUATE = ("min_available_nodes", "min_evaluate_nodes")
_OFTEN = 3  # a place that asks so often, one after another,
_LONG_S = 2.5  # for so long, doing little else, waits
_BUSY_S = 30.0  # and so does one that does nothing else for so long
_AT_ONCE = 10_000
_LOOKED_AHEAD = 50_000_000  # clients of all rounds, beyond which no more rounds are looked at


@cache
def _unchosen() -> dict[str, int]:
    """Flower's own minima."""
    parameters = inspect.signature(FedAvg).parameters
    return {name: int(parameters[name].default) for name in {*_TRAIN, *_EVALUATE}}


@contextlib.contextmanager
def unchosen_minima_met(strategies: Iterable[Strategy], present: int) -> Iterator[None]:
    """Lower minima that are Flower's own to the nodes that are there, for the time being.

    Args:
        strategies: A foreign strategy and those inside it.
        present: The round's nodes, at least 1.
    """
    lowered: list[tuple[Strategy, str, int]] = []
    for strategy in strategies:
        for name, unchosen in _unchosen().items():
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
        name, wants = _wanted(strategy, "configure_train", _TRAIN)
        if wants:
            for server_round, present in _cohorts(participation, clients, rounds, seed):
                if 0 < present < wants:
                    raise ScenarioError(_refusal(strategy, name, wants, server_round, present))
        name, wants = _wanted(strategy, "configure_evaluate", _EVALUATE)
        if evaluating and wants > evaluating:
            raise ScenarioError(
                f"[strategy] {type(strategy).__name__} waits for {wants} nodes ({name}), and "
                f"[evaluation] clients = {evaluating} evaluate; lower {name} or raise clients"
            )


def _refusal(strategy: Strategy, name: str, wants: int, server_round: int, present: int) -> str:
    return (
        f"[strategy] round {server_round}: {type(strategy).__name__} waits for {wants} nodes "
        f"({name}), and {_take_part(present)}; give {name} = 1, for who takes part is "
        "[participation]'s to say, or let more clients take part"
    )


def _take_part(present: int) -> str:
    return "1 takes part" if present == 1 else f"{present} take part"


def _wanted(strategy: Strategy, method: str, names: Iterable[str]) -> tuple[str, int]:
    """The largest minimum that somebody chose, (name, nodes); 0 where none is read."""
    unchosen = _unchosen()
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
            {method, "sample_nodes", *_TRAIN, *_EVALUATE} & set(code.co_names)
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


class Patience:
    """Notices whoever asks for the nodes again and again, and ends it.

    Args:
        say: Returns the sentence for (who waits, what for, nodes there).
    """

    def __init__(self, say: Callable[[str, str, int], str]) -> None:
        self._say = say
        self._asked: dict[tuple[CodeType, int], tuple[int, float, float]] = {}

    def sent(self) -> None:
        """Take note that something was done with the nodes."""
        self._asked.clear()

    def asked(self, present: int, caller: FrameType) -> None:
        """Take note that somebody asked for the nodes.

        Args:
            present: How many there are.
            caller: Where.

        Raises:
            RunError: If whoever asks waits for more.
        """
        wanted = internals.nodes_waited_for(caller)
        if wanted is not None and wanted > present:
            owner = caller.f_back.f_locals.get("self") if caller.f_back is not None else None
            names = [n for n in _unchosen() if getattr(owner, n, None) == wanted]
            minima = f" ({', '.join(sorted(names))})" if names else ""
            raise RunError(self._say(type(owner).__name__, f"{wanted} nodes{minima}", present))
        if wanted is None and not _is_ours(caller):
            self._count(present, caller)

    def _count(self, present: int, caller: FrameType) -> None:
        place = caller.f_code, caller.f_lasti
        now, worked = time.monotonic(), time.thread_time()
        many, first, before = self._asked.get(place, (0, now, worked))
        self._asked[place] = many + 1, first, before
        waited = now - first
        sleeps = many >= _OFTEN and waited > _LONG_S and worked - before < 0.2 * waited
        spins = many >= _AT_ONCE and waited > _BUSY_S
        if sleeps or spins:
            where = f"{caller.f_code.co_qualname}, line {caller.f_lineno},"
            raise RunError(self._say(where, f"nodes for {waited:.0f} s", present))


def _is_ours(caller: FrameType) -> bool:
    return str(caller.f_globals.get("__name__")).partition(".")[0] in ("flwr", "fedsim")


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
                f"round {server_round}: {who} waits for {what}, and {_take_part(present)}; no more "
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
        self._patience.sent()
        return self.inner.send_and_receive(messages, timeout=timeout)


def simulation_patience() -> Patience:
    """Return what watches an app under `run_simulation`."""
    return Patience(
        lambda who, what, present: (
            f"{who} waits for {what}, and num_supernodes = {present}: no more will come; ask for "
            "no more, or give run_simulation more supernodes"
        )
    )
