"""The page beside an exported model: what it is, and the lines of torch that use it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

import fedsim
from fedsim.basics.samples import SampleSpec
from fedsim.runs.export_network import PROGRAM_FILE, SOURCE_FILE, Network

_SAYS = {
    "params.safetensors": "the weights, under torch's names",
    "labels.json": "the classes' names, in the order of the outputs",
    "preprocessing.json": "what is done to a sample before the network sees it",
    SOURCE_FILE: "the network as Python, without its weights",
    PROGRAM_FILE: "the network as a program of `torch.export`",
}


class Told(NamedTuple):
    """What the page says of the run.

    Attributes:
        title: What was run.
        server_round: The round after which the model was this.
        is_best: Whether it is the best model of the run, not the last.
        measured: Metrics of it, by name.
        params_sha256: Its hash, as the run's summary has it.
        is_mean: Whether it is the mean of many nodes' models.
    """

    title: str
    server_round: int
    is_best: bool
    measured: Mapping[str, float]
    params_sha256: str
    is_mean: bool = False


def page_of(
    told: Told,
    spec: SampleSpec,
    dtype: torch.dtype,
    network: Network,
    preprocessing: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> str:
    """Return the page, in Markdown.

    Args:
        told: What it says of the run.
        spec: What one sample looks like.
        dtype: The dtype of the network.
        network: The network.
        preprocessing: The content of `preprocessing.json`.
        files: The files beside the page.
    """
    which = "best" if told.is_best else "last"
    lines = [f"# {told.title}", ""]
    lines.append(
        f"The {which} model of a federated run, after round {told.server_round}. Exported by "
        f"fedsim {fedsim.__version__}."
    )
    if told.is_mean:
        lines += ["", "Every node had a model of its own; this is the mean of all."]
    lines += ["", "| File | What |", "|---|---|"]
    lines += [f"| `{name}` | {_SAYS[name]} |" for name in sorted(files)]
    lines += ["", "## Use", "", f"In this folder, with torch and safetensors{_also(network)}:", ""]
    lines += ["```python", *_snippet(spec, dtype, network, preprocessing, files), "```", ""]
    lines += _words(spec, preprocessing)
    if told.measured:
        lines += ["", "## Measured in the run", "", "| Metric | Value |", "|---|---|"]
        lines += [f"| `{name}` | {value:.6g} |" for name, value in sorted(told.measured.items())]
    lines += ["", f"Hash of the weights (`params_sha256`): {told.params_sha256}", ""]
    return "\n".join(lines)


def _also(network: Network) -> str:
    return f" and the code of `{network.needs}`" if network.needs else ""


def _snippet(
    spec: SampleSpec,
    dtype: torch.dtype,
    network: Network,
    preprocessing: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> list[str]:
    shape = ", ".join(map(str, ("n", *spec.feature_shape)))
    steps, text = preprocessing["steps"], preprocessing["kind"] == "text"
    reads = bool(steps) or text or "targets" in preprocessing or "labels.json" in files
    lines = ["import json", ""] if reads else []
    lines += [*([] if text else ["import numpy as np"]), "import torch"]
    lines += ["from safetensors.torch import load_file", *filter(None, [network.imports]), ""]
    if steps or text or "targets" in preprocessing:
        lines.append('preprocessing = json.load(open("preprocessing.json"))')
    if text:
        lines += [
            'raw = json.load(open("samples.json"))  '
            f"# yours: texts of {spec.feature_shape[0]} characters",
            'codes = {c: number for number, c in enumerate(preprocessing["vocabulary"])}',
            'unknown = preprocessing["unknown"]',
            "x = torch.tensor([[codes.get(c, unknown) for c in text] for text in raw])",
        ]
    elif spec.vocabulary:
        lines.append(f'x = torch.as_tensor(np.load("samples.npy"))  # yours: tokens [{shape}]')
    else:
        what = "pixels, 0 to 255," if preprocessing["kind"] == "images" else "numbers"
        lines += [
            f'raw = np.load("samples.npy")  # yours: {what} [{shape}]',
            "x = torch.as_tensor(raw, dtype=torch.float32)",
        ]
    if steps:
        lines += [
            'for step in preprocessing["steps"]:',
            '    x = (x - torch.tensor(step["subtract"])) / torch.tensor(step["divide_by"])',
        ]
    lines += [network.build, 'model.load_state_dict(load_file("params.safetensors"))']
    lines += network.ready
    cast = "" if spec.vocabulary or dtype == torch.float32 else f".to({dtype})"
    lines += ["with torch.no_grad():", f"    outputs = model(x{cast})"]
    if "labels.json" in files:
        lines.append('labels = json.load(open("labels.json"))')
        lines.append("predicted = [labels[number] for number in outputs.argmax(dim=1).tolist()]")
    elif "targets" in preprocessing:
        lines.append('targets = preprocessing["targets"]')
        lines.append(
            'predicted = outputs * torch.tensor(targets["std"]) + torch.tensor(targets["mean"])'
        )
    return lines


def _words(spec: SampleSpec, preprocessing: Mapping[str, Any]) -> list[str]:
    """What the lines of Python do not say of samples."""
    shape = "x".join(map(str, spec.feature_shape))
    if preprocessing["kind"] == "images":
        channels = "grey" if preprocessing["channels"] == "grey" else "RGB"
        return [
            f"Images are {channels}, 8 bits per channel, laid out as channels, height, width: "
            f"{shape}."
        ]
    if preprocessing["kind"] == "text":
        return ["A character that is not in the vocabulary is the token `unknown`."]
    if preprocessing["kind"] == "tokens":
        return [f"Tokens are whole numbers from 0 to {spec.vocabulary - 1}."]
    return [f"One sample has the shape {shape}, with features in the order of the data set."]
