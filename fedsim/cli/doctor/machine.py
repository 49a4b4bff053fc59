"""What the machine has: processors, graphics cards, memory and room on its disks."""

import os
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.home import cache_root
from fedsim.basics.kernels_in_use import processor
from fedsim.basics.machine import control_group_memory, memory_of_machine, processor_quota
from fedsim.basics.text import in_bytes
from fedsim.cli.doctor.finding import Finding
from fedsim.engine.ray.place import place

SOCKETS = "Ray's folder"
_GIB = 2**30
_MEMORY_NEEDED = _GIB // 2  # one process with torch and flwr
_MEMORY_COMFORTABLE = 2 * _GIB  # and Ray with two workers
_SHARED_MEMORY_COMFORTABLE = _GIB
_DISK_NEEDED = 100 * 2**20
_DISK_COMFORTABLE = 2 * _GIB


def processors(root: Path = Path("/")) -> Finding:
    """Say how many processors there are, of which kind, and how many this process may use.

    Args:
        root: Where `proc` and `sys` are.
    """
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    quota = processor_quota(root)
    words = f"{usable} of {count} usable" if usable < count else f"{count}"
    words += f", {processor(root)['processor']}"
    if quota is None or quota >= usable:
        return Finding("processors", "ok", words)
    found = f"{words}, a quota allows {quota:g} at a time"
    remedy = f"--workers {max(1, int(quota))} wastes least" if quota < usable else ""
    return Finding("processors", "note", found, remedy)


def graphics(facts: Mapping[str, Any] | None, root: Path = Path("/")) -> Finding:
    """Say which CUDA devices torch sees, or why it sees none.

    Args:
        facts: What torch said of itself when it was imported: `built_for` and `devices`; None when
            it could not be imported.
        root: Where `proc` is.
    """
    driver = (root / "proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if facts is None:
        return Finding("CUDA", "note", "unknown without torch")
    devices = [f"{d['name']} ({in_bytes(d['memory'])})" for d in facts["devices"]]
    if devices:
        return Finding("CUDA", "ok", ", ".join(devices))
    if not driver:
        return Finding("CUDA", "note", "no device: no NVIDIA driver on this machine")
    if not facts["built_for"]:
        found = "a driver is there, but this torch is built for processors alone"
        remedy = "pip install --force-reinstall --index-url https://pypi.org/simple torch"
        return Finding("CUDA", "note", found, remedy)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        found = f"CUDA_VISIBLE_DEVICES = '{hidden}' hides every device"
        return Finding("CUDA", "note", found, "unset CUDA_VISIBLE_DEVICES")
    found = f"a driver is there, but torch for CUDA {facts['built_for']} sees no device"
    return Finding("CUDA", "note", found, "nvidia-smi shows whether the driver is too old for it")


def memory(root: Path = Path("/")) -> Finding:
    """Say how much memory there is and how much of it this process can still get.

    Args:
        root: Where `proc` and `sys` are.
    """
    try:
        total, available = memory_of_machine(root)
    except (OSError, ValueError, KeyError) as error:
        return Finding("memory", "note", f"unknown: {error}")
    limits = []
    group = control_group_memory(root)
    if group is not None:
        limit, used = group
        available = min(available, max(limit - used, 0))
        limits.append(f"its control group allows {in_bytes(limit)}")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        available = min(available, soft)
        limits.append(f"`ulimit -v` allows {in_bytes(soft)} of address space")
    found = ", ".join([f"{in_bytes(available)} of {in_bytes(total)} available", *limits])
    if available < _MEMORY_NEEDED:
        remedy = f"end other processes or raise the limit: {in_bytes(_MEMORY_NEEDED)} are needed"
        return Finding("memory", "failed", found, remedy)
    if available < _MEMORY_COMFORTABLE:
        return Finding("memory", "note", found, "`--workers 1`, or `--set engine.kind=inline`")
    return Finding("memory", "ok", found)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Say how much room there is for Ray's object store."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Finding(str(folder), "note", f"not there: {error.strerror}; Ray uses /tmp instead")
    found = f"{in_bytes(usage.free)} of {in_bytes(usage.total)} free"
    if usage.free < _SHARED_MEMORY_COMFORTABLE:
        remedy = "Ray then keeps objects on the disk; in a container: docker run --shm-size=2g"
        return Finding(str(folder), "note", found, remedy)
    return Finding(str(folder), "ok", found)


def sockets() -> Finding:
    """Say where Ray can have its folder: its sockets take no long path."""
    try:
        found = place()
    except RunError as error:
        words, _, remedy = str(error).rpartition("; ")
        return Finding(SOCKETS, "failed", words, remedy)
    if found.why_not:
        return Finding(SOCKETS, "note", f"{found.why_not}: Ray gets one in {found.folder}")
    return Finding(SOCKETS, "ok", f"below {found.folder}")


def cache() -> Finding:
    """Say where data are kept, how much, and whether more can be written."""
    try:
        root = cache_root()
    except ScenarioError as error:
        found, _, remedy = str(error).rpartition(": ")
        return Finding("cache", "failed", found, remedy)
    finding = folder("cache", root, remedy="set FEDSIM_CACHE to a folder that can be written")
    if finding.state == "failed" or not root.is_dir():
        return finding
    return finding._replace(found=f"{finding.found}, holds {in_bytes(_size(root))}")


def folder(name: str, path: Path, *, remedy: str) -> Finding:
    """Say whether a folder can be written or made, and how much room there is.

    Args:
        name: What to call it.
        path: The folder; it need not exist, and is not made.
        remedy: What to do when nothing can be written there.
    """
    try:
        path = path.absolute()
        existing = next(each for each in (path, *path.parents) if each.exists())
        if not existing.is_dir():
            return Finding(name, "failed", f"{path}: {existing} is no folder", remedy)
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"fedsim")
            file.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding(name, "failed", f"{path} cannot be written: {error.strerror}", remedy)
    found = f"{path}, {in_bytes(free)} free"
    if free < _DISK_NEEDED:
        return Finding(name, "failed", found, f"free some space, or {remedy}")
    if free < _DISK_COMFORTABLE:
        return Finding(name, "note", found, "little room; large runs need more")
    return Finding(name, "ok", found)


def _size(folder: Path) -> int:
    """The bytes of all files below a folder; what vanishes or hides meanwhile does not count."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:
                continue
    return total
