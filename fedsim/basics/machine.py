"""What control groups and the system leave this process: processors and memory."""

import os
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process can still get; None where that is not known."""
    try:
        _, available = memory_of_machine(root)
    except (OSError, ValueError, KeyError):
        return None
    group = control_group_memory(root)
    return available if group is None else min(available, max(group[0] - group[1], 0))


def processor_quota(root: Path) -> float | None:
    """Return how many processors' time control groups allow; None without a quota."""
    quotas = []
    for text in _control_files(root, "cpu", ("cpu.max",)):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    for quota, period in zip(
        _control_files(root, "cpu", ("cpu.cfs_quota_us",)),
        _control_files(root, "cpu", ("cpu.cfs_period_us",)),
        strict=False,
    ):
        if quota.isdigit() and period.isdigit() and int(period):  # -1 is no quota
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def control_group_memory(root: Path) -> tuple[int, int] | None:
    """Return (limit, use) in bytes of the tightest control group; None without a limit."""
    found = []
    for limit, used in zip(
        _control_files(root, "memory", ("memory.max", "memory.limit_in_bytes")),
        _control_files(root, "memory", ("memory.current", "memory.usage_in_bytes")),
        strict=False,
    ):
        # a limit beyond any machine is version 1's way to say that there is none
        if limit.isdigit() and used.isdigit() and int(limit) < 2**60:
            found.append((int(limit), int(used)))
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def _control_files(root: Path, controller: str, names: tuple[str, ...]) -> Iterator[str]:
    """Read files of this process's control groups of versions 1 and 2, from the inside out."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = base / controllers if controllers else base
        inside = mount / path.lstrip("/")
        for group in (inside, *inside.parents):
            for name in names:
                try:
                    yield (group / name).read_text().strip()
                except OSError:
                    continue  # this version or level has no such file
            if group == mount:
                break


def memory_of_machine(root: Path) -> tuple[int, int]:
    """Return (total, available) in bytes."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    kib = dict(line.split(":", 1) for line in lines)
    total, available = (int(kib[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return total * 1024, available * 1024


def usable_processors(root: Path = Path("/")) -> int:
    """Return how many processors this process may use, quotas of control groups included."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = processor_quota(root)
    return max(1, min(count or 1, int(quota) if quota is not None else count or 1))
