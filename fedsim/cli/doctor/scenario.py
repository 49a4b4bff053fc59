"""Whether this machine can run a scenario: its engine, its device, its data."""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.basics.home import cache_root
from fedsim.basics.text import in_bytes
from fedsim.cli.doctor.finding import Finding
from fedsim.cli.doctor.packages import Packages

if TYPE_CHECKING:
    from fedsim.scenario.scenario import Scenario

_HUB = "https://huggingface.co"
_CONNECT_S = 5.0


def look(scenario: "Scenario", packages: Packages) -> list[Finding]:
    """Hold a valid scenario against what the machine has; nothing is fetched or run.

    Raises:
        ScenarioError: If its data are here and do not fit the rest.
    """
    findings = [
        Finding("scenario", "ok", f"{scenario.origin} is valid"),
        _engine(scenario),
        _device(scenario, packages),
        _data(scenario),
    ]
    if all(each.state != "failed" for each in findings) and packages.torch is not None:
        findings.append(_parts(scenario))
    return findings


def _parts(scenario: "Scenario") -> Finding:
    """Build everything as a run would, where that needs no network."""
    from fedsim.basics.errors import RunError
    from fedsim.runs.world import build

    name, source = "its parts", _source(scenario)
    if _repository(source) is not None and not _is_cached(source):
        return Finding(name, "note", "not tried together: its data are read when it first runs")
    try:
        world = build(scenario)
    except RunError as error:
        return Finding(name, "failed", str(error))
    if world.notes:
        return Finding(name, "note", "fit each other; " + "; ".join(world.notes))
    return Finding(name, "ok", f"fit each other; {world.data.num_clients} clients")


def _engine(scenario: "Scenario") -> Finding:
    engine, name = scenario.engine, "its engine"
    if engine.kind == "inline":
        return Finding(name, "ok", "inline, in one process")
    if engine.address is not None:
        return Finding(name, "note", f"joins the Ray cluster at {engine.address}, not looked at")
    cpus, each = os.cpu_count() or 1, engine.client_resources.num_cpus
    if each > cpus and engine.workers is None:
        found = f"one worker asks for {each:g} processors and there are {cpus}"
        remedy = "--set engine.client_resources.num_cpus=1"
        return Finding(name, "failed", found, remedy)
    if engine.workers is not None and engine.workers > cpus:
        found = f"{engine.workers} workers share {cpus} processors"
        return Finding(name, "note", found, f"--workers {cpus} is as fast")
    return Finding(name, "ok", "Ray")


def _device(scenario: "Scenario", packages: Packages) -> Finding:
    engine, name = scenario.engine, "its device"
    facts = packages.torch.facts if packages.torch is not None else {}
    devices = facts.get("devices", [])
    if engine.device == "cpu" and not engine.client_resources.num_gpus:
        return Finding(name, "ok", "cpu")
    if not devices:
        found = f'[engine] device = "{engine.device}" and torch sees no CUDA device'
        remedy = "--set engine.device=cpu --set engine.client_resources.num_gpus=0"
        return Finding(name, "failed", found, remedy)
    return Finding(name, "ok", f"cuda: {devices[0]['name']}, {in_bytes(devices[0]['memory'])}")


def _data(scenario: "Scenario") -> Finding:
    """Say where the data are, or whether they could be fetched; none are read."""
    name, keys = "its data", dict(scenario.data)
    choice, source = keys.pop("name"), _source(scenario)
    repository = _repository(source)
    if repository is None:
        where = f", in {keys['path']}" if keys.get("path") else ", needs no download"
        return Finding(name, "ok", f"{choice}{where}")
    if _is_cached(source) or _is_in_hub_cache(repository):
        return Finding(name, "ok", f"{choice}, on this machine already")
    remedy = "connect to the network, or set [data] path to a folder with its files"
    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    where = f"{repository} on {endpoint}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(name, "failed", f"HF_HUB_OFFLINE forbids to fetch {where}", remedy)
    try:
        request = urllib.request.Request(f"{endpoint}/api/datasets/{repository}", method="HEAD")
        with urllib.request.urlopen(request, timeout=_CONNECT_S):
            return Finding(name, "ok", f"{choice}, will be fetched: {where}")
    except urllib.error.HTTPError as error:
        found = f"{where} cannot be had: {error.code} {error.reason}"
        return Finding(name, "failed", found, "check its name; `hf auth login` for gated ones")
    except (OSError, ValueError) as error:  # no network, or an endpoint that is no address
        reason = getattr(error, "reason", error)
        return Finding(name, "failed", f"{where} is not to be reached: {reason}", remedy)


def _source(scenario: "Scenario") -> Any:
    """What the scenario's data come from; nothing is read yet."""
    return scenario.choices["data"].make()


def _repository(source: Any) -> str | None:
    """The repository of the Hub that data come from, or None."""
    found: str | None = getattr(source, "description", {}).get("hub")
    return found


def _is_cached(source: Any) -> bool:
    """Whether the arrays of a data set lie in the cache already."""
    from fedsim.data.loaded import PooledSource
    from fedsim.data.pooled import is_cached

    return isinstance(source, PooledSource) and is_cached(source, cache_root())


def _is_in_hub_cache(repository: str) -> bool:
    """Whether files of a repository of the Hub were fetched before."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())
