"""Who asks for a round's nodes again and again, and would for ever."""

import inspect
import time
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType

from flwr.serverapp.strategy import FedAvg

from fedsim.basics.errors import RunError
from fedsim.messages import flower_internals as internals

# arguments of Flower's strategies: the fewest nodes to train or evaluate with
TRAINING_MINIMA = ("min_available_nodes", "min_train_nodes")
EVALUATION_MINIMA = ("min_available_nodes", "min_evaluate_nodes")
_OFTEN = 3  # a place that asks so often, one after another,
_LONG_S = 2.5  # for so long, doing little else, waits
_BUSY_S = 30.0  # and so does one that does nothing else for so long
_AT_ONCE = 10_000


@cache
def flowers_minima() -> dict[str, int]:
    """Return Flower's own minima: nodes by the name of the argument."""
    parameters = inspect.signature(FedAvg).parameters
    return {name: int(parameters[name].default) for name in {*TRAINING_MINIMA, *EVALUATION_MINIMA}}


def take_part(present: int) -> str:
    """Say how many nodes take part."""
    return "1 takes part" if present == 1 else f"{present} take part"


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
            names = [n for n in flowers_minima() if getattr(owner, n, None) == wanted]
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


def simulation_patience() -> Patience:
    """Return what watches an app under `run_simulation`."""
    return Patience(
        lambda who, what, present: (
            f"{who} waits for {what}, and num_supernodes = {present}: no more will come; ask for "
            "no more, or give run_simulation more supernodes"
        )
    )
