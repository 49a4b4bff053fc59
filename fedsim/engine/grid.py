"""What the engines of one machine share: they answer a cohort, or messages, of virtual clients.

An engine is a Flower `Grid`. `InlineGrid` and `RayGrid` differ in one method, `_perform`, which
does pieces of work and says how each ended.
"""

import abc
import functools
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.engine.ahead import Ahead, TrainedCohort
from fedsim.engine.chunks import absences, cut, keep_memories, stacked
from fedsim.engine.client_app import CohortApp
from fedsim.engine.client_states import ClientStore
from fedsim.engine.faults import ChunkCall, ChunkFaults
from fedsim.engine.journal import Journal
from fedsim.engine.numbering import Numbering
from fedsim.engine.one_message import PlainClients
from fedsim.engine.plain_replies import ReplyWatch
from fedsim.engine.work import Watch, Work, WorkOutcome
from fedsim.messages import flower_internals as internals
from fedsim.messages.adapting import as_cohort, batch_of, present_in
from fedsim.messages.cohort import SETUP, Cohort
from fedsim.messages.layout import Layout, Payload
from fedsim.messages.patience import simulation_patience
from fedsim.messages.replies import Replies


class LocalGrid(Grid, abc.ABC):
    """A Grid whose clients are virtual: client c is node c + 2 and exists when it is asked.

    Args:
        client_app: fedsim's CohortApp, trained a chunk at a time, or any other Flower ClientApp,
            which answers message by message.
        num_supernodes: N, the clients registered; they cost nothing until they are asked.
        run_config: The run's configuration, for the clients' contexts.
        client_timeout_s: Seconds a client may take once its worker has begun; None waits for ever.
        state_limit_mb: Megabytes of client states held in main memory, the others on the disk;
            None holds all.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        client_timeout_s: float | None = None,
        state_limit_mb: float | None = None,
    ) -> None:
        if num_supernodes < 1:
            raise ValueError(f"num_supernodes = {num_supernodes}: must be at least 1")
        self.client_app = client_app
        self.num_clients = num_supernodes
        self.client_timeout_s = client_timeout_s
        self.store = ClientStore(state_limit_mb)
        journal, self._numbering = Journal(), Numbering(num_supernodes)
        self.incidents, self.chunk_log = journal.incidents, journal.chunks
        self._faults = ChunkFaults(journal)
        self._plain = PlainClients(self._numbering, journal)
        self.patience = simulation_patience()
        # looks at the replies of plain Flower apps
        self.reply_watch: ReplyWatch | None = None
        # told how long a cohort's chunks took that were done in one go, and how each ended
        self.watch: Watch | None = None
        # trains what a virtual clock wants later together with what it wants now
        self.ahead: Ahead | None = None
        # servers of old Flower apps send from a pool of threads; calls follow one another here
        self._lock = threading.RLock()
        self._run_config = dict(run_config or {})
        self._pushed: dict[str, Message] = {}
        self._batches: list[Sequence[Message]] = []
        self._ready: dict[str, Message] = {}
        self._run = internals.create_run(1)
        internals.ensure_identity()

    @property
    def layout(self) -> Layout | None:
        """The layout of the model that clients train in chunks; None with a plain ClientApp."""
        return self.client_app.layout if isinstance(self.client_app, CohortApp) else None

    def set_run(self, run: Any) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
        ttl: float | None = None,
    ) -> Message:  # fmt: skip
        """Return an instruction (kept for old server apps; `Message(...)` does the same)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all node ids, as a range."""
        self.patience.asked(self.num_clients, sys._getframe(1))
        return self._numbering.nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take instructions and return their ids at once; they are worked on at the first pull."""
        with self._lock:
            return self._push(messages)

    def _push(self, messages: Iterable[Message]) -> list[str]:
        batch = batch_of(messages)
        self.patience.sent()
        ids = []
        for message in batch:
            self._numbering.check(message)
            ids.append(self._numbering.number(message))
            self._pushed[ids[-1]] = message
        if ids:
            self._batches.append(batch)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these instructions, each once."""
        wanted = list(message_ids)
        with self._lock:
            found = self._pull(wanted)
            if found:
                self.patience.sent()
            else:  # all that was sent among these has been answered
                never = next((each for each in wanted if not self._numbering.knows(each)), None)
                self.patience.pulled(wanted, never, sys._getframe(1))
            return found

    def _pull(self, wanted: Sequence[str]) -> list[Message]:
        if any(number in self._pushed for number in wanted):
            batches, self._batches = self._batches, []
            for batch in batches:
                if not any(m.metadata.message_id in wanted for m in batch):
                    self._batches.append(batch)
                    continue
                for message in batch:
                    del self._pushed[message.metadata.message_id]
                for reply in self._answer(batch, None):
                    self._ready[reply.metadata.reply_to_message_id] = reply
        return [self._ready.pop(number) for number in wanted if number in self._ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions and return the replies, in client order.

        Args:
            messages: A Cohort, or any Flower messages.
            timeout: Seconds for the whole call, once a worker is up; what is unfinished then is
                discarded, client states included.
        """
        batch = batch_of(messages)
        if len(batch):
            self.patience.sent()
        else:
            self.patience.sent_nothing(sys._getframe(1))
        with self._lock:
            return self._answer(batch, timeout)

    def close(self) -> None:
        """Release what the engine holds."""

    def __enter__(self) -> "LocalGrid":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abc.abstractmethod
    def _perform(
        self, works: Sequence[Work], shared: Payload, rows: Tensor | None, deadline: float | None
    ) -> Iterator[tuple[Work, WorkOutcome]]:
        """Do the works and yield how each ended, in any order.

        Args:
            works: Pieces of work for different clients.
            shared: What the members of all chunks receive.
            rows: Where chunks that are not `alone` write their parameters, `[K, dim]`.
            deadline: `time.monotonic()` after which nothing is waited for.
        """

    def _await_worker(self) -> None:
        """Return once somebody can work: starting up is on nobody's time."""

    def _allocate(self, count: int, dim: int, dtype: torch.dtype) -> Tensor:
        """Return memory for a cohort's parameters, `[count, dim]`."""
        return torch.empty((count, dim), dtype=dtype)

    def _answer(self, batch: Sequence[Message], timeout: float | None) -> Sequence[Message]:
        if timeout is not None and len(batch):
            self._await_worker()
        deadline = None if timeout is None else time.monotonic() + timeout
        if isinstance(self.client_app, CohortApp):
            cohort = as_cohort(batch, self.client_app.layout)
            if cohort is not None:
                return self._answer_cohort(cohort, deadline)
        return self._plain.answer(
            present_in(batch),
            self._perform,
            deadline=deadline,
            client_timeout_s=self.client_timeout_s,
            watch=self.reply_watch,
        )

    def _answer_cohort(self, cohort: Cohort, deadline: float | None) -> Replies:
        if not len(cohort):
            return Replies.empty(cohort)
        for message in cohort._built.values():
            self._numbering.check(message)
            self._numbering.number(message)
        if self.ahead is not None and cohort.is_ahead:
            return self.ahead.answered(
                cohort, functools.partial(self._trained, deadline=deadline), self.store
            )
        replies, results = self._trained(cohort, deadline)
        # a set-up exchange is a rehearsal: nobody remembers it
        if cohort.message_type != SETUP and any(result.state for result in results.values()):
            keep_memories(self.store, cohort, results, replies)
        return replies

    def _trained(self, cohort: Cohort, deadline: float | None) -> TrainedCohort:
        """Train or evaluate a cohort; no client remembers it yet."""
        assert isinstance(self.client_app, CohortApp)
        trains = cohort.message_type.partition(".")[0] == "train"
        layout, limit_s = cohort.layout, self.client_timeout_s
        rows = self._allocate(len(cohort), layout.dim, layout.dtype) if trains else None
        call = ChunkCall(
            cohort, self._perform, rows, deadline, limit_s, self.watch, absences(cohort)
        )
        works = cut(cohort, self.client_app, self.store, trains=trains, client_timeout_s=limit_s)
        if works:
            self._faults.work_off(call, works)
        # replies to messages that somebody built carry those messages' ids
        replies = replace(
            stacked(cohort, call.results, rows, call.failures),
            _instructions={
                int(cohort.client_ids[place]): message for place, message in cohort._built.items()
            },
        )
        return TrainedCohort(replies, call.results)
