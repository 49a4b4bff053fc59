"""What a run does about its strategy's memory: tries it, says what is lost, keeps the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsim.strategy.foreign import load_attributes, why_unheld
from fedsim.strategy.held.kinds import Unheld
from fedsim.strategy.held.strategies import GRAPH, StrategyMemory, try_out

_SHOWN = 3  # of what is said in one line
_BEGIN = 100  # characters by which paths are told apart: how deep a long one goes may vary


class RunMemory:
    """What the strategy remembers: tried before it is needed, and said where it cannot be held.

    Args:
        strategy: The run's, as it was made.
        make: Makes it once more, as another process would.
        tell: Tells the user.
    """

    def __init__(
        self, strategy: Strategy, make: Callable[[], Strategy], tell: Callable[[str], None]
    ) -> None:
        self._strategy, self._make, self._tell = strategy, make, tell
        self._held = StrategyMemory(strategy)
        self._tried: set[str] = set()  # kinds of objects
        self._lost = False  # what was tried came back otherwise
        self._told: set[str] = set()  # beginnings of paths to what could not be held
        self._looked = False

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Give the strategy what a checkpoint holds of it."""
        if state is None:
            return
        if GRAPH in state:
            self._held.restore(state)
        else:
            load_attributes(self._strategy, state)

    def look(self, server_round: int, saved: int) -> None:
        """Say what could not be held now; before round 1 and after it, restore it and compare."""
        if not self._looked:
            self._looked = True
            self._say_what_begins_anew()
        if server_round <= 1:
            self.state(saved)
        else:
            self._say(self._held.unheld(), saved)

    def state(self, saved: int) -> dict[str, Any] | None:
        """Return what a checkpoint holds; None where it would not be whole, which is said.

        What is of a kind that was not there before is tried first.

        Args:
            saved: The round of the last whole checkpoint.
        """
        held = self._held.hold()
        if self._say(held.unheld, saved):
            return None
        if self._held.is_users and not self._lost and not held.kinds <= self._tried:
            self._tried |= held.kinds
            self._try(saved)
        return None if self._lost else held.state

    def _try(self, saved: int) -> None:
        with self._held.apart():
            self._try_apart(saved)

    def _try_apart(self, saved: int) -> None:
        name = type(self._strategy).__name__
        try:
            second = self._make()
        except Exception as error:
            self._tell(
                f"[strategy] {name} cannot be made a second time, so that it is not tried whether "
                f"it comes back from a checkpoint: {type(error).__name__}: {error}"
            )
            return
        if (what := try_out(self._held, second)) is not None:
            self._lost = True
            self._tell(
                f"[strategy] {name} was restored from a checkpoint to try it, and {what}; "
                f"{_from_here(saved)}; to say what is to be kept, give {name} the methods "
                "state_dict() and load_state_dict(state)"
            )

    def _say_what_begins_anew(self) -> None:
        name, beyond = type(self._strategy).__name__, self._held.beyond
        if caches := [f"the lru_cache of {each}" for each in self._held.caches]:
            self._told.update(each[:_BEGIN] for each in self._held.caches)
            self._tell(
                f"[strategy] the code of {name} uses {_few(caches)}, which a checkpoint cannot "
                "hold: none is written once a round has called it, so that `fedsim resume` begins "
                f"again before that round; if it keeps nothing from round to round, give {name} "
                "the methods state_dict() and load_state_dict(state), which say what is to be kept"
            )
        if beyond:
            self._tell(
                f"[strategy] the code of {name} uses {_few(beyond)}, which a "
                "checkpoint cannot hold: after `fedsim resume` it is as a new process makes it; "
                f"where rounds change it, give {name} the methods state_dict() and "
                "load_state_dict(state)"
            )

    def _say(self, unheld: Sequence[Unheld], saved: int) -> bool:
        new = [each for each in unheld if each.path[:_BEGIN] not in self._told]
        self._told.update(each.path[:_BEGIN] for each in new)
        for each in new[:_SHOWN]:
            self._tell(f"[strategy] {why_unheld(self._strategy, each)}; {_from_here(saved)}")
        return bool(unheld)


def _few(what: Sequence[str]) -> str:
    more = f" and {len(what) - _SHOWN} more" if len(what) > _SHOWN else ""
    return f"{', '.join(what[:_SHOWN])}{more}"


def _from_here(saved: int) -> str:
    """What is lost with checkpoints that are not written."""
    return (
        f"`fedsim resume` would begin again after round {saved}; the run itself ends with its "
        "model and summary"
    )
