"""A client that takes the machine's memory: Ray ends its worker, fedsim names the client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: Ray watches memory with limits that are set when its cluster starts.
SCRIPT = """
import json, sys
from pathlib import Path
from tests.faults.worlds import CULPRIT, Trouble, finish, small_world
from fedsim.engine.inline import InlineGrid
from fedsim.engine.ray.grid import RayGrid

folder, limit = Path(sys.argv[1]), float(sys.argv[2])
trouble = Trouble(folder)
world = small_world(folder, trouble=trouble, sets=("rounds=2",))
out = folder / "out"
out.mkdir()
dropped = finish(world, out, InlineGrid(world.app, 24), lambda _: [CULPRIT])
trouble.plan("swell")
watch = {"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 50}
with RayGrid(world.app, 24, workers=1, init_args={"_system_config": watch}) as grid:
    found = finish(world, out, grid)
same = found.params == dropped.params
print(json.dumps({"same": same, "failed": found.failed, "log": found.log}))
"""


def memory():
    """This machine's total and available memory in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found["MemTotal"], found["MemAvailable"]


@pytest.mark.slow
def test_a_client_that_takes_the_machine_s_memory_in_every_round_counts_as_dropped_out(tmp_path):
    pytest.importorskip("ray")
    total, available = memory()
    if available < 8 * 2**30:
        pytest.skip("needs 8 GB of free memory")
    limit = (total - available + 3 * 2**30) / total
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == [{"17": "died"}] * 2
    assert found["same"]
    for server_round in (1, 2):
        named = f"client 17, round {server_round}: died: its worker 0 on node 0 (process "
        lines = [line for line in found["log"].splitlines() if named in line]
        assert len(lines) == 1
        assert "memory" in lines[0]
