"""Who asks for nodes or replies that never come again and again, and would for ever."""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import CodeType, FrameType

from flwr.serverapp.strategy import FedAvg, Strategy

from fedsim.basics.errors import RunError
from fedsim.messages import flower_internals as internals

# arguments of Flower's strategies: the fewest nodes to train or evaluate with
TRAINING_MINIMA = ("min_available_nodes", "min_train_nodes")
EVALUATION_MINIMA = ("min_available_nodes", "min_evaluate_nodes")
_OFTEN = 3  # a place that asks so often, one after another,
_LONG_S = 2.5  # for so long, doing little else, waits
_BUSY_S = 30.0  # and so does one that does nothing else for so long
_AT_ONCE = 10_000
_AT_LAST_S = 300.0  # a caller that pulls nothing for so long waits, whatever else goes on
_ROUND_NAMES = ("server_round", "current_round")  # in Flower's own code
_FRAMES = 20  # so far up a strategy and its round are looked for


@cache
def flowers_minima() -> dict[str, int]:
    """Return Flower's own minima: nodes by the name of the argument."""
    parameters = inspect.signature(FedAvg).parameters
    return {name: int(parameters[name].default) for name in {*TRAINING_MINIMA, *EVALUATION_MINIMA}}


def take_part(present: int) -> str:
    """Say how many nodes take part."""
    return "1 takes part" if present == 1 else f"{present} take part"


class VainPullError(RunError):
    """Somebody pulls replies again and again that will never come."""


class Patience:
    """Notices a caller that asks for nodes or replies again and again, and ends it.

    Args:
        say: Returns the sentence for (who waits, what for, nodes there).
    """

    def __init__(self, say: Callable[[str, str, int], str]) -> None:
        self._say = say
        self._asked: dict[tuple[CodeType, int], tuple[int, float, float]] = {}
        self._vain: tuple[int, float, float] | None = None  # pulls in a row that gave nothing

    def sent(self) -> None:
        """Take note that something was done with the nodes."""
        self._asked.clear()
        self._vain = None

    def sent_nothing(self, caller: FrameType) -> None:
        """Take note that somebody sent no message and asked for the replies.

        Args:
            caller: Where; a round of fedsim's or Flower's may have nobody to send to.

        Raises:
            VainPullError: If it waits for replies so.
        """
        if not _is_ours(caller):
            self.pulled((), None, caller)

    def pulled(self, wanted: Sequence[str], never_sent: str | None, caller: FrameType) -> None:
        """Take note that somebody pulled replies and got none, with nothing left to be done.

        Args:
            wanted: The ids that were asked for.
            never_sent: One of them that no message has had, or None.
            caller: Where.

        Raises:
            VainPullError: If the caller waits for what cannot come.
        """
        now, worked = time.monotonic(), time.process_time()  # other threads may be about to send
        many, first, before = self._vain or (0, now, worked)
        self._vain = many + 1, first, before
        waited = now - first
        sleeps = many >= _OFTEN and waited > _LONG_S and worked - before < 0.2 * waited
        spins = many >= _AT_ONCE and waited > _BUSY_S
        if sleeps or spins or (many >= _OFTEN and waited > _AT_LAST_S):
            raise VainPullError(_vain_words(wanted, never_sent, caller, waited))

    def asked(self, present: int, caller: FrameType) -> None:
        """Take note that somebody asked for the nodes.

        Args:
            present: How many there are.
            caller: Where.

        Raises:
            RunError: If the caller waits for more.
        """
        wanted = internals.nodes_waited_for(caller)
        if wanted is not None and wanted > present:
            by = caller.f_back
            owner = by.f_locals.get("self") if by is not None else None
            names = [n for n in flowers_minima() if getattr(owner, n, None) == wanted]
            minima = f" ({', '.join(sorted(names))})" if names else ""
            who = type(owner).__name__ if _is_flowers(by) else _who(by or caller)
            raise RunError(self._say(who, f"{wanted:.12g} nodes{minima}", present))
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
            raise RunError(self._say(_who(caller), f"nodes for {waited:.0f} s", present))


def _package(frame: FrameType | None) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0] if frame is not None else ""


def _is_ours(caller: FrameType) -> bool:
    return _package(caller) in ("flwr", "fedsim")


def _is_flowers(caller: FrameType | None) -> bool:
    """Whether Flower's own method of an object asks, whose class says more than its place."""
    return _package(caller) == "flwr" and caller is not None and "self" in caller.f_locals


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    for _ in range(_FRAMES):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def _who(caller: FrameType) -> str:
    """Say where somebody waits, and of which strategy where the place does not tell."""
    where = f"{caller.f_code.co_qualname}, line {caller.f_lineno},"
    for frame in _outwards(caller):
        mine = frame.f_locals.get("self")
        if isinstance(mine, Strategy):
            name = type(mine).__name__
            told = f"{name}." in f".{caller.f_code.co_qualname}"
            return where if told else f"{name} ({where[:-1]})"
    return where


def _vain_words(
    wanted: Sequence[str], never_sent: str | None, caller: FrameType, waited: float
) -> str:
    by = next((frame for frame in _outwards(caller) if _package(frame) != "fedsim"), caller)
    found = (frame.f_locals.get(name) for frame in _outwards(by) for name in _ROUND_NAMES)
    at = next((each for each in found if type(each) is int), None)
    when = "" if at is None else f"round {at}: "
    many = "1 message" if len(wanted) == 1 else f"{len(wanted)} messages"
    if not wanted:
        what = "replies, and asks for those to no message at all"
    elif never_sent is not None:
        what = f"the replies to {many}, and no message '{str(never_sent)[:16]}' was ever sent"
    else:
        what = f"the replies to {many}, and has had every reply that there is"
    return (
        f"{when}{_who(by)} waits for {what}: nothing more came for {waited:.0f} s, and nothing "
        "more will; pull with the ids that push_messages returned, each until its one reply is "
        "there, and wait for no more replies than messages were sent"
    )


def simulation_patience() -> Patience:
    """Return what watches an app under `run_simulation`."""
    return Patience(
        lambda who, what, present: (
            f"{who} waits for {what}, and num_supernodes = {present}: no more will come; ask for "
            "no more, or give run_simulation more supernodes"
        )
    )
