"""A client that takes the machine's memory: Ray ends its worker, fedsim names the client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

# In a process of its own: Ray watches memory with limits that are set when its cluster starts.
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from faults.worlds import CULPRIT, Trouble, small_world
from fedsim.cohort import Cohort
from fedsim.engine.ray import RayGrid
from fedsim.layout import Payload
from fedsim.records import model_tensors

folder, limit = Path(sys.argv[1]), float(sys.argv[2])
trouble = Trouble(folder)
world = small_world(folder, trouble=trouble)
trouble.plan("swell")
params, buffers = model_tensors(world.layout, world.arrays)
clients = np.array([3, CULPRIT, 22])
cohort = Cohort(clients, 1, world.layout, Payload(params, buffers))
watch = {"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 50}
with RayGrid(world.app, 24, workers=1, init_args={"_system_config": watch}) as grid:
    replies = grid.send_and_receive(cohort)
    replied, failures = replies.client_ids.tolist(), [tuple(f) for f in replies.failures]
    print(json.dumps({"replied": replied, "failures": failures, "incidents": grid.incidents}))
"""


def memory():
    """This machine's total and available memory in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found["MemTotal"], found["MemAvailable"]


@pytest.mark.slow
def test_a_client_that_takes_the_machine_s_memory_is_named_and_the_others_reply(tmp_path):
    pytest.importorskip("ray")
    total, available = memory()
    if available < 8 * 2**30:
        pytest.skip("needs 8 GB of free memory")
    limit = (total - available + 3 * 2**30) / total
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replied"] == [3, 22]
    ((client, server_round, cause, reason),) = found["failures"]
    assert (client, server_round, cause) == (17, 1, "died")
    assert "memory" in reason
