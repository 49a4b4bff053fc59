import contextlib
import gc
import os

import numpy as np
import torch

from fedsim.engine.shared_memory import Arena, ArenaView, Probe
from tests.laws import federations as fed


def test_what_a_view_writes_the_owner_reads():
    arena = Arena(64)
    rows = arena.lend(torch.float32, (2, 3))
    ArenaView(arena.name).tensor(torch.float32, (2, 3)).copy_(torch.arange(6.0).reshape(2, 3))
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_arena_is_taken_while_anybody_holds_its_tensor():
    arena = Arena(64)
    assert arena.is_free
    rows = arena.lend(torch.float32, (2, 3))
    part = rows[1:]
    del rows
    assert not arena.is_free
    del part
    gc.collect()
    assert arena.is_free


def test_an_arena_is_never_taken_for_one_that_is_gone():
    """The system gives a closed file's number away at once: path and size may be an earlier one's.

    A worker that keeps the earlier one mapped would otherwise write where nobody reads.
    """
    gc.collect()  # what others have left gives its numbers back now, not below
    gone = Arena(64)
    before = gone.name
    del gone
    gc.collect()
    again = Arena(64)
    assert (again.name.path, again.name.size) == (before.path, before.size)
    assert again.name != before


def test_a_sign_is_seen_where_its_memory_is():
    probe = Probe()
    assert probe.sign.is_seen()
    assert probe.sign.number != Probe().sign.number


def test_a_sign_is_not_seen_where_its_path_is_somebody_elses(tmp_path):
    """As on another machine, or in another container, where a process has the driver's number."""
    sign, other, small = Probe().sign, Arena(16), Arena(1)
    (tmp_path / "file").write_bytes(sign.number)
    with (tmp_path / "file").open("r+b") as file:
        paths = (
            other.name.path, small.name.path, f"/proc/{os.getpid()}/fd/{file.fileno()}",
            f"/proc/{os.getpid()}/fd/999999", str(tmp_path / "file"),
        )  # fmt: skip
        for path in paths:
            assert not sign._replace(arena=sign.arena._replace(path=path)).is_seen()


def test_results_arrive_where_an_earlier_arena_was(lender):
    app, arrays = fed.make_app("logistic"), fed.initial_arrays("logistic")
    with lender.grid(app, 8, workers=1) as grid, contextlib.ExitStack() as taken:
        sent = fed.configure(fed.make_strategy("fedavg"), grid, arrays)
        expected = grid.send_and_receive(sent).params.numpy().copy()
        before = grid._memory.result_arenas[0].name
        grid._memory.result_arenas.clear()  # as when a larger one takes its place
        gc.collect()
        while (file := os.dup(0)) < int(before.path.rpartition("/")[2]):
            taken.callback(os.close, file)  # numbers below the earlier one's are not free
        os.close(file)
        again = grid.send_and_receive(sent).params
        assert grid._memory.result_arenas[0].name.path == before.path
        assert np.array_equal(again.numpy(), expected)
        assert torch.count_nonzero(again)
