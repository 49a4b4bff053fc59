"""Memory of the driver's machine: what all clients share, and rows that workers write in place."""

import torch
from torch import Tensor

from fedsim.engine.ray.installed import ray
from fedsim.engine.shared_memory import Arena, Probe, payload_size
from fedsim.engine.worker_process import Broadcast, Results
from fedsim.messages.layout import Payload


class DriverMemory:
    """Memory that workers of the driver's machine map; to others Ray carries the same.

    Attributes:
        probe: By which a worker finds out whether it shares memory with the driver; None where the
            system has no such memory.
        shared_arena: Where what all clients share was written last.
        result_arenas: Where results go, or went and are still held by somebody.
    """

    def __init__(self) -> None:
        self.probe = _probe_arena()
        self.shared_arena: Arena | None = None
        self.result_arenas: list[Arena] = []
        self._results: tuple[Tensor, Results] | None = None
        self._broadcasts = 0

    def lend(self, count: int, dim: int, dtype: torch.dtype) -> Tensor | None:
        """Return rows `[count, dim]` that workers can write; None if there is no such memory."""
        size = max(1, count * dim * torch.empty((), dtype=dtype).element_size())
        self._results = None
        if self.probe is None:
            return None
        self.result_arenas = [a for a in self.result_arenas if not a.is_free or a.size >= size]
        arena = next((a for a in self.result_arenas if a.is_free), None)
        if arena is None:
            try:
                arena = Arena(size)
            except OSError:  # no such memory: results come back through Ray
                return None
            self.result_arenas.append(arena)
        rows = arena.lend(dtype, (count, dim))
        self._results = (rows, Results(arena.name, dtype, (count, dim)))
        return rows

    def place_of(self, rows: Tensor | None) -> Results | None:
        """Return where a worker of this machine finds the rows that were lent last."""
        if self._results is None or self._results[0] is not rows:
            return None
        return self._results[1]

    def broadcast(self, shared: Payload, laid: dict[bool, Broadcast], *, near: bool) -> Broadcast:
        """Return what all chunks of a call share, where a worker reaches it; laid there once.

        Args:
            shared: The thing itself.
            laid: What was laid in this call, for workers that map this memory and for others.
            near: Whether the worker maps it.
        """
        if near not in laid:
            self._broadcasts += 1
            number = self._broadcasts
            laid[near] = (
                self._in_arena(number, shared)
                if near
                else Broadcast(number, stored=[ray.put(shared)])
            )
        return laid[near]

    def _in_arena(self, number: int, shared: Payload) -> Broadcast:
        size = payload_size(shared)
        try:
            if self.shared_arena is None or self.shared_arena.size < size:
                self.shared_arena = Arena(size)
        except OSError:  # no such memory: it goes with each chunk
            return Broadcast(number, value=shared)
        places = self.shared_arena.write(shared)
        return Broadcast(number, self.shared_arena.name, places)


def _probe_arena() -> Probe | None:
    try:
        return Probe()
    except (OSError, AttributeError):  # not Linux, or no memory files
        return None
