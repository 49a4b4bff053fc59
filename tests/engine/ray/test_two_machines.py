"""A Ray cluster of two machines that share neither memory nor processes, and one of which is lost.

They are namespaces of this machine, where it allows them.
"""

import json
import tempfile
from pathlib import Path

import pytest

from tests.engine.ray import two_machines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = """
import json, os, signal, sys, time
import ray
from tests.engine.ray import two_machines as two
from tests.faults.worlds import SCENARIO
import fedsim
import fedsim.engine.ray.grid as engine
from fedsim.basics.json_files import JsonLines

folder = sys.argv[1]
with open(f"{folder}/small.toml", "w") as file:
    file.write(SCENARIO)

class Grid(engine.RayGrid):
    # to the other machine something happens while a worker there is at work in round 2
    happens = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert len(self.worker_pids) == 2  # waits for both, and for who looks at the far one
        ray.get([watch._asked for watch in self._workers._watches.values()], timeout=60)

    def _send(self, worker, work, *rest):
        super()._send(worker, work, *rest)
        if worker.node == 1 and work.job.server_round == 2 and Grid.happens is not None:
            happens, Grid.happens = Grid.happens, None
            happens()

def run(name, *sets, happens=None):
    Grid.happens = happens
    begun = time.monotonic()
    scenario = fedsim.load_scenario(f"{folder}/small.toml", ["engine.chunk_size=4", *sets])
    result = fedsim.start(scenario, out=f"{folder}/{name}")
    file = result.folder.joinpath
    print("FOUND" + json.dumps({
        "name": name,
        "params": result.summary["params_sha256"],
        "chunks": JsonLines.read(file("chunks.jsonl")),
        "failed": [r["failed"] for r in JsonLines.read(file("participation.jsonl"))],
        "log": file("log.txt").read_text(),
        "seconds": time.monotonic() - begun,
        "happened": Grid.happens is None,
    }), flush=True)

def lose(name, number, happens):
    machine = two.SecondMachine(number)
    machine.join(address)
    nodes(2)
    run(name, *over, happens=lambda: happens(machine))
    machine.end()
    nodes(1)

def nodes(count):
    ray.init(address=address, log_to_driver=False, logging_level="error")
    two.wait_for_nodes(count)
    ray.shutdown()

run("inline")
second = two.SecondMachine()
address = two.start_head()
engine.RayGrid = Grid
over = ("engine.kind=ray", f"engine.address={address}", "engine.silence_timeout_s=8")
second.join(address)
nodes(2)
run("both", *over)
second.end()
nodes(1)
lose("killed", 3, lambda machine: machine.signal(signal.SIGKILL))
lose("worker frozen", 4, lambda machine: machine.signal(signal.SIGSTOP, "ray::WorkerProcess"))
lose("machine frozen", 5, lambda machine: machine.signal(signal.SIGSTOP))
lose("unplugged", 6, lambda machine: machine.unplug())
"""
RUNS = ("inline", "both", "killed", "worker frozen", "machine frozen", "unplugged")


@pytest.fixture(scope="module")
def found():
    """What the runs came to."""
    if why_not := two_machines.why_not():
        pytest.skip(f"no two machines here: {why_not}")
    # short for Ray's sockets
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as hidden,
        tempfile.TemporaryDirectory() as folder,
    ):
        ended = two_machines.alone(SCRIPT, Path(hidden), 500, folder)
    lines = [line for line in ended.out.splitlines() if line.startswith("FOUND")]
    runs = [json.loads(line.removeprefix("FOUND")) for line in lines]
    if ended.code is None:
        pytest.fail(f"it hangs after {[run['name'] for run in runs]}")
    assert ended.code == 0, ended.err[-3000:]
    return {run["name"]: run for run in runs}


@pytest.mark.parametrize("name", RUNS)
def test_the_bits_are_those_of_one_process(found, name):
    assert found[name]["params"] == found["inline"]["params"]
    assert found[name]["failed"] == [{}] * 3
    assert found[name]["happened"]


@pytest.mark.parametrize("server_round", [1, 2, 3])
def test_both_machines_train_chunks_and_the_run_folder_says_which(found, server_round):
    mine = [c for c in found["both"]["chunks"] if c["round"] == server_round]
    assert {c["node"] for c in mine} == {0, 1}
    assert {c["outcome"] for c in mine} == {"done"}
    assert "does not share the driver's memory" in found["both"]["log"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("killed", "ended unexpectedly"),
        ("worker frozen", "gave no sign of life for 8 s"),
        ("machine frozen", "gave no sign of life for 8 s"),
        ("unplugged", "gave no sign of life for 8 s"),
    ],
)
def test_a_machine_that_is_lost_in_mid_round_is_named_and_the_other_goes_on(found, name, how):
    (lost,) = [c for c in found[name]["chunks"] if c["outcome"] != "done"]
    assert (lost["round"], lost["node"], lost["outcome"]) == (2, 1, "died")
    named = f"round 2, chunk {lost['chunk']}, worker {lost['worker']}: its worker "
    (line,) = [line for line in found[name]["log"].splitlines() if named in line]
    assert f"its worker {lost['worker']} on node 1 (process " in line
    assert how in line
    assert "the chunk runs again on another worker" in line
