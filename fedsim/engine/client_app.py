"""The ClientApp made from a client procedure: one message on a node, a cohort in the engine."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim.basics.versions import versions
from fedsim.client.clipping import bound_of, clip
from fedsim.client.executor import CohortExecutor
from fedsim.client.job import ChunkJob, ChunkResult
from fedsim.client.plan import ExecutionPlan
from fedsim.client.vectorising import made_up_samples, why_loop
from fedsim.messages.cohort import SETUP, share_of_work
from fedsim.messages.layout import Layout, Payload, Rows
from fedsim.messages.records import (
    ARRAYS,
    CLIENT_STATE,
    EXTRA,
    KEEPS_STATE,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    PARTITION_ID,
    SERVER_ROUND,
    SOFTWARE,
    array_record,
    model_record,
    model_tensors,
    named_tensors,
    only_arrays,
)


class CohortApp(ClientApp):
    """A Flower ClientApp that can also train a chunk of clients at once.

    Args:
        build: Makes the executor; called once per process, at first use. It is what travels to
            workers, so it must pickle small (a recipe, not the data).
        plan: The run's execution plan.
    """

    def __init__(self, build: Callable[[], CohortExecutor], plan: ExecutionPlan) -> None:
        super().__init__()
        self._build_executor = build
        self.plan = plan

    def __reduce__(self) -> tuple[object, ...]:
        return CohortApp, (self._build_executor, self.plan)

    @cached_property
    def executor(self) -> CohortExecutor:
        """The executor of this process."""
        return self._build_executor()

    def prepare(self) -> None:
        """Make the executor, and let torch load what it loads at the first gradient.

        Workers do so before they report that they have begun, so that no client pays for it.
        """
        executor = self.executor
        if executor.kind == "vmap":
            why_loop(executor.task, executor.data.spec)
        elif executor.kind == "batched":
            executor.rehearse(*made_up_samples(executor.task, executor.data.spec))

    @property
    def layout(self) -> Layout:
        """How the model's tensors lie in the flat vector."""
        return self.executor.layout

    def run_chunk(self, job: ChunkJob, out: Rows | None = None) -> ChunkResult:
        """Train or evaluate a chunk."""
        if job.action == "evaluate":
            return self.executor.evaluate(job)
        executor = self.executor.under(job.settings) if job.settings else self.executor
        result = executor.train(job, out)
        return result if job.clipping_norm is None else clip(job, result)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message: train, evaluate, or say what this node holds and runs."""
        client = client_of(context)
        kind = message.metadata.message_type
        if kind.partition(".")[0] == MessageType.QUERY:
            return told_of_node(message, context)
        if kind not in (MessageType.TRAIN, SETUP, MessageType.EVALUATE):
            raise ValueError(
                f"message type '{kind}' is not one of train, train.setup, evaluate, query"
            )
        layout = self.layout
        record = only_arrays(message.content)
        if record is None:
            raise ValueError("the instruction holds no model under 'arrays'")
        params, buffers = model_tensors(layout, record)
        extra = message.content.array_records.get(EXTRA)
        config = _settings_of(message)
        trains = kind != MessageType.EVALUATE
        state = state_in(context)
        result = self.run_chunk(
            ChunkJob(
                action="train" if trains else "evaluate",
                server_round=round_of(message),
                client_ids=(client,),
                absent=(False,),
                layout=layout.fingerprint,
                work=(share_of_work(config),),
                shared=Payload(params, buffers, {} if extra is None else named_tensors(extra)),
                state={name: tensor[None] for name, tensor in state.items()},
                has_state=(bool(state),),
                clipping_norm=bound_of(config),
                settings=self.executor.settings_of(config) if trains else {},
            )
        )
        if kind != SETUP and result.state and _is_finite(result):
            keep_state(context, {n: t[0] for n, t in result.state.items()})
        return Message(_reply_content(layout, result), reply_to=message)


def _settings_of(message: Message) -> ConfigRecord:
    return next(iter(message.content.config_records.values()), ConfigRecord())


def round_of(message: Message) -> int:
    """Return the round that an instruction is of; 0 where it does not say it."""
    return int(_settings_of(message).get(SERVER_ROUND, 0))  # type: ignore[arg-type]


def state_in(context: Context) -> dict[str, Tensor]:
    """Return what the client of a node keeps from round to round, by name; empty without any."""
    saved = context.state.array_records.get(CLIENT_STATE)
    return {} if saved is None else named_tensors(saved)


def keep_state(context: Context, state: Mapping[str, Tensor]) -> None:
    """Let a node keep its client's state, by name; none where it is empty."""
    context.state.pop(CLIENT_STATE, None)
    if state:
        context.state[CLIENT_STATE] = array_record(state)


def client_of(context: Context) -> int:
    """Return which client a node is."""
    return int(str(context.node_config[PARTITION_ID]))


def told_of_node(message: Message, context: Context, **more: str) -> Message:
    """Return the answer to a query: the client that a node is, and what runs there.

    Args:
        message: The query.
        context: The node's.
        **more: What else the node says.
    """
    told = ConfigRecord(
        {PARTITION_ID: client_of(context), SOFTWARE: json.dumps(versions()), **more}
    )
    return Message(RecordDict({PARTITION: told}), reply_to=message)


def says_it_keeps_state(reply: Message) -> Message:
    """Add to the answer to a query that the client's state outlives the node; returns it."""
    reply.content.config_records[PARTITION][KEEPS_STATE] = True
    return reply


def _is_finite(result: ChunkResult) -> bool:
    """Whether the reply will be admitted: one that is not leaves the client's state as it was."""
    params = [] if result.params is None else [*result.params]
    named = (result.buffers, result.extra, result.encoded)
    stacks = [*params, *(stack for each in named for stack in each.values())]
    return all(
        bool(torch.isfinite(stack).all())
        for stack in (*stacks, *result.metrics.values())
        if stack.is_floating_point()
    )


def _reply_content(layout: Layout, result: ChunkResult) -> RecordDict:
    content = RecordDict()
    buffers = {name: stack[0] for name, stack in result.buffers.items()}
    encoded = {name: stack[0] for name, stack in result.encoded.items()}
    if encoded:
        content[ARRAYS] = array_record({**encoded, **buffers})
    elif result.params is not None:
        content[ARRAYS] = model_record(layout, result.params[0], buffers)
    numbers: dict[str, int | float] = {NUM_EXAMPLES: int(result.num_examples[0])}
    numbers.update({name: float(column[0]) for name, column in result.metrics.items()})
    content[METRICS] = MetricRecord(numbers)  # type: ignore[arg-type]
    if result.extra:
        extra: ArrayRecord = array_record({name: stack[0] for name, stack in result.extra.items()})
        content[EXTRA] = extra
    return content
