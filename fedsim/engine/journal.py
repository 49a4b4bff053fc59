"""What an engine tells of its work."""

import logging
from typing import Any

from fedsim.engine.work import ChunkWork, WorkOutcome

_log = logging.getLogger("fedsim")


class Journal:
    """Notes what went wrong and who did which chunk.

    Attributes:
        incidents: What went wrong and was mended, in words.
        chunks: Every chunk that was tried, as `chunks.jsonl` has it.
    """

    def __init__(self) -> None:
        self.incidents: list[str] = []
        self.chunks: list[dict[str, Any]] = []
        self._seen_reasons: set[str] = set()

    def detail(self, outcome: WorkOutcome) -> None:
        """Log a client's traceback, once for each reason."""
        if outcome.detail and outcome.reason not in self._seen_reasons:
            self._seen_reasons.add(outcome.reason)
            _log.warning("a client raised:\n%s", outcome.detail.rstrip())

    def chunk(self, work: ChunkWork, outcome: WorkOutcome, attempt: int) -> None:
        """Note how a chunk ended when it was tried for the first, second, ... time."""
        self.detail(outcome)
        self.chunks.append(
            {
                "round": work.job.server_round,
                "action": work.job.action,
                "chunk": work.index,
                "clients": list(work.clients),
                "worker": outcome.worker,
                "node": outcome.node,
                "attempt": attempt,
                "outcome": outcome.fault or "done",
            }
        )
