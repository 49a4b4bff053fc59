"""The engine in this process: for debugging, notebooks, tests, and machines without Ray."""

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from fedsim.engine.grid import LocalGrid
from fedsim.engine.work import ChunkWork, Runner, Work, WorkOutcome, describe
from fedsim.messages.layout import Payload, rows_at


class InlineGrid(LocalGrid):
    """Runs clients one piece of work after another in this process.

    It names clients that raise or return values that are not finite. It cannot outlive a client
    that hangs, ends the process or exhausts memory: `RayGrid` does.
    """

    @cached_property
    def _runner(self) -> Runner:
        return Runner(self.client_app, self.num_clients, self._run_config)

    def _perform(
        self, works: Sequence[Work], shared: Payload, rows: Tensor | None, deadline: float | None
    ) -> Iterator[tuple[Work, WorkOutcome]]:
        for work in works:
            if deadline is not None and time.monotonic() >= deadline:
                yield work, WorkOutcome(None, "late", "the time for this call was over", 0)
                continue
            try:
                if isinstance(work, ChunkWork):
                    out = None
                    if rows is not None and not work.alone:
                        out = rows_at(rows, work.places)
                    value: object = self._runner.chunk(replace(work.job, shared=shared), out)
                else:
                    value = self._runner.message(work)
            # a client's own code: named, and judged by the run's policy
            except (Exception, SystemExit) as error:
                yield work, WorkOutcome(None, "raised", describe(error), 0, traceback.format_exc())
            else:
                yield work, WorkOutcome(value, None, "", 0)
