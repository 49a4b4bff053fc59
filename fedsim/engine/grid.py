"""What the engines of one machine share: node ids, messages, cohorts in chunks, faults, memories.

An engine is a Flower `Grid`. `InlineGrid` and `RayGrid` differ in one method, `_perform`, which
does pieces of work and says how each ended.
"""

import abc
import logging
import math
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.basics.errors import RunError
from fedsim.client.clipping import bound_of
from fedsim.client.job import ChunkJob, ChunkResult
from fedsim.engine.chunks import deal
from fedsim.engine.client_app import CohortApp
from fedsim.engine.client_states import ClientStore
from fedsim.engine.plain_replies import ReplyWatch
from fedsim.messages import flower_internals as internals
from fedsim.messages.cohort import SETUP, Cohort
from fedsim.messages.failures import Failure
from fedsim.messages.layout import Payload, Rows
from fedsim.messages.patience import simulation_patience
from fedsim.messages.replies import Replies

_log = logging.getLogger("fedsim")
_ATTEMPTS = 3  # a chunk that keeps losing its worker is run at most this often


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
        content: The instruction's content, pickled: every client gets a copy of its own.
        client: Who answers.
        state: The client's Flower context state, pickled.
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
        state = pickle.dumps(context.state) if context.state else b""
        return (reply.error if reply.has_error() else reply.content), state


class LocalGrid(Grid, abc.ABC):
    """A Grid whose clients are virtual: client c is node c + 2 and exists when it is asked.

    Args:
        client_app: fedsim's CohortApp, trained a chunk at a time, or any other Flower ClientApp,
            which answers message by message.
        num_supernodes: N, the clients registered; they cost nothing until they are asked.
        run_config: The run's configuration, for the clients' contexts.
        client_timeout_s: Seconds a client may take once its worker has begun; None waits for ever.
        state_limit_mb: Megabytes of clients' memories held in main memory, the others on the disk;
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
        self.incidents: list[str] = []
        self.chunk_log: list[dict[str, Any]] = []
        self._asking = simulation_patience()
        # looks at the replies of plain Flower apps
        self.reply_watch: ReplyWatch | None = None
        # told how long works took that were done in one go, and how each ended
        self.watch: Callable[[float, Sequence[tuple[Work, WorkOutcome]]], None] | None = None
        # servers of old Flower apps send from a pool of threads; calls follow one another here
        self._lock = threading.RLock()
        self._seen_reasons: set[str] = set()
        self._suspects: dict[int, int] = {}  # who cost a worker when it ran alone, and the round
        self._run_config = dict(run_config or {})
        self._contexts: dict[int, bytes] = {}
        self._pushed: dict[str, Message] = {}
        self._batches: list[Sequence[Message]] = []
        self._ready: dict[str, Message] = {}
        self._numbers = 0
        self._run = internals.create_run(1)
        internals.ensure_identity()

    # --- Flower's Grid --------------------------------------------------------------------

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
        self._asking.asked(self.num_clients, sys._getframe(1))
        return range(internals.FIRST_NODE_ID, internals.FIRST_NODE_ID + self.num_clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take instructions and return their ids at once; they are worked on at the first pull."""
        with self._lock:
            return self._push(messages)

    def _push(self, messages: Iterable[Message]) -> list[str]:
        batch = messages if isinstance(messages, Cohort) else list(messages)
        self._asking.sent()
        ids = []
        for message in batch:
            self._check(message)
            ids.append(self._number(message))
            self._pushed[ids[-1]] = message
        if ids:
            self._batches.append(batch)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these instructions, each once."""
        with self._lock:
            return self._pull(message_ids)

    def _pull(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(message_ids)
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
                discarded, the clients' memories included.
        """
        batch = messages if isinstance(messages, Cohort) else list(messages)
        self._asking.sent()
        with self._lock:
            return self._answer(batch, timeout)

    # --- life -----------------------------------------------------------------------------

    def close(self) -> None:
        """Release what the engine holds."""

    def __enter__(self) -> "LocalGrid":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- what an engine implements
    # --------------------------------------------------------------------

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

    # --- cohorts --------------------------------------------------------------------------

    def _answer(self, batch: Sequence[Message], timeout: float | None) -> Sequence[Message]:
        if timeout is not None and len(batch):
            self._await_worker()
        deadline = None if timeout is None else time.monotonic() + timeout
        if isinstance(self.client_app, CohortApp):
            if isinstance(batch, Cohort):
                return self._answer_cohort(batch, deadline)
            for message in batch:
                self._check(message)
            cohort = Cohort.from_messages(batch, self.client_app.layout)
            if cohort is not None:
                for message in batch:
                    self._number(message)
                return self._answer_cohort(cohort, deadline)
        if isinstance(batch, Cohort):
            batch = [batch[place] for place in np.flatnonzero(~batch.is_absent).tolist()]
        return self._answer_messages(batch, deadline)

    def _answer_cohort(self, cohort: Cohort, deadline: float | None) -> Replies:
        if not len(cohort):
            return Replies.empty(cohort)
        for message in cohort._built.values():
            self._number(message)
        trains = cohort.message_type.partition(".")[0] == "train"
        layout = cohort.layout
        rows = self._allocate(len(cohort), layout.dim, layout.dtype) if trains else None
        failures: dict[int, Failure] = {}
        results: dict[tuple[int, ...], ChunkResult] = {}
        for place in np.flatnonzero(cohort.is_absent).tolist():
            client = int(cohort.client_ids[place])
            why = "was selected and dropped out"
            failures[client] = Failure(client, cohort.server_round, "absent", why)
        works = self._cut(cohort, trains)
        if works:
            self._work_off(cohort, works, rows, failures, results, deadline)
        replies = self._stack(cohort, results, rows, failures)
        # a set-up exchange is a rehearsal: nobody remembers it
        if cohort.message_type != SETUP and any(result.state for result in results.values()):
            self._commit(cohort, results, replies)
        # replies to messages that somebody built carry those messages' ids
        return replace(
            replies,
            _instructions={
                int(cohort.client_ids[place]): message for place, message in cohort._built.items()
            },
        )

    def _commit(
        self, cohort: Cohort, results: Mapping[tuple[int, ...], ChunkResult], replies: Replies
    ) -> None:
        """Keep the memories of the clients whose replies are admitted, and of nobody else."""
        admitted = set(replies.admit().client_ids.tolist())
        for places, result in results.items():
            members = cohort.client_ids[list(places)].tolist()
            rows = [row for row, client in enumerate(members) if client in admitted]
            state = {name: stack[rows] for name, stack in result.state.items()}
            self.store.commit([members[row] for row in rows], state)

    def _cut(self, cohort: Cohort, trains: bool) -> list[ChunkWork]:
        """Cut a cohort into chunks by the plan; a chunk of absent clients only needs no work."""
        assert isinstance(self.client_app, CohortApp)
        works: list[ChunkWork] = []
        for places, bound, settings in self._dealt(cohort, trains):
            chosen = list(places)
            ids = tuple(cohort.client_ids[chosen].tolist())
            absent = tuple(cohort.is_absent[chosen].tolist())
            if all(absent):
                continue
            remembers = trains or self.client_app.executor.evaluates_with_memory
            state, has_state = self.store.rows(ids) if remembers else ({}, ())
            job = ChunkJob(
                action="train" if trains else "evaluate",
                server_round=cohort.server_round,
                client_ids=ids,
                absent=absent,
                layout=cohort.layout.fingerprint,
                shared=Payload(),
                personal=cohort.personal.rows(chosen),
                state=state,
                has_state=has_state,
                work=() if cohort.work is None else tuple(cohort.work[chosen].tolist()),
                clipping_norm=bound,
                settings=settings,
            )
            limit = None if self.client_timeout_s is None else self.client_timeout_s * len(ids)
            works.append(ChunkWork(len(works), job, places, False, limit))
        return works

    def _dealt(
        self, cohort: Cohort, trains: bool
    ) -> Iterator[tuple[tuple[int, ...], float | None, dict[str, Any]]]:
        """The places of each chunk's members, their bound and their own keys of `[client]`."""
        assert isinstance(self.client_app, CohortApp)
        executor, size = self.client_app.executor, self.client_app.plan.chunk_size
        for places, config in cohort.alike():
            bound = bound_of(config) if trains else None
            settings = executor.settings_of(config) if trains else {}
            if settings:
                executor.under(settings)  # or refused here, before anybody trains
            samples: Sequence[int] | np.ndarray = [0] * len(places)
            if trains and len(places) > size:
                ids = cohort.client_ids if cohort.own is None else cohort.client_ids[list(places)]
                samples = executor.data.sizes(ids.tolist())
            for dealt in deal(samples, size, "alike" if executor.pads else "even"):
                mine = dealt if cohort.own is None else tuple(places[place] for place in dealt)
                yield mine, bound, settings

    def _work_off(
        self,
        cohort: Cohort,
        works: Sequence[ChunkWork],
        rows: Tensor | None,
        failures: dict[int, Failure],
        results: dict[tuple[int, ...], ChunkResult],
        deadline: float | None,
    ) -> None:
        """Do all chunks, naming culprits and running their chunks again without them."""
        attempts = dict.fromkeys((work.index for work in works), 0)
        pending = [self._without_suspects(cohort, work, failures, deadline) for work in works]
        pending = [work for work in pending if not all(work.job.absent)]
        while pending:
            again: list[ChunkWork] = []
            begun = time.perf_counter()
            done = list(self._perform(pending, cohort.shared, rows, deadline))
            if self.watch is not None:
                self.watch(time.perf_counter() - begun, done)
            for work, outcome in done:
                assert isinstance(work, ChunkWork)
                attempts[work.index] += 1
                self._log_chunk(work, outcome, attempts[work.index])
                if outcome.fault is None:
                    results[work.places] = outcome.value
                elif outcome.fault == "late":
                    self._fail(cohort, work.clients, "late", outcome.reason, failures)
                else:
                    again.append(
                        self._after_fault(cohort, work, outcome, attempts, failures, deadline)
                    )
            pending = [work for work in again if not all(work.job.absent)]

    def _after_fault(
        self,
        cohort: Cohort,
        work: ChunkWork,
        outcome: WorkOutcome,
        attempts: dict[int, int],
        failures: dict[int, Failure],
        deadline: float | None,
    ) -> ChunkWork:
        """Return the chunk to run again: as it was, or with its culprits' slots neutral."""
        where = f"round {cohort.server_round}, chunk {work.index}, worker {outcome.worker}"
        if outcome.fault == "died" and attempts[work.index] == 1:
            self.incidents.append(
                f"{where}: {outcome.reason}; the chunk runs again on another worker"
            )
            return work
        culprits = self._find_culprits(cohort, work, set(work.clients), failures, deadline)
        if not culprits:
            if attempts[work.index] >= _ATTEMPTS:
                raise RunError(
                    f"{where}: the chunk of clients {list(work.clients)} {outcome.fault} although "
                    "each "
                    f"of them finishes alone: {outcome.reason}; try a smaller [engine] chunk_size"
                )
            self.incidents.append(
                f"{where}: {outcome.reason}; no member fails alone, so it runs again"
            )
            return work
        return _with_neutral(work, culprits)

    def _without_suspects(
        self,
        cohort: Cohort,
        work: ChunkWork,
        failures: dict[int, Failure],
        deadline: float | None,
    ) -> ChunkWork:
        """Try members that cost a worker in an earlier round alone first, so that it costs one."""
        suspects = {
            c for c in work.clients if self._suspects.get(c, math.inf) < cohort.server_round
        }
        if not suspects:
            return work
        return _with_neutral(work, self._find_culprits(cohort, work, suspects, failures, deadline))

    def _find_culprits(
        self,
        cohort: Cohort,
        work: ChunkWork,
        members: set[int],
        failures: dict[int, Failure],
        deadline: float | None,
    ) -> set[int]:
        """Run some of a chunk's members one at a time; those that fail alone are named."""
        singles: list[ChunkWork] = []
        for place, client in enumerate(work.job.client_ids):
            if client in members and not work.job.absent[place]:
                job = replace(
                    work.job,
                    client_ids=(client,),
                    absent=(False,),
                    personal=work.job.personal.rows([place]),
                    state={name: tensor[[place]] for name, tensor in work.job.state.items()},
                    has_state=work.job.has_state[place : place + 1],
                    work=work.job.work[place : place + 1],
                )
                alone = (work.places[place],)
                singles.append(ChunkWork(len(singles), job, alone, True, self.client_timeout_s))
        culprits = set()
        for single, outcome in list(self._perform(singles, cohort.shared, None, deadline)):
            client = single.clients[0]
            self._suspects.pop(client, None)
            if outcome.fault in ("died", "hung"):
                self._suspects[client] = cohort.server_round
            if outcome.fault is not None:
                culprits.add(client)
                self._fail(cohort, (client,), outcome.fault, outcome.reason, failures)
        return culprits

    def _fail(
        self, cohort: Cohort, clients: Sequence[int], cause: str, reason: str,
        failures: dict[int, Failure],
    ) -> None:  # fmt: skip
        for client in clients:
            failures.setdefault(client, Failure(client, cohort.server_round, cause, reason))

    def _log_detail(self, outcome: WorkOutcome) -> None:
        """Log a client's traceback, once for each reason."""
        if outcome.detail and outcome.reason not in self._seen_reasons:
            self._seen_reasons.add(outcome.reason)
            _log.warning("a client raised:\n%s", outcome.detail.rstrip())

    def _log_chunk(self, work: ChunkWork, outcome: WorkOutcome, attempt: int) -> None:
        self._log_detail(outcome)
        self.chunk_log.append(
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

    def _stack(
        self,
        cohort: Cohort,
        results: Mapping[tuple[int, ...], ChunkResult],
        rows: Tensor | None,
        failures: Mapping[int, Failure],
    ) -> Replies:
        ids = cohort.client_ids
        keep = np.array([client not in failures for client in ids.tolist()], dtype=bool)
        done = [results[places] for places in sorted(results)]
        if not done or not keep.any():
            return Replies.empty(cohort, [failures[c] for c in sorted(failures)])
        members = [place for places in sorted(results) for place in places]
        in_order = members == list(range(len(ids)))

        def join(parts: list[Tensor]) -> Tensor:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            if in_order:
                return whole
            full = whole.new_zeros((len(ids), *whole.shape[1:]))
            full[members] = whole
            return full

        personal, shared = cohort.personal.params, cohort.shared.params
        trained = rows is not None
        replies = Replies(
            server_round=cohort.server_round,
            layout=cohort.layout,
            client_ids=ids,
            params=rows,
            reference=(personal if personal is not None else shared) if trained else None,
            buffers={n: join([r.buffers[n] for r in done]) for n in done[0].buffers},
            extra={n: join([r.extra[n] for r in done]) for n in done[0].extra},
            num_examples=join([r.num_examples for r in done]),
            metrics={n: join([r.metrics[n] for r in done]) for n in done[0].metrics},
            staleness=torch.zeros(len(ids), dtype=torch.int64),
            message_type=cohort.message_type,
            ttl=cohort.ttl,
            group=cohort.group,
        )
        return replies.select(keep, [failures[c] for c in sorted(failures)])

    # --- messages -------------------------------------------------------------------------

    def _answer_messages(
        self, batch: Sequence[Message], deadline: float | None
    ) -> Sequence[Message]:
        """Let the ClientApp answer message by message, each client one message at a time."""
        pickled: dict[int, bytes] = {}
        replies: list[tuple[int, int, Message]] = []
        waves = _waves(batch)
        order = {id(message): place for place, message in enumerate(batch)}
        for wave in waves:
            works: list[MessageWork] = []
            for message in wave:
                self._check(message)
                self._number(message)
                content = message.content
                if id(content) not in pickled:
                    pickled[id(content)] = pickle.dumps(content)
                client = internals.client_of(message.metadata.dst_node_id)
                works.append(
                    MessageWork(
                        len(works),
                        message.metadata,
                        pickled[id(content)],
                        client,
                        self._contexts.get(client, b""),
                        self.client_timeout_s,
                    )
                )
            for work, outcome in self._perform(works, Payload(), None, deadline):
                assert isinstance(work, MessageWork)
                self._log_detail(outcome)
                reply = self._reply(work, outcome)
                if self.reply_watch is not None:
                    self.reply_watch.look(wave[work.index], reply, outcome.reason)
                if reply is not None:
                    place = order[id(wave[work.index])]
                    replies.append((work.client, place, reply))
        if self.reply_watch is not None:
            self.reply_watch.end_of_call()
        return [reply for _, _, reply in sorted(replies, key=lambda item: item[:2])]

    def _reply(self, work: MessageWork, outcome: WorkOutcome) -> Message | None:
        metadata = internals.reply_metadata(
            work.metadata,
            message_id=f"{self._next_number():064x}",
            created_at=time.time(),
        )
        if outcome.fault == "late":
            self.incidents.append(f"client {work.client}: {outcome.reason}")
            return None
        if outcome.fault is not None:
            code = 2 if outcome.fault == "raised" else 8
            reason = f"client {work.client}: {outcome.reason}"
            self.incidents.append(reason)
            return internals.message_with(metadata, error=Error(code, reason))
        answer, state = outcome.value
        if state:
            self._contexts[work.client] = state
        else:
            self._contexts.pop(work.client, None)
        if isinstance(answer, Error):
            return internals.message_with(metadata, error=answer)
        return internals.message_with(metadata, content=answer)

    def _check(self, message: Message) -> None:
        client = internals.client_of(message.metadata.dst_node_id)
        if not 0 <= client < self.num_clients:
            raise ValueError(
                f"a message is addressed to node {message.metadata.dst_node_id}; the nodes are "
                f"{internals.FIRST_NODE_ID}..{internals.FIRST_NODE_ID + self.num_clients - 1}"
            )

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _number(self, message: Message) -> str:
        if not message.metadata.message_id:
            internals.set_message_id(message, f"{self._next_number():064x}")
        return message.metadata.message_id


def _with_neutral(work: ChunkWork, clients: set[int]) -> ChunkWork:
    """The chunk with neutral slots for these clients."""
    job = work.job
    absent = tuple(
        gone or client in clients for client, gone in zip(job.client_ids, job.absent, strict=True)
    )
    return replace(work, job=replace(job, absent=absent))


def _waves(batch: Sequence[Message]) -> list[list[Message]]:
    """Split messages so that no client has two in the same wave."""
    waves: list[list[Message]] = []
    seen: dict[int, int] = {}
    for message in batch:
        node = message.metadata.dst_node_id
        turn = seen.get(node, 0)
        seen[node] = turn + 1
        if turn == len(waves):
            waves.append([])
        waves[turn].append(message)
    return waves


def describe(error: BaseException) -> str:
    """Return an exception's type, text and innermost place, for a failure's reason."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
