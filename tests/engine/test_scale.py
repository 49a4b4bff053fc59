"""A million registered clients cost nothing until they are asked for."""

import resource
import tracemalloc

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.admission import AdmissionGrid
from fedsim.federation.grids.bytes import ByteCountingGrid
from fedsim.federation.grids.participation import ParticipationGrid
from fedsim.runs.start import start
from fedsim.runs.world import build
from fedsim.scenario.load import load

MILLION = 1_000_000
SHARED = """
rounds = 2
[data]
name = "digits"
[partition]
kind = "iid"
parts = 50
[engine]
kind = "inline"
"""


@pytest.fixture(scope="module")
def world():
    overrides = [
        f"partition.clients={MILLION}",
        "participation.cohort_size=20",
        "data.max_samples=60",
        "engine.kind=inline",
    ]
    return build(load("fedavg_synthetic", overrides))


def one_round(world, server_round, arrays):
    engine = InlineGrid(world.app, MILLION)
    grid = ParticipationGrid(
        AdmissionGrid(ByteCountingGrid(engine), world.layout), world.participation, seed=1
    )
    grid.begin_round(server_round)
    cohort = world.strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
    replies = grid.send_and_receive(cohort)
    return cohort, replies, world.strategy.aggregate_train(server_round, replies)[0]


def test_a_round_reads_the_data_of_the_sampled_clients_only(world):
    reader = world.app.executor.data
    before = reader.clients_read
    cohort, replies, _ = one_round(world, 1, world.arrays)
    assert reader.clients_read - before == 20
    assert len(cohort) == replies.num_clients == 20
    assert cohort.client_ids.max() < MILLION
    assert cohort.client_ids.max() > 1000  # drawn from all of them


def test_no_structure_of_a_million_entries_is_made(world):
    _, _, arrays = one_round(world, 1, world.arrays)  # whatever is made once
    tracemalloc.start()
    try:
        one_round(world, 2, arrays)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # a list of a million integers takes 8 MB; a round takes the samples of twenty clients
    assert peak < 4_000_000


def test_node_ids_are_a_range(world):
    nodes = InlineGrid(world.app, MILLION).get_node_ids()
    assert isinstance(nodes, range)
    assert (nodes[0], nodes[-1]) == (2, MILLION + 1)


def test_different_rounds_ask_different_clients(world):
    first, _, arrays = one_round(world, 1, world.arrays)
    second, _, _ = one_round(world, 2, arrays)
    assert not np.array_equal(first.client_ids, second.client_ids)


@pytest.mark.parametrize(
    ("strategy", "participation"),
    [
        ("fedavg", {"kind": "uniform", "cohort_size": 20}),
        ("fedau", {"kind": "bernoulli", "rate": 2e-5}),
        ("fedavg", {"kind": "markov", "rate": 2e-5}),
    ],
)
def test_an_idle_client_takes_at_most_200_bytes_in_a_whole_run(tmp_path, strategy, participation):
    """Of the process: data, rules, the server's state, its checkpoint, whatever holds them."""
    (tmp_path / "mine.toml").write_text(SHARED)

    def run(clients, name):
        rate = {"rate": 20 / clients} if "rate" in participation else {}
        overrides = [
            f"partition.clients={clients}",
            f"strategy.name='{strategy}'",
            *(f"participation.{k}={v!r}" for k, v in {**participation, **rate}.items()),
        ]
        start(load(tmp_path / "mine.toml", overrides), out=tmp_path / name)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before = run(1000, "few")  # whatever is loaded once
    after = run(MILLION, "many")
    assert after - before <= 200 * MILLION
