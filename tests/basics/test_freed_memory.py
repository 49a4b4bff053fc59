"""Freed memory stays with the process: the next tensor costs no page faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.basics.freed_memory import keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]
TUNED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
FAULTS = """
import resource, torch
from fedsim.basics.freed_memory import keep_freed_memory
if not keep_freed_memory():
    raise SystemExit(77)
def used():
    held = [torch.ones(2**20) for _ in range(16)]  # 64 MiB
    return len(held)
used()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    used()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_tensors_that_follow_freed_ones_fault_in_few_pages():
    environment = {n: v for n, v in os.environ.items() if n not in TUNED}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("no glibc")
    assert done.returncode == 0, done.stderr
    # four times 16,384 pages of 4 KiB, were all fetched anew
    assert int(done.stdout) < 16_384


def test_a_user_s_own_settings_are_left_alone(monkeypatch):
    for name in TUNED:
        monkeypatch.setenv(name, "1")
        assert not keep_freed_memory()
        monkeypatch.delenv(name)
