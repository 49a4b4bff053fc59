"""A piece of work, what does it, and how it ended."""

import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from flwr.app import Context, Error, Metadata, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim.client.job import ChunkJob, ChunkResult
from fedsim.engine.client_app import CohortApp
from fedsim.messages import flower_internals as internals
from fedsim.messages.layout import Payload, Rows


@dataclass(frozen=True)
class ChunkWork:
    """A chunk of a cohort to be done by a worker.

    Attributes:
        index: Place among the works of one call.
        job: What to do, without the shared payload.
        places: The members' rows in the cohort's stack, ascending.
        alone: Whether this is one member run by itself to find a culprit; the result is discarded.
        limit_s: Seconds after which the work is taken for hung; None waits.
    """

    index: int
    job: ChunkJob
    places: tuple[int, ...]
    alone: bool
    limit_s: float | None

    @property
    def clients(self) -> tuple[int, ...]:
        """The clients whose work this is."""
        return self.job.client_ids


@dataclass(frozen=True)
class MessageWork:
    """One message for one ClientApp to answer.

    Attributes:
        index: Place among the works of one call.
        metadata: The instruction's metadata.
        content: The instruction's content, as `packed` has it: every client gets a copy of its own.
        client: Who answers.
        state: The client's Flower context state, packed; empty if there is none.
        limit_s: Seconds after which the work is taken for hung; None waits.
    """

    index: int
    metadata: Metadata
    content: bytes
    client: int
    state: bytes
    limit_s: float | None

    @property
    def clients(self) -> tuple[int, ...]:
        """The client whose work this is."""
        return (self.client,)


Work = ChunkWork | MessageWork
Fault = Literal["raised", "died", "hung", "late"]


class WorkOutcome(NamedTuple):
    """How a piece of work ended.

    Attributes:
        value: ChunkResult, or (content | error, state) of a message; None when it failed.
        fault: None, or "raised", "died", "hung", "late".
        reason: What happened, in words.
        worker: Which worker did it; -1 if nobody began.
        detail: The traceback of what was raised.
        node: On which node: 0 is the driver's, the others are numbered as they came.
    """

    value: Any
    fault: Fault | None
    reason: str
    worker: int
    detail: str = ""
    node: int = 0


# Does works for different clients and yields how each ended, as `LocalGrid._perform` has it.
Perform = Callable[
    [Sequence[Work], Payload, Tensor | None, float | None], Iterator[tuple[Work, WorkOutcome]]
]
# Is told how long works took that were done in one go, and how each ended.
Watch = Callable[[float, Sequence[tuple[Work, WorkOutcome]]], None]


class Runner:
    """Does work in the process it lives in.

    Args:
        app: The ClientApp.
        num_clients: N, for the clients' node configuration.
        run_config: The run's configuration, for the clients' contexts.
    """

    def __init__(self, app: ClientApp, num_clients: int, run_config: Mapping[str, Any]) -> None:
        self.app, self.num_clients, self.run_config = app, num_clients, dict(run_config)

    def prepare(self) -> None:
        """Do what the first piece of work would otherwise wait for."""
        if isinstance(self.app, CohortApp):
            self.app.prepare()

    def chunk(self, job: ChunkJob, out: Rows | None) -> ChunkResult:
        """Train or evaluate a chunk."""
        assert isinstance(self.app, CohortApp)
        begun = time.perf_counter()
        result = self.app.run_chunk(job, out)
        return replace(result, seconds=time.perf_counter() - begun)

    def message(self, work: MessageWork) -> tuple[RecordDict | Error, bytes]:
        """Let the ClientApp answer one message; returns its content and the context's new state."""
        internals.ensure_identity()
        message = internals.message_with(work.metadata, content=pickle.loads(work.content))
        context = Context(
            run_id=work.metadata.run_id,
            node_id=work.metadata.dst_node_id,
            node_config={"partition-id": work.client, "num-partitions": self.num_clients},
            state=pickle.loads(work.state) if work.state else RecordDict(),
            run_config=dict(self.run_config),
        )
        reply = self.app(message, context)
        state = packed(context.state) if context.state else b""
        return (reply.error if reply.has_error() else reply.content), state


def packed(content: RecordDict) -> bytes:
    """Return a message's content, or a context's state, as it travels with a `MessageWork`."""
    return pickle.dumps(content)


def describe(error: BaseException) -> str:
    """Return an exception's type, text and innermost place, for a failure's reason."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
