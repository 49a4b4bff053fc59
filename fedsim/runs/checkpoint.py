"""Checkpoints: everything that a run needs to go on as if it had never stopped, in one file.

A checkpoint is a safetensors file: tensors, and one JSON text in its header for everything else,
with a hash over both. It is written beside its place, synced and renamed, so that it is there whole
or not at all. Nothing in it is pickled.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fedsim.basics.errors import CheckpointError, UnwrittenCheckpointError
from fedsim.basics.json_files import sync_folder
from fedsim.basics.tensor_file import DTYPES, tensor_bytes, write_tensors

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"round_(\d{6,})\.safetensors$")


@dataclass(frozen=True)
class Checkpoint:
    """A run between two rounds.

    Attributes:
        server_round: The last round that is done; 0 before the first.
        scenario_sha256: Hash of what decides the run's result.
        plan: The execution plan.
        versions: Library versions under which the run computes.
        model: The model's tensors by name, in the model's order.
        strategy: The strategy's State by field (tensors and plain values), or None.
        clients: The clients that have a state, ascending.
        client_state: Their states, stacked by name.
        participation: The participation's state, plain values.
        clock: The jobs under way on a virtual clock, plain values; empty without one.
        clock_tensors: What their clients were sent, by name.
        offsets: Lengths in bytes of the run's growing files, by name.
        elapsed_s: Seconds that the run has taken so far.
    """

    server_round: int
    scenario_sha256: str
    plan: dict[str, Any]
    versions: dict[str, Any]
    model: dict[str, Tensor]
    strategy: dict[str, Any] | None = None
    clients: list[int] = field(default_factory=list)
    client_state: dict[str, Tensor] = field(default_factory=dict)
    participation: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, Any] = field(default_factory=dict)
    clock_tensors: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Returns:
        The file.

    Raises:
        UnwrittenCheckpointError: If the disk does not take it; older checkpoints are still there.
    """
    return write(folder, pack(checkpoint), keep=keep)


class Packed(NamedTuple):
    """A checkpoint as it will be written; nothing that a run goes on to change is part of it.

    Attributes:
        server_round: The last round that is done.
        tensors: Copies of all tensors.
        text: Everything else, as JSON.
    """

    server_round: int
    tensors: dict[str, Tensor]
    text: str


def pack(checkpoint: Checkpoint) -> Packed:
    """Copy what a checkpoint holds.

    Raises:
        CheckpointError: If the strategy's state holds something else than tensors and plain values,
            or tensors are of a dtype that the file's format does not have.
    """
    tensors, values = _pack(checkpoint)
    return Packed(checkpoint.server_round, tensors, json.dumps(values, sort_keys=True))


def write(folder: Path, packed: Packed, *, keep: int) -> Path:
    """Write a packed checkpoint, see `save`."""
    server_round, tensors, text = packed
    header = {"fedsim": text, "sha256": _digest(text, tensors)}
    place = folder / f"round_{server_round:06d}.safetensors"
    temporary = place.with_suffix(".tmp")
    try:
        folder.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            write_tensors(file, tensors, header)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(place)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UnwrittenCheckpointError(
            f"{place}: cannot be written: {error.strerror}; make room and `fedsim resume` the run, "
            "nothing is lost up to the checkpoint before"
        ) from error
    for old in _files(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return place


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint's file, or None when there is none."""
    files = _files(folder)
    return files[-1] if files else None


def rounds(folder: Path) -> list[int]:
    """Return the rounds after which the folder's checkpoints are, ascending."""
    return [int(match[1]) for file in _files(folder) if (match := _NAME.search(file.name))]


def load(place: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: If the file is torn, altered, or not a checkpoint of this format.
    """
    from safetensors import SafetensorError, safe_open

    files = _files(place.parent)
    older = files[: files.index(place)] if place in files else files
    remedy = (
        f"delete it to resume from {older[-1].name}"
        if older
        else "no older one is there: start the run anew with `fedsim run`"
    )
    try:
        with safe_open(place, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{place}: is torn or not a checkpoint ({error}); {remedy}"
        ) from error
    text = header.get("fedsim")
    if text is None:
        raise CheckpointError(
            f"{place}: is a safetensors file but not a checkpoint of fedsim; {remedy}"
        )
    if header.get("sha256") != _digest(text, tensors):
        raise CheckpointError(f"{place}: its content does not match its hash; {remedy}")
    values = json.loads(text)
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{place}: has format {values.get('format')}, this fedsim reads format {FORMAT}; "
            "resume it "
            "with the fedsim version in versions.json"
        )
    try:
        return _unpack(values, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{place}: its text and its tensors do not fit each other ({error!r}); {remedy}"
        ) from error


def require(checkpoint: Checkpoint, place: Path, **expected: Any) -> None:
    """Refuse a checkpoint that belongs to another run.

    Args:
        checkpoint: What was read.
        place: From where.
        **expected: Attributes and the values they must have.

    Raises:
        CheckpointError: Naming what differs.
    """
    for name, value in expected.items():
        found = getattr(checkpoint, name)
        if found == value:
            continue
        if isinstance(found, Mapping) and isinstance(value, Mapping):
            keys = sorted(k for k in {*found, *value} if found.get(k) != value.get(k))
            detail = "; ".join(
                f"{k}: checkpoint {found.get(k)!r}, now {value.get(k)!r}" for k in keys
            )
        else:
            detail = f"checkpoint {str(found)[:12]}, now {str(value)[:12]}"
        raise CheckpointError(
            f"{place}: was made with {_OTHERS[name]} ({detail}), so going on would not give the "
            "undisturbed run's result; start a new run"
        )


_OTHERS = {
    "scenario_sha256": "another scenario sha256",
    "plan": "another plan",
    "versions": "other versions or kernels",
}
_SAYS = {
    "model": "the model's",
    "strategy": "the strategy's",
    "client": "the clients'",
    "clock": "the clock's",
}

# A tensor's key in the file is "section/name"; the JSON text lists each section's names in order.


def _pack(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    state, plain = _split(checkpoint.strategy or {})
    sections = {"model": checkpoint.model, "strategy": state, "client": checkpoint.client_state}
    if checkpoint.clock:
        sections["clock"] = checkpoint.clock_tensors
    for section, named in sections.items():
        for name, tensor in named.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{_SAYS[section]} '{name}' is {tensor.dtype}; a checkpoint holds "
                    f"{', '.join(str(dtype) for dtype in DTYPES)}"
                )
            whole = tensor.detach().cpu().contiguous()
            # a copy, for the run goes on; client states are copies already, perhaps larger than
            # main memory
            tensors[f"{section}/{name}"] = whole if section == "client" else whole.clone()
    values = {
        "format": FORMAT,
        "server_round": checkpoint.server_round,
        "scenario_sha256": checkpoint.scenario_sha256,
        "plan": checkpoint.plan,
        "versions": checkpoint.versions,
        "order": {section: list(named) for section, named in sections.items()},
        "strategy": None if checkpoint.strategy is None else plain,
        "clients": checkpoint.clients,
        "participation": checkpoint.participation,
        "offsets": checkpoint.offsets,
        "elapsed_s": checkpoint.elapsed_s,
        **({"clock": checkpoint.clock} if checkpoint.clock else {}),
    }
    return tensors, values


def _unpack(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    sections = {
        section: {name: tensors[f"{section}/{name}"] for name in names}
        for section, names in values["order"].items()
    }
    strategy = values["strategy"]
    if strategy is not None:
        strategy = _join(strategy, sections["strategy"])
    return Checkpoint(
        server_round=values["server_round"],
        scenario_sha256=values["scenario_sha256"],
        plan=values["plan"],
        versions=values["versions"],
        model=sections["model"],
        strategy=strategy,
        clients=values["clients"],
        client_state=sections["client"],
        participation=values["participation"],
        clock=values.get("clock", {}),
        clock_tensors=sections.get("clock", {}),
        offsets=values["offsets"],
        elapsed_s=values["elapsed_s"],
    )


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate tensors (also inside mappings and lists, one level deep) from plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value
            plain[name] = {"kind": "tensor"}
        elif isinstance(value, Mapping):
            tensors.update({f"{name}/{key}": _as_tensor(name, item) for key, item in value.items()})
            plain[name] = {"kind": "mapping", "keys": list(value)}
        elif isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            tensors.update({f"{name}/{i}": _as_tensor(name, t) for i, t in enumerate(value)})
            plain[name] = {"kind": "list", "keys": [str(i) for i in range(len(value))]}
        elif value is None or isinstance(value, bool | int | float | str):
            plain[name] = {"kind": "plain", "value": value}
        else:
            raise CheckpointError(
                f"the strategy's '{name}' is a {type(value).__name__}; a state holds tensors, "
                "numbers "
                "and text"
            )
    return tensors, plain


def _join(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, entry in plain.items():
        if entry["kind"] == "tensor":
            state[name] = tensors[name]
        elif entry["kind"] == "mapping":
            state[name] = {key: tensors[f"{name}/{key}"] for key in entry["keys"]}
        elif entry["kind"] == "list":
            state[name] = [tensors[f"{name}/{key}"] for key in entry["keys"]]
        else:
            state[name] = entry["value"]
    return state


def _as_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"the strategy's '{name}' mixes tensors with {type(value).__name__}")
    return value


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensors_sha256(named: Mapping[str, Tensor]) -> str:
    """Return the hash of named tensors, in name order."""
    return _digest("", named)


def _files(folder: Path) -> list[Path]:
    found = folder.glob("round_*.safetensors") if folder.is_dir() else iter(())
    numbered = ((_NAME.search(file.name), file) for file in found)
    return [file for _, file in sorted((int(match[1]), file) for match, file in numbered if match)]
