"""What a trial watches: an executor that takes a few small steps on few samples."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fedsim.basics.generators import drawn_from
from fedsim.basics.rng import derived_seed
from fedsim.client.executor import CohortExecutor
from fedsim.client.procedure import Batch, Carry, ClientProcedure, Gradient, Named, Work
from fedsim.client.surroundings import Surroundings
from fedsim.client.vectorising import TRIED_ONCE

_BATCH = 3  # samples
_STEPS = 2
FEW = (2, 3)  # of each client: a batch that is not full beside one that is


class FewSamples(NamedTuple):
    """A few samples of two clients, of either split.

    Attributes:
        data: All samples of all clients.
        most: How many of its samples each of the two has; None leaves it all.
    """

    data: Any
    most: dict[int, int | None]

    @property
    def num_clients(self) -> int:
        """N, as of all samples."""
        return int(self.data.num_clients)

    @property
    def spec(self) -> Any:
        """What one sample is."""
        return self.data.spec

    def sizes(self, client_ids: Sequence[int]) -> np.ndarray:
        """Return how many samples each of some clients has here."""
        return np.array([len(mine) for mine in self.clients(client_ids).rows])

    def clients(self, client_ids: Sequence[int], *, split: str = "train") -> Any:
        """Return samples of training, whichever split is asked for."""
        drawn = self.data.clients(client_ids)
        few = [
            np.asarray(mine)[: self.most[client]]
            for client, mine in zip(client_ids, drawn.rows, strict=True)
        ]
        return drawn._replace(rows=few)


class PlainDescent(ClientProcedure):
    """SGD, where a procedure cannot be tried without what its strategy sends."""

    work = Work(_BATCH, None, _STEPS)

    def begin(self, params: Named, buffers: Named, extra: Named, state: Named) -> Carry:
        """Begin with what was received."""
        return {"params": params, "buffers": buffers}

    def step(
        self, carry: Carry, batch: Batch, gradient: Gradient, *, server_round: int
    ) -> tuple[Carry, Tensor]:
        """Take a small step against the gradient."""
        loss, grads, buffers = gradient(carry["params"], carry["buffers"], batch)
        params = {name: p - 0.01 * grads[name] for name, p in carry["params"].items()}
        return {"params": params, "buffers": buffers}, loss


class Watching(Surroundings):
    """Surroundings that see which objects move and which generators are drawn from in training."""

    def __init__(self, seen: Surroundings) -> None:
        super().__init__(seen.seed, seen.device, seen.kept)
        self.moved: dict[str, None] = {}
        self.drawn: dict[str, None] = {}
        self._begun: int | None = None

    def begin(self, *place: int) -> None:
        """Begin, see `Surroundings`, after a look at what was before."""
        self.look()
        super().begin(*place)
        self._begun = derived_seed(self.seed, "layers" if place else "evaluation", *place)

    @contextlib.contextmanager
    def generators_put_back(self) -> Iterator[None]:
        """Put generators back, and look what was drawn."""
        with super().generators_put_back():
            try:
                yield
            finally:
                self.look()

    def look(self) -> None:
        """Take down what has happened since a client began."""
        seed, self._begun = self._begun, None
        if self.kept is None:
            return
        if seed is not None:
            self.moved |= dict.fromkeys(self.kept.moved())
            self.drawn |= dict.fromkeys(drawn_from(seed, self.kept.generators))
        self.kept.put_back()


class WatchedExecutor(NamedTuple):
    """An executor that takes a few small steps, and what is seen of them.

    Attributes:
        executor: The executor.
        watch: What it does to its surroundings.
        small: Whether it trains on a few samples, else on whole batches.
        most: How many samples each of the clients has; None leaves it all.
    """

    executor: CohortExecutor
    watch: Watching
    small: bool
    most: dict[int, int | None]

    def shortened(self, work: Work) -> Work:
        """A trial's work in place of a procedure's."""
        steps = 1 if self.executor.layout.dim >= TRIED_ONCE else _STEPS
        batch = max(filter(None, self.most.values()), default=_BATCH)
        return Work(batch if self.small else work.batch_size, None, steps)
