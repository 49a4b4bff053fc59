"""What clients keep from round to round, in a folder of the site's that outlives node and run.

Flower keeps a node's state in its SuperNode's memory, for one run. With a folder, a SuperNode that
is started again goes on with what its client kept, and so does a run that is gone on with: a
client's state is stored per round, and an instruction of round r takes the newest from before r.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context, Message, MessageType
from torch import Tensor

from fedsim.basics.errors import RunError
from fedsim.basics.json_files import sync_folder
from fedsim.basics.tensor_file import tensor_bytes, write_tensors
from fedsim.deployment.site import SitePolicy
from fedsim.engine.client_app import client_of, keep_state, round_of, says_it_keeps_state, state_in
from fedsim.federation.grids.told import experiment_of

VARIABLE = "FEDSIM_SITE_STATE"
_FILE = re.compile(r"round-(\d{7})\.safetensors")

Answer = Callable[[Message, Context], Message]


def answered_with_state(
    answer: Answer, message: Message, context: Context, policy: SitePolicy, keep: int
) -> Message:
    """Answer a message, with the client's state in the site's folder if it has one.

    Args:
        answer: Answers it.
        message: The message.
        context: The node's.
        policy: What the site says.
        keep: Rounds before that of a checkpoint that the run may be gone on from.

    Raises:
        RunError: If the folder cannot be written, or holds what cannot be read.
    """
    folder = state_folder(policy)
    if message.metadata.message_type.partition(".")[0] == MessageType.QUERY:
        reply = answer(message, context)
        return reply if folder is None else says_it_keeps_state(reply)
    experiment = experiment_of(message)
    if folder is None or experiment is None:
        return answer(message, context)
    place = folder / hashlib.sha256(experiment.encode()).hexdigest()[:16] / str(client_of(context))
    server_round, kind = round_of(message), message.metadata.message_type
    # a model is evaluated after the round's training
    before = server_round + (kind == MessageType.EVALUATE)
    keep_state(context, _newest(place, before))
    reply = answer(message, context)
    # what a set-up exchange or an evaluation leaves is what was there before
    if kind == MessageType.TRAIN and not reply.has_error() and (state := state_in(context)):
        _store(place, server_round, state, keep)
    return reply


def state_folder(policy: SitePolicy) -> Path | None:
    """Return the site's folder, as its file says, or the machine's variable; None for none."""
    variable = os.environ.get(VARIABLE)
    return policy.state or (Path(variable) if variable else None)


def _rounds(place: Path) -> dict[int, Path]:
    """The stored states of a client, by round."""
    found = {}
    for path in place.glob("round-*.safetensors") if place.is_dir() else ():
        if named := _FILE.fullmatch(path.name):
            found[int(named[1])] = path
    return found


def _newest(place: Path, before: int) -> dict[str, Tensor]:
    """The newest state from before a round; empty without any."""
    from safetensors import SafetensorError, safe_open

    stored = {number: path for number, path in _rounds(place).items() if number < before}
    if not stored:
        return {}
    path = stored[max(stored)]
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = (file.metadata() or {}).get("sha256") == _sha256(state)
    except (SafetensorError, OSError) as error:
        raise RunError(f"a client's state of round {max(stored)} cannot be read") from error
    if not whole:
        raise RunError(f"a client's state of round {max(stored)} is damaged")
    return state


def _store(place: Path, server_round: int, state: Mapping[str, Tensor], keep: int) -> None:
    """Store a client's state after a round, whole or not at all; forget what no resume needs."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"round-{server_round:07}.safetensors"
        making = file.with_suffix(".making")
        with making.open("wb") as written:
            write_tensors(written, state, {"sha256": _sha256(state)})
            written.flush()
            os.fsync(written.fileno())
        making.replace(file)
        sync_folder(place)
        stored = _rounds(place)
        # one from before all of them may be the newest that a resume finds
        old = sorted(number for number in stored if number < server_round - keep)
        for number in old[:-1]:
            stored[number].unlink()
    except OSError as error:
        raise RunError("the site's folder of client states cannot be written") from error


def _sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}|{state[name].dtype}|{tuple(state[name].shape)}\n".encode())
        digest.update(tensor_bytes(state[name]))
    return digest.hexdigest()
