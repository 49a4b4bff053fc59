"""A finished run's model as files that need no fedsim: `fedsim export`.

The weights under torch's names, the names of the classes, what is done to a sample before the model
sees it, the network, and a page with the lines of torch that use them.
"""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.json_files import read_json, to_json
from fedsim.basics.samples import SampleSpec
from fedsim.basics.tensors import tensors_of
from fedsim.data.preparation import prepare
from fedsim.data.reading.characters import CHARACTERS, UNKNOWN
from fedsim.data.sets.bundled import DIGITS_SCALE
from fedsim.runs.best_model import BEST_FILE
from fedsim.runs.client_side import task_of
from fedsim.runs.export_network import network_of
from fedsim.runs.export_page import Told, page_of
from fedsim.runs.folder import SUMMARY_FILE, RunFolder, open_existing, resuming
from fedsim.runs.left_behind import take_up, where_it_was_run
from fedsim.runs.manifest import require_same
from fedsim.runs.summary import params_sha256

WEIGHTS_FILE = "params.safetensors"


class Exported(NamedTuple):
    """What was written.

    Attributes:
        folder: Where.
        files: The names of its files.
        params_sha256: The model's hash, as the run's summary has it.
        round: The round after which the model was this.
    """

    folder: Path
    files: tuple[str, ...]
    params_sha256: str
    round: int


def export(run: Path, to: Path, *, best: bool = False, overrides: Sequence[str] = ()) -> Exported:
    """Write the model of a finished run for use outside.

    Args:
        run: The run's folder.
        to: The folder to make; it may be there if it is empty.
        best: Whether the best model is wanted, see `[evaluation] keep_best`, in place of the last.
        overrides: Assignments that say where things lie that have been moved, as for `resume`.

    Raises:
        ScenarioError: If there is no such run, it has not ended, it kept no best model, or the
            folder is taken.
        CheckpointError: If the data are not what the run began with.
        RunError: If the model's file is torn or altered, or the folder cannot be written.
    """
    folder = open_existing(run)
    summary = _summary(folder)
    chosen = _best(folder, summary) if best else summary
    tensors = _weights(folder.file(BEST_FILE if best else WEIGHTS_FILE), chosen["params_sha256"])
    _refuse_taken(to)
    scenario = take_up(folder, overrides)
    if scenario.task.get("personal"):
        raise ScenarioError(
            f"{folder.path}: [task] personal = {scenario.task['personal']}: these tensors are the "
            "clients' own, so the run has no whole model to export; run it without the key"
        )
    with scenario.named_in_refusals(), where_it_was_run(folder):
        scenario.open_folders()
        data = prepare(scenario.data, scenario.partition, seed=scenario.seed)
        require_same(folder, {"sha256": data.manifest_sha256}, ("data",))
        task = task_of(scenario.task, data, scenario.data["name"])
        model = task.build_model(scenario.seed)
    state = _put_into(model, tensors)
    network = network_of(model, task, scenario.task)
    manifest, spec = data.manifest["data"], data.spec
    preprocessing = preprocessing_of(manifest, spec)
    files = {WEIGHTS_FILE: save(state), "preprocessing.json": _json(preprocessing), **network.files}
    if (labels := labels_of(manifest, spec)) is not None:
        files["labels.json"] = _json(labels)
    told = Told(
        title=scenario.title or scenario.stem,
        server_round=chosen["round" if best else "rounds"],
        is_best=best,
        measured={chosen["metric"]: chosen["value"]} if best else _of_models(summary["final"]),
        params_sha256=chosen["params_sha256"],
        is_mean="topology" in scenario.choices,
    )
    files["README.md"] = page_of(told, spec, task.dtype, network, preprocessing, files).encode()
    _write(to, files)
    return Exported(to, tuple(sorted(files)), told.params_sha256, told.server_round)


def preprocessing_of(manifest: Mapping[str, Any], spec: SampleSpec) -> dict[str, Any]:
    """Return what is done to a sample of a data set, as JSON.

    Args:
        manifest: What a run's manifest says of the data, `manifest["data"]`.
        spec: What one sample looks like.

    Returns:
        `kind` of the features ("images", "text", "tokens" or "numbers"), their `shape` as the model
        takes them, and `steps`: in this order, in float32, each subtracts and then divides. Text
        has `vocabulary`, a string, and `unknown`, the token of all other characters. Targets that
        were standardised have `targets`: mean and deviation.

    Example:
        >>> preprocessing_of({"name": "synthetic"}, SampleSpec((3,), 2))
        {'kind': 'numbers', 'shape': [3], 'steps': []}
    """
    prepared = manifest.get("preprocessing") or {}
    is_text = bool(spec.vocabulary) and "vocabulary" in manifest
    kind = "images" if "scaled_to" in prepared else "numbers"
    kind = kind if not spec.vocabulary else "text" if is_text else "tokens"
    found: dict[str, Any] = {"kind": kind, "shape": list(spec.feature_shape)}
    steps = []
    if kind == "images":
        steps.append({"subtract": 0.0, "divide_by": 255.0})
    if manifest["name"] == "digits":
        steps.append({"subtract": 0.0, "divide_by": float(DIGITS_SCALE)})
    standardised = manifest.get("standardised") or {}
    for each in (prepared if "mean" in prepared else None, standardised.get("features")):
        if each is not None:
            steps.append(
                {"subtract": _shaped(each["mean"], spec), "divide_by": _shaped(each["std"], spec)}
            )
    found["steps"] = steps
    if kind == "images":
        found["channels"] = prepared["channels"]
        found["layout"] = "channels, height, width"
    if is_text:
        found |= {"vocabulary": CHARACTERS, "unknown": UNKNOWN}
    if "targets" in standardised:
        found["targets"] = standardised["targets"]
    return found


def labels_of(manifest: Mapping[str, Any], spec: SampleSpec) -> list[str] | None:
    """Return the classes' names in their order; their numbers where they have none; None without.

    Example:
        >>> labels_of({}, SampleSpec((3,), 2)), labels_of({}, SampleSpec((3,), 0))
        (['0', '1'], None)
    """
    if not spec.has_classes:
        return None
    if "vocabulary" in manifest and spec.num_classes == spec.vocabulary:
        return [*CHARACTERS, "another character"]
    return list(manifest.get("label_names") or map(str, range(spec.num_classes)))


def _shaped(values: Any, spec: SampleSpec) -> Any:
    """Statistics of features in a form that goes along with samples; images' are by channel."""
    shape = spec.feature_shape
    if len(shape) == 3:
        shape = (shape[0], 1, 1)
    flat = torch.tensor(values, dtype=torch.float64).reshape(-1)
    return (flat if flat.numel() == 1 else flat.reshape(shape)).tolist()


def _summary(folder: RunFolder) -> dict[str, Any]:
    place = folder.file(SUMMARY_FILE)
    if not place.is_file() or not folder.file(WEIGHTS_FILE).is_file():
        raise ScenarioError(
            f"{folder.path}: the run has not ended, so there is no model to export; "
            f"`{resuming(folder.path)}` goes on with it"
        )
    summary: dict[str, Any] = read_json(place)
    return summary


def _best(folder: RunFolder, summary: Mapping[str, Any]) -> dict[str, Any]:
    if "best" not in summary:
        raise ScenarioError(
            f"--best: {folder.path} kept no best model; run it with [evaluation] keep_best = "
            "'test/accuracy' or another metric, or export the last model without --best"
        )
    if summary["best"] is None:
        raise ScenarioError(
            f"--best: {folder.path}: no round gave the metric of [evaluation] keep_best a number, "
            "so no model is the best; export the last one without --best"
        )
    found: dict[str, Any] = summary["best"]
    return found


def _weights(file: Path, expected: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(file.read_bytes())
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise RunError(f"{file}: is torn or no safetensors file: {error}") from error
    if (found := params_sha256(tensors)) != expected:
        raise RunError(
            f"{file}: is not the model that {SUMMARY_FILE} speaks of: its hash is {found[:12]}, "
            f"expected {expected[:12]}; bring the file back or run the scenario again"
        )
    return tensors


def _put_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a model its weights; return them under all of torch's names, tied ones several times."""
    mine = tensors_of(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
    model.eval()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _of_models(final: Mapping[str, Any]) -> dict[str, float]:
    """Those of a run's last metrics that were measured on its models."""
    return {
        name: value
        for name, value in final.items()
        if name.startswith(("test/", "pooled/", "local/", "finetuned/", "nodes/"))
    }


def _json(value: Any) -> bytes:
    return to_json(value).encode() + b"\n"


def _refuse_taken(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        what = "is not empty" if to.is_dir() else "is a file"
        raise ScenarioError(f"--to {to}: {what}; name a folder that does not exist yet")


def _write(to: Path, content: Mapping[str, bytes]) -> None:
    """Write the files so that the folder is there whole or not at all."""
    making = to.parent / f".{to.name}.{secrets.token_hex(4)}.tmp"
    try:
        making.mkdir(parents=True)
        for name, text in content.items():
            (making / name).write_bytes(text)
        making.rename(to)
    except OSError as error:
        raise RunError(f"--to {to}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
