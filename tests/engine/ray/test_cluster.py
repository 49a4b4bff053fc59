"""RayGrid on clusters that it did not start: joined, spread over nodes, left running."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

pytestmark = (
    pytest.mark.slow
)  # two nodes start; tests/engine/ray/test_mixed_nodes.py has two kinds of worker

SCRIPT = """
import functools, hashlib, json, sys
import ray
from ray.cluster_utils import Cluster
from fedsim.engine.ray import cluster as ray_cluster, memory
from fedsim.engine.ray.grid import RayGrid
from fedsim.engine.inline import InlineGrid
from fedsim.scenario.load import load
from fedsim.runs.world import build
from flwr.app import ConfigRecord
from fedsim.messages.records import named_tensors
from fedsim.runs.checkpoint import tensors_sha256

def train(world, grid, leaves=None):
    arrays = world.arrays
    with grid:
        for server_round in (1, 2):
            if server_round == 2 and leaves is not None:
                cluster.remove_node(leaves)
            replies = grid.send_and_receive(
                world.strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
            arrays, _ = world.strategy.aggregate_train(server_round, replies)
    workers = sorted({entry["worker"] for entry in grid.chunk_log})
    return tensors_sha256(named_tensors(arrays)), workers

world = build(load("quickstart", ["partition.clients=12", "engine.chunk_size=2"]))
found = {"inline": train(world, InlineGrid(world.app, 12))[0]}

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
for transport in ("shared memory", "ray"):
    if transport == "ray":
        memory._probe_arena = lambda: None
    grid = RayGrid(world.app, 12, address=cluster.address)
    nodes = set()
    for worker in grid._workers.pool:
        nodes.add(ray.get(worker.actor.ready.remote(None)).node)
    assert all(grid.worker_pids)  # waits for both
    near = {worker.near for worker in grid._workers.pool}
    found[transport], workers = train(world, grid)
    found[transport + " nodes"], found[transport + " workers"] = len(nodes), workers
    found[transport + " near"] = sorted(near)
    found["still connected"] = ray.is_initialized()

ray.init(address=cluster.address, log_to_driver=False)
found["cluster alive"] = sum(node["Alive"] for node in ray.nodes())
found["standing"] = ray_cluster._standing_cluster() == cluster.address
grid = RayGrid(world.app, 12, workers=1)
found["joined"] = train(world, grid)[0]
found["joined is still up"] = ray.is_initialized()
ray.shutdown()
grid = RayGrid(world.app, 12, workers=1)  # finds the cluster that stands on this machine
with grid:
    found["found"] = sum(node["Alive"] for node in ray.nodes())
grid = RayGrid(world.app, 12, address=cluster.address, startup_timeout_s=60)
assert all(grid.worker_pids)
found["one node left"], found["one node left workers"] = train(world, grid, other)
found["incidents"] = grid.incidents
cluster.shutdown()
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """What the script saw on two Ray nodes of this machine."""
    # a folder of its own, short for Ray's sockets: nobody else is to find this cluster
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True, text=True, timeout=240, check=False,
            env={**os.environ, "RAY_TMPDIR": folder},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND")[1])


@pytest.mark.parametrize("transport", ["shared memory", "ray"])
def test_two_ray_nodes_give_the_bits_of_one_process(found, transport):
    assert found[transport] == found["inline"]


@pytest.mark.parametrize("transport", ["shared memory", "ray"])
def test_workers_sit_on_both_nodes_and_both_work(found, transport):
    assert found[f"{transport} nodes"] == 2
    assert found[f"{transport} workers"] == [0, 1]


def test_each_transport_was_really_taken(found):
    assert found["shared memory near"] == [True]
    assert found["ray near"] == [False]


def test_a_cluster_named_by_address_is_left_running(found):
    assert found["cluster alive"] == 2
    assert not found["still connected"]


def test_a_cluster_already_joined_is_used_and_never_shut_down(found):
    assert found["joined"] == found["inline"]
    assert found["joined is still up"]


def test_a_cluster_that_stands_on_this_machine_is_joined(found):
    assert found["standing"]
    assert found["found"] == 2


def test_when_a_node_leaves_during_a_run_the_others_go_on_to_the_same_bits(found):
    assert found["one node left workers"] == [0, 1]  # both worked in round 1
    assert found["one node left"] == found["inline"]
    assert any("ended unexpectedly; the chunk runs again" in line for line in found["incidents"])
    assert any(
        "is not replaced: the Ray cluster has room for 1 since a node has left; 1 go on" in line
        for line in found["incidents"]
    )


def test_a_note_of_a_dead_cluster_is_ignored(tmp_path, monkeypatch):
    import ray

    from fedsim.engine.ray.cluster import _standing_cluster

    monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda: "127.0.0.1:1")
    assert _standing_cluster() is None
    monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda: None)
    assert _standing_cluster() is None
