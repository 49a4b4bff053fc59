"""Which workers have given no sign of life for too long.

A worker may take as long as it likes over its work. It is ended when its process does nothing at
all, when nobody on its machine answers, and, after ten times as long, when it only sleeps.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from fedsim.engine import life
from fedsim.engine.life import Life, Silence

_LOOK_S = 5.0  # how often workers are looked at
_LOOKS = 4  # at least so many looks make a silence

# Asks about processes of a node, without waiting: what was answered since it was asked last, with
# nothing of those of which there is no news; None if nobody has answered.
Ask = Callable[[int, Sequence[int]], Mapping[int, Life | None] | None]


class Watched(Protocol):
    """A worker, as far as it is watched.

    Attributes:
        pid: Its process.
        begun: When that began, as `Life` has it.
        node: On which node it is.
        near: Whether that process is one of this machine.
        silence: How long it has given no sign of life, since it was given its work.
    """

    pid: int
    begun: int
    node: int
    near: bool
    silence: Silence


_W = TypeVar("_W", bound=Watched)


class Vigil:
    """Looks at the workers that are at work, now and then.

    Args:
        limit_s: Seconds of silence after which a worker is given up; None waits for ever.
        ask: Asks about processes of other machines.
    """

    def __init__(self, limit_s: float | None, ask: Ask) -> None:
        self.limit_s = limit_s
        self._ask = ask
        self._looked_at = time.monotonic()

    def lost(self, at_work: Iterable[_W]) -> list[_W]:
        """Return those who have been silent for too long; looks only when it is time to."""
        if self.limit_s is None:
            return []
        pause, now = min(_LOOK_S, self.limit_s / _LOOKS), time.monotonic()
        if now < self._looked_at + pause:
            return []
        # if this process was held up itself, the others were not silent for that long
        elapsed = min(now - self._looked_at, 2 * pause)
        self._looked_at = now
        workers = list(at_work)
        far: dict[int, list[int]] = {}
        for worker in workers:
            if not worker.near:
                far.setdefault(worker.node, []).append(worker.pid)
        answers = {node: self._ask(node, pids) for node, pids in far.items()}
        for worker in workers:
            seen = {worker.pid: life.look(worker.pid)} if worker.near else answers[worker.node]
            if seen is None:
                worker.silence.unanswered(elapsed)
                continue
            found = seen.get(worker.pid)
            is_it = found is not None and found.begun == worker.begun
            worker.silence.looked(found if is_it else None, elapsed)
        return [worker for worker in workers if worker.silence.seconds >= self.limit_s]
