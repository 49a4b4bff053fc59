"""What a run folder says at the end: the model and `summary.json`."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from fedsim.basics.json_files import JsonLines, taking, write_json_atomic
from fedsim.messages.records import named_tensors
from fedsim.runs import checkpoint as checkpoints
from fedsim.runs.best_model import BEST_FILE, Best, BestModel
from fedsim.runs.folder import RunFolder
from fedsim.runs.last_values import standing
from fedsim.runs.loop import RoundLoop
from fedsim.runs.world import World
from fedsim.scenario.expectations import check_expectations


def summarise(
    world: World,
    folder: RunFolder,
    loop: RoundLoop,
    arrays: ArrayRecord,
    elapsed_s: float,
    best: BestModel | None = None,
) -> dict[str, Any]:
    """Write the model and the summary of a run that has ended.

    Args:
        world: What was run.
        folder: Where both go.
        loop: The loop, with all records.
        arrays: The model after the last round.
        elapsed_s: Seconds the run has taken.
        best: The best model of its rounds; None where none is kept.

    Returns:
        The content of `summary.json`.
    """
    from safetensors.torch import save

    model = named_tensors(arrays)
    _write_bytes(folder.file("params.safetensors"), save(model))
    final: dict[str, Any] = {}
    for record in loop.history:
        final = standing(final, record)
    summary: dict[str, Any] = {
        "rounds": loop.history[-1]["round"] if loop.history else 0,
        "stopped": loop.stopped,
        "final": final,
        "params_sha256": params_sha256(model),
        "participation_sha256": participation_sha256(folder.file("participation.jsonl")),
        "partition_sha256": world.data.manifest_sha256,
        "scenario_sha256": world.scenario.sha256,
        "wall_time_s": elapsed_s,
        "always_failed": always_failed(folder.file("participation.jsonl")),
        "expect": check_expectations(world.scenario.expect, loop.history),
    }
    if (kept := world.scenario.evaluation.keep_best) is not None:
        summary["best"] = _write_best(folder, kept, None if best is None else best.result())
    with taking(folder.file("summary.json")):
        write_json_atomic(folder.file("summary.json"), summary)
    return summary


def _write_best(
    folder: RunFolder, metric: str, result: tuple[Best, bytes] | None
) -> dict[str, Any] | None:
    """Write the best model; return what the summary says of it, None where no round had a value."""
    from safetensors.torch import load

    if result is None:
        return None
    best, content = result
    _write_bytes(folder.file(BEST_FILE), content)
    return {"metric": metric, **best._asdict(), "params_sha256": params_sha256(load(content))}


def params_sha256(model: dict[str, Tensor]) -> str:
    """Return the hash of a model: names, dtypes, shapes and bits of its tensors."""
    return checkpoints.tensors_sha256(model)


def participation_sha256(path: Path) -> str:
    """Return the hash of who was selected in which round."""
    digest = hashlib.sha256()
    for record in JsonLines.read(path):
        digest.update(f"{record['round']}:{','.join(map(str, record['selected']))};".encode())
    return digest.hexdigest()


def always_failed(path: Path) -> dict[str, str]:
    """Return who failed in every round in which it was selected: (client, last cause) by name."""
    selected: Counter[int] = Counter()
    failed: Counter[int] = Counter()
    causes: dict[int, str] = {}
    for record in JsonLines.read(path):
        selected.update(record["selected"])
        found = {int(client): cause for client, cause in record["failed"].items()}
        causes |= {client: cause for client, cause in found.items() if cause != "absent"}
        failed.update(client for client, cause in found.items() if cause != "absent")
    never = sorted(client for client, times in failed.items() if times >= selected[client])
    return {str(client): causes[client] for client in never}


def _write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with taking(path):
        try:
            temporary.write_bytes(content)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
