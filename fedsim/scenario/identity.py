"""The hash of a scenario: of what decides a run's result, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedsim.scenario.parts import as_before
from fedsim.scenario.tables import WITH_PATHS

_NO_MATTER = ("title", "source", "tier", "modules", "checkpoint", "output", "expect")
_NO_MATTER_ENGINE = (
    "kind",
    "workers",
    "client_resources",
    "address",
    "client_timeout_s",
    "round_timeout_s",
    "startup_timeout_s",
    "silence_timeout_s",
    "state_limit_mb",
)
_NO_MATTER_EVALUATION = ("keep_best",)  # keeps a model and changes none
_LATER: dict[str, dict[str, Any]] = {
    "engine": {"retries": 2, "quorum": None, "threads": 1, "bits": "fast"},
    "evaluation": {"per_client": False, "pooled": False, "finetune": None, "robust": None},
    "client": {"last_batch": "keep", "parts": [], "schedule": None},
    "deployment": {"min_sites": None},
    "attack": {"fraction": None, "schedule": "fixed", "active_rate": None},
    "partition": {
        **dict.fromkeys(("rotation", "feature_noise", "feature_shift", "feature_scale"), 0.0),
        "parts": None,
        "centralised": False,
    },
}
_LATER_FINETUNE = {"tensors": None}  # likewise of [evaluation] finetune where it is given
_LATER_PARTS: dict[str, dict[str, Any]] = {  # likewise of [client] parts
    "personal_mixture": {"mix": "params", "alpha_held_out": 0.0},
}
_LATER_NATURAL = {"label_noise": 0.0}  # likewise of [partition] kind = "natural"; others had it
_LATER_FOLDER = dict.fromkeys(("separator", "decimal", "encoding"))  # likewise of [data] "folder"
_LATER_GOSSIP: dict[str, Any] = {  # likewise of [strategy] where it has a graph
    **dict.fromkeys(
        ("num_byzantine", "num_selected", "clip_radius", "clip_iterations", "bucket_size",
         "clip_norm")
    ),
    "rule": "mean", "variant": "paper", "before": [],
}  # fmt: skip


def identity_of(resolved: Mapping[str, Any]) -> str:
    """Return the hash of a scenario.

    Args:
        resolved: All its tables, complete with defaults.
    """
    document = {key: value for key, value in resolved.items() if key not in _NO_MATTER}
    document["engine"] = {
        key: value for key, value in document["engine"].items() if key not in _NO_MATTER_ENGINE
    }
    document["evaluation"] = {
        k: v for k, v in document["evaluation"].items() if k not in _NO_MATTER_EVALUATION
    }
    if (finetune := document["evaluation"].get("finetune")) is not None:
        document["evaluation"]["finetune"] = _without(finetune, _LATER_FINETUNE)
    if "client" in document:
        document["client"] = _without_later_keys_of_parts(as_before(document["client"]))
    later = dict(_LATER)
    if document["partition"]["kind"] == "natural":
        later["partition"] = {**_LATER["partition"], **_LATER_NATURAL}
    if document["data"]["name"] == "folder":
        later["data"] = _LATER_FOLDER
    if "topology" in document:
        later["strategy"] = _LATER_GOSSIP
    for name in later.keys() & document.keys():
        document[name] = _without(document[name], later[name])
    if document["task"]["kind"] == "auto":
        # the data decide, whose hash is in the manifest; a kind that does not fit never runs
        document["task"] = {**document["task"], "kind": "classification"}
    for name, key in WITH_PATHS.items():
        if document.get(name, {}).get(key) is not None and name == "task":
            document[name] = {**document[name], key: "a file"}  # its hash is in the manifest
        elif name in document:
            document[name] = {k: v for k, v in document[name].items() if k != key}
    text = json.dumps(document, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_later_keys_of_parts(client: Mapping[str, Any]) -> dict[str, Any]:
    if "parts" not in client:
        return dict(client)
    parts = [_without(part, _LATER_PARTS.get(part["name"], {})) for part in client["parts"]]
    return {**client, "parts": parts}


def _without(table: Mapping[str, Any], at: Mapping[str, Any]) -> dict[str, Any]:
    """A table without the keys that have these values."""
    return {key: value for key, value in table.items() if not (key in at and value == at[key])}
