"""The states of clients: the same bits wherever they lie, within the memory allowed."""

import os
import resource
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.basics.errors import RunError
from fedsim.engine import client_states as store_module
from fedsim.engine.client_states import ClientStore
from fedsim.runs.checkpoint import Checkpoint, load, save
from fedsim.runs.start import start
from fedsim.scenario.load import load as load_scenario

ROW = 22  # bytes of a memory below


def memories(clients, stamp):
    """Memories that tell client and time of their making."""
    numbers = torch.tensor(clients, dtype=torch.float64) + stamp / 100
    return {
        "momentum": torch.stack([numbers, -numbers, numbers * 3], dim=1).reshape(-1, 3, 1).float(),
        "steps": torch.tensor(clients) * 1000 + stamp,
        "seen": torch.tensor([[c % 2 == 0, stamp % 2 == 0] for c in clients]),
    }


cohorts = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True), max_size=12)


@given(
    cohorts=cohorts,
    rows=st.integers(0, 12),
    asked=st.lists(st.integers(0, 35), max_size=9),
    block=st.sampled_from([1, 3 * ROW, 7 * ROW, 1 << 24]),
    long=st.sampled_from([ROW, ROW + 1]),
)
def test_memories_on_the_disk_have_the_bits_of_those_in_memory(cohorts, rows, asked, block, long):
    with mock.patch.multiple(store_module, _BLOCK=block, _LONG=long, _MOVED=2 * ROW):
        _compare(cohorts, rows, asked)


def _compare(cohorts, rows, asked):
    whole, limited, plain = ClientStore(), ClientStore(rows * ROW / 2**20), {}
    for stamp, clients in enumerate(cohorts):
        state = memories(clients, stamp)
        for store in (whole, limited):
            store.commit(clients, state)
        for row, client in enumerate(clients):
            plain[client] = {name: stack[row] for name, stack in state.items()}
    assert limited.spilled == max(0, len(plain) - rows)
    assert limited.held_bytes <= rows * ROW
    for store in (whole, limited):
        found, has = store.rows(asked)
        assert has == tuple(client in plain for client in asked)
        for name, stack in found.items():
            for row, client in enumerate(asked):
                expected = plain[client][name] if client in plain else torch.zeros_like(stack[row])
                assert stack.dtype == expected.dtype
                assert torch.equal(stack[row], expected)
        clients, stacks = store.export()
        assert clients == sorted(plain)
        for name, stack in stacks.items():
            assert torch.equal(stack, torch.stack([plain[client][name] for client in clients]))


def test_a_checkpoint_holds_memories_that_lie_on_the_disk_and_gives_them_back(tmp_path):
    store = ClientStore(5 * ROW / 2**20)
    state = memories(list(range(40)), 1)
    store.commit(range(40), state)
    clients, stacks = store.export()
    saved = Checkpoint(3, "", {}, {}, {"w": torch.ones(2)}, clients=clients, client_state=stacks)
    read = load(save(tmp_path, saved, keep=1))
    again = ClientStore(7 * ROW / 2**20)
    again.commit([77], memories([77], 0))  # forgotten
    again.restore(read.clients, read.client_state)
    assert (len(again), again.spilled) == (40, 33)
    for name, stack in again.rows(range(40))[0].items():
        assert torch.equal(stack, state[name])


def test_what_was_exported_does_not_change_with_the_store():
    for store in (ClientStore(), ClientStore(ROW / 2**20)):
        store.commit([1, 2], memories([1, 2], 0))
        _, before = store.export()
        store.commit([1, 2], memories([1, 2], 5))
        for name, stack in memories([1, 2], 0).items():
            assert torch.equal(before[name], stack)


def test_a_memory_may_hold_tensors_without_numbers():
    store = ClientStore()
    store.commit([3], {"nothing": torch.zeros(1, 0, 2)})
    stacks, has = store.rows([3, 4])
    assert (stacks["nothing"].shape, has) == ((2, 0, 2), (True, False))


def test_a_memory_of_another_shape_than_the_others_is_refused():
    store = ClientStore()
    store.commit([1], {"m": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="those of others"):
        store.commit([2], {"m": torch.zeros(1, 4)})


def test_a_disk_that_takes_no_memory_is_named_with_the_remedy():
    store = ClientStore(ROW / 2**20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * ROW, before[1]))  # no file may be longer
    try:
        store.commit([0, 1, 2], memories([0, 1, 2], 0))
        with pytest.raises(RunError, match=r"state_limit_mb.*set TMPDIR"):
            store.commit([3], memories([3], 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_for_a_copy_of_the_memories_is_named_too():
    store = ClientStore(ROW / 2**20)
    store.commit(range(9), memories(list(range(9)), 0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * ROW, before[1]))
    try:
        with pytest.raises(RunError, match=r"state_limit_mb.*set TMPDIR"):
            store.export()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.export()[0] == list(range(9))


def test_memory_of_many_clients_stays_within_the_limit_and_costs_what_rows_take():
    store, rng = ClientStore(1.0), np.random.default_rng(0)
    state = torch.from_numpy(rng.standard_normal((64, 1000)).astype(np.float32))
    for first in range(0, 2048, 64):  # 8 MB
        store.commit(range(first, first + 64), {"m": state + first})
    assert store.held_bytes <= 2**20
    assert os.fstat(store._file.fileno()).st_size == store.spilled * 4000
    found = store.rows([0, 2047])[0]["m"]
    assert torch.equal(found, torch.stack([state[0], state[63] + 1984]))


SCENARIO = """
rounds = 4
[data]
name = "digits"
[partition]
kind = "iid"
clients = 20
[participation]
kind = "uniform"
cohort_size = 8
[client]
momentum = 0.9
keep_optimizer = true
[checkpoint]
every = 2
[engine]
kind = "inline"
"""


def test_a_run_has_the_same_result_whether_memories_lie_in_memory_or_on_the_disk(tmp_path):
    (tmp_path / "mine.toml").write_text(SCENARIO)
    results = []
    for name, overrides in (("held", []), ("spilled", ["engine.state_limit_mb=0.01"])):
        scenario = load_scenario(tmp_path / "mine.toml", overrides)
        results.append(start(scenario, out=tmp_path / name))
    held, spilled = ((r.folder / "checkpoints" / "round_000004.safetensors") for r in results)
    assert len(load(held).clients) > 8  # of 2.6 kB each: three of them have room
    for name, stack in load(held).client_state.items():
        assert torch.equal(stack, load(spilled).client_state[name])
    assert results[0].summary["params_sha256"] == results[1].summary["params_sha256"]
    assert results[0].summary["scenario_sha256"] == results[1].summary["scenario_sha256"]
