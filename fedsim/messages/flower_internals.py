"""Flower's internals, all in this one file: task identity, message ids, run objects, wire sizes.

Everything else in fedsim uses Flower's public modules alone. Written against flwr 1.41 and 1.42; a
test fails with the name of what has moved when another version lacks it.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FrameType
from typing import Any, SupportsFloat, get_args

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.common import Scalar
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import (  # type: ignore[attr-defined]
    array_record_to_proto,
    config_record_to_proto,
    message_to_proto,
    metadata_to_proto,
    metric_record_to_proto,
)
from flwr.compat.common import recorddict_compat
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = SUPERLINK_NODE_ID
MESSAGE_ID_LENGTH = 64  # Flower's ids are SHA-256 in hexadecimal
FIRST_NODE_ID = 2  # 0 and 1 are Flower's; client c is node c + 2


def node_of(client_id: int) -> int:
    """Return the node id of a client."""
    return client_id + FIRST_NODE_ID


def client_of(node_id: int) -> int:
    """Return the client id of a node."""
    return node_id - FIRST_NODE_ID


def ensure_identity() -> None:
    """Let instruction messages be built: Flower reads a process-wide task identity for them.

    An identity that is already there (a real Flower run) is left alone.
    """
    if getattr(TaskIdentity, "_run_id", None) is None:
        TaskIdentity.task_id, TaskIdentity.run_id = 1, 1
        TaskIdentity.node_id = SERVER_NODE_ID


def create_run(run_id: int) -> Run:
    """Return the run object that a grid carries."""
    return Run.create_empty(run_id)


def nodes_waited_for(caller: FrameType) -> float | None:
    """Return for how many nodes Flower's strategies wait, told by where they ask for them.

    Args:
        caller: Who asks for the nodes.

    Returns:
        None where it is not that function of Flower's.
    """
    module = str(caller.f_globals.get("__name__"))
    if caller.f_code.co_name != "sample_nodes" or not module.startswith("flwr.serverapp.strategy"):
        return None
    wanted = caller.f_locals.get("min_available_nodes")
    return float(wanted) if isinstance(wanted, SupportsFloat) else None


_FOR_EVER_S = 86400  # for so long Flower's old client manager waits unless it is told otherwise
_COUNTING = ("num_available", "all", "__len__")  # by which one may wait for nodes oneself
_patched = threading.Lock()


@contextlib.contextmanager
def no_endless_waiting(
    num_nodes: int, waits: str, asked: Callable[[int, FrameType], None]
) -> Iterator[None]:
    """Let Flower's old client manager refuse to wait for more nodes than there are.

    Args:
        num_nodes: How many there are.
        waits: What to say, with the places `wanted` and `present`.
        asked: Told whenever somebody asks how many there are: (nodes, where); may refuse.

    Raises:
        RuntimeError: In the app that waits.
    """
    from flwr.server.client_manager import SimpleClientManager

    from fedsim.basics.errors import RunError

    before = {name: vars(SimpleClientManager)[name] for name in ("wait_for", *_COUNTING)}

    def wait_for(self: Any, num_clients: int, timeout: int = _FOR_EVER_S) -> bool:
        if num_clients > num_nodes and timeout >= _FOR_EVER_S:
            raise RunError(waits.format(wanted=num_clients, present=num_nodes))
        return bool(before["wait_for"](self, num_clients, timeout))

    def counting(name: str) -> Callable[[Any], Any]:
        def count(self: Any) -> Any:
            asked(num_nodes, _beyond_wrapper(sys._getframe(1)))
            return before[name](self)

        return count

    if not _patched.acquire(blocking=False):
        yield  # another simulation of this process goes on
        return
    for name in before:
        setattr(SimpleClientManager, name, wait_for if name == "wait_for" else counting(name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(SimpleClientManager, name, function)
        _patched.release()


def _beyond_wrapper(caller: FrameType) -> FrameType:
    """The frame that calls the client manager: Flower wraps its methods."""
    while caller.f_back is not None and caller.f_code.co_name == "wrapped_method":
        caller = caller.f_back
    return caller


_OLD = {"fitins": "fitres", "evaluateins": "evaluateres"}  # what Flower's old servers ask and read


def unreadable_by_old_server(asked: RecordDict, content: RecordDict) -> str | None:
    """Say why a server of Flower's old interface cannot read a reply, or return None.

    Args:
        asked: The instruction's content.
        content: The reply's.
    """
    kind = next((old for old in _OLD if f"{old}.config" in asked.config_records), None)
    if kind is None:
        return None
    answer = _OLD[kind]
    metrics = content.config_records.get(f"{answer}.metrics") or ConfigRecord()
    for name, value in metrics.items():
        if not isinstance(value, get_args(Scalar)):
            return (
                f"metrics['{name}'] is a {type(value).__name__}, which a server of Flower's old "
                "interface cannot read, so that the whole reply is lost; return numbers and text"
            )
    try:
        if kind == "fitins":
            status = recorddict_compat.recorddict_to_fitres(content, keep_input=True).status
        else:
            status = recorddict_compat.recorddict_to_evaluateres(content).status
    except KeyError as error:
        return f"the reply holds no record {error}, so that the server cannot read it"
    except Exception as error:  # whatever Flower's own reading says
        return f"the server cannot read the reply: {type(error).__name__}: {error}"
    if status.code.value:
        return f"the client says {status.code.name}: {status.message}"
    return None


def set_message_id(message: Message, message_id: str) -> None:
    """Give an instruction the id under which its reply is pulled."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source(message: Message, node_id: int) -> None:
    """Say that a reply came from this node."""
    message.metadata.__dict__["_src_node_id"] = node_id


def instruction_metadata(
    *, run_id: int, message_id: str, node_id: int, message_type: str, group_id: str, ttl: float,
    created_at: float,
) -> Metadata:  # fmt: skip
    """Return the metadata of an instruction without reading the process-wide identity."""
    return Metadata(
        run_id=run_id,
        message_id=message_id,
        src_node_id=SERVER_NODE_ID,
        dst_node_id=node_id,
        reply_to_message_id="",
        group_id=group_id,
        created_at=created_at,
        ttl=ttl,
        message_type=message_type,
        src_task_id=1,
        dst_task_id=None,
    )


def reply_metadata(instruction: Metadata, *, message_id: str, created_at: float) -> Metadata:
    """Return the metadata of the reply to an instruction: source and destination swapped."""
    return Metadata(
        run_id=instruction.run_id,
        message_id=message_id,
        src_node_id=instruction.dst_node_id,
        dst_node_id=instruction.src_node_id,
        reply_to_message_id=instruction.message_id,
        group_id=instruction.group_id,
        created_at=created_at,
        ttl=instruction.ttl,
        message_type=instruction.message_type,
        src_task_id=instruction.dst_task_id,
        dst_task_id=instruction.src_task_id,
    )


def message_with(
    metadata: Metadata, *, content: RecordDict | None = None, error: Error | None = None
) -> Message:
    """Return a message with exactly this metadata."""
    return make_message(metadata=metadata, content=content, error=error)


def wire_bytes(message: Message) -> int:
    """Return the length in bytes of a message in Flower's own serialisation (protobuf)."""
    return int(message_to_proto(message).ByteSize())


def record_bytes(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    """Return the length in bytes of one record in Flower's own serialisation."""
    if isinstance(record, ArrayRecord):
        return int(array_record_to_proto(record).ByteSize())
    if isinstance(record, MetricRecord):
        return int(metric_record_to_proto(record).ByteSize())
    return int(config_record_to_proto(record).ByteSize())


def message_bytes(metadata_size: int, records: dict[str, int]) -> int:
    """Return a message's length from its parts, without building it.

    Args:
        metadata_size: Length of the metadata.
        records: Length of each record of the content by its key.
    """
    items = (_field(len(key.encode())) + _field(size) for key, size in records.items())
    return _field(metadata_size) + _field(sum(_field(item) for item in items))


def instruction_metadata_bytes(
    node_id_length: int, message_type: str, group_id: str, ttl: float
) -> int:
    """Length of an instruction's metadata, given how many bytes its node id takes."""
    return _instruction_bytes(node_id_length, message_type, _as_long_as(group_id), ttl)


def reply_metadata_bytes(node_id_length: int, message_type: str, group_id: str, ttl: float) -> int:
    """Length of a reply's metadata, given how many bytes its node id takes."""
    return _reply_bytes(node_id_length, message_type, _as_long_as(group_id), ttl)


def _as_long_as(group_id: str) -> str:
    """A text of that length: rounds have groups of their own, and lengths are remembered."""
    return "0" * len(group_id.encode())


@lru_cache(maxsize=256)
def _instruction_bytes(node_id_length: int, message_type: str, group_id: str, ttl: float) -> int:
    metadata = _metadata_of_length(node_id_length, message_type, group_id, ttl)
    return int(metadata_to_proto(metadata).ByteSize())


@lru_cache(maxsize=256)
def _reply_bytes(node_id_length: int, message_type: str, group_id: str, ttl: float) -> int:
    instruction = _metadata_of_length(node_id_length, message_type, group_id, ttl)
    reply = reply_metadata(instruction, message_id="0" * MESSAGE_ID_LENGTH, created_at=1.0)
    return int(metadata_to_proto(reply).ByteSize())


def _metadata_of_length(
    node_id_length: int, message_type: str, group_id: str, ttl: float
) -> Metadata:
    return instruction_metadata(
        run_id=TaskIdentity._run_id or 1,
        message_id="0" * MESSAGE_ID_LENGTH,
        node_id=1 << (7 * (node_id_length - 1)),
        message_type=message_type,
        group_id=group_id,
        ttl=ttl,
        created_at=1.0,
    )


def varint_length(value: int) -> int:
    """Return how many bytes protobuf takes for a non-negative integer."""
    return max(1, -(-int(value).bit_length() // 7))


def _field(length: int) -> int:
    return 1 + varint_length(length) + length
