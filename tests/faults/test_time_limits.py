"""Limits on time: who is slow is named, who is innocent is not, nothing unfinished is kept."""

import dataclasses
import signal
import threading
import time

import numpy as np
import pytest
import torch

from fedsim.basics.errors import RunError
from fedsim.engine.client_app import CohortApp
from fedsim.engine.inline import InlineGrid
from fedsim.messages.cohort import Cohort
from fedsim.messages.layout import Payload
from fedsim.messages.records import model_tensors
from tests.faults.worlds import CULPRIT, SlowBuild, Unreadable, is_alive, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory, trouble):
    return small_world(tmp_path_factory.mktemp("world"), trouble=trouble)


@pytest.fixture(scope="module")
def engine(lender, world):
    with lender.grid(world.app, 24, workers=2, client_resources={"num_cpus": 0.5}) as grid:
        yield grid


@pytest.fixture
def grid(engine):
    engine.store.restore([], {})
    engine.chunk_log.clear()
    yield engine
    engine.client_timeout_s = None
    assert all(map(is_alive, engine.worker_pids))


def cohort_of(world, clients, *, absent=()):
    params, buffers = model_tensors(world.layout, world.arrays)
    return Cohort(
        client_ids=np.array(clients),
        server_round=1,
        layout=world.layout,
        shared=Payload(params, buffers),
        absent=np.isin(clients, absent),
    )


def expected(world, clients, *, absent=()):
    """What the clients return and remember when nothing goes wrong."""
    inline = InlineGrid(world.app, 24)
    replies = inline.send_and_receive(cohort_of(world, clients, absent=absent))
    return replies.params, inline.store.export()


def same_memories(grid, memories):
    clients, state = grid.store.export()
    return (
        clients == memories[0]
        and state.keys() == memories[1].keys()
        and all(torch.equal(state[name], memories[1][name]) for name in state)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sleep", "loop"])
def test_a_client_that_hangs_is_named_and_the_rest_of_its_chunk_is_done(world, grid, trouble, kind):
    clients = [3, 5, CULPRIT, 22]
    params, memories = expected(world, clients, absent=[CULPRIT])
    trouble.plan(kind)
    grid.client_timeout_s = 1.0
    replies = grid.send_and_receive(cohort_of(world, clients))
    assert [(f.client_id, f.server_round, f.cause) for f in replies.failures] == [
        (CULPRIT, 1, "hung")
    ]
    assert "no answer within 1 s" in replies.failures[0].reason
    assert torch.equal(replies.params, params)
    assert same_memories(grid, memories)


@pytest.mark.slow
def test_a_worker_that_is_slow_to_make_its_executor_does_not_blame_its_clients(ray_cluster, world):
    from fedsim.engine.ray.grid import RayGrid

    app = CohortApp(SlowBuild(world.app._build_executor, 4.0), world.plan)
    resources = {"num_cpus": 0.5}
    clients = [1, 2]
    with RayGrid(app, 24, workers=1, client_resources=resources, client_timeout_s=1.0) as grid:
        replies = grid.send_and_receive(cohort_of(world, clients))
    assert replies.failures == ()
    assert torch.equal(replies.params, expected(world, clients)[0])


def test_a_call_that_timed_out_returns_the_chunks_that_are_done(world, grid, trouble):
    everybody = list(range(24))
    params, memories = expected(world, everybody)
    trouble.plan("sleep")
    assert len(grid.worker_pids) == 2  # both have begun
    begun = time.monotonic()
    replies = grid.send_and_receive(cohort_of(world, everybody), timeout=3.0)
    assert 2.9 < time.monotonic() - begun < 6
    late, done = everybody[:20], everybody[20:]  # the culprit's chunk, and the other
    assert [(f.client_id, f.cause) for f in replies.failures] == [(c, "late") for c in late]
    assert replies.client_ids.tolist() == done
    assert torch.equal(replies.params, params[20:])
    assert same_memories(grid, (done, {name: rows[20:] for name, rows in memories[1].items()}))


def test_after_a_call_that_timed_out_the_next_one_has_the_undisturbed_bits(world, grid, trouble):
    trouble.plan("pause", times=1)
    replies = grid.send_and_receive(cohort_of(world, [0, CULPRIT]), timeout=0.5)
    assert [(f.client_id, f.cause) for f in replies.failures] == [(0, "late"), (CULPRIT, "late")]
    assert len(grid.store) == 0
    trouble.end()
    params, memories = expected(world, [0, CULPRIT])
    assert torch.equal(grid.send_and_receive(cohort_of(world, [0, CULPRIT])).params, params)
    assert same_memories(grid, memories)


@pytest.mark.slow
def test_after_a_call_that_was_interrupted_the_next_one_has_the_undisturbed_bits(
    world, grid, trouble
):
    trouble.plan("pause", times=1)
    main = threading.main_thread().ident
    interrupt = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive(cohort_of(world, [0, CULPRIT]))
    interrupt.join()
    assert len(grid.store) == 0
    trouble.end()  # and who was asked first would answer now
    params, memories = expected(world, [1, 2])
    assert torch.equal(grid.send_and_receive(cohort_of(world, [1, 2])).params, params)
    assert same_memories(grid, memories)


def test_what_clients_remember_is_kept_once_although_their_chunk_ran_twice(world, grid, trouble):
    trouble.plan("kill", times=1)
    clients = list(range(24))
    grid.send_and_receive(cohort_of(world, clients))
    assert trouble.happened == 1
    first = [entry for entry in grid.chunk_log if entry["chunk"] == 0]
    assert [(entry["attempt"], entry["outcome"]) for entry in first] == [(1, "died"), (2, "done")]
    assert same_memories(grid, expected(world, clients)[1])


def test_inline_returns_what_is_done_when_the_time_is_over(world, trouble):
    trouble.plan("pause", times=1)
    inline = InlineGrid(world.app, 24)
    replies = inline.send_and_receive(cohort_of(world, list(range(24))), timeout=1.0)
    assert [(f.client_id, f.cause) for f in replies.failures] == [
        (c, "late") for c in range(20, 24)
    ]
    assert replies.client_ids.tolist() == list(range(20))
    assert inline.store.export()[0] == list(range(20))


def test_a_cohort_that_is_pushed_is_pulled_reply_by_reply(world):
    inline = InlineGrid(world.app, 24)
    cohort = cohort_of(world, [4, 8, 20])
    ids = list(inline.push_messages(cohort))
    assert len(inline.store) == 0  # nobody has worked yet
    by_client = dict(zip([4, 8, 20], ids, strict=True))
    (reply,) = inline.pull_messages([by_client[8]])
    assert reply.metadata.src_node_id == 8 + 2
    assert reply.metadata.reply_to_message_id == by_client[8]
    others = list(inline.pull_messages(ids))
    assert [other.metadata.src_node_id - 2 for other in others] == [4, 20]
    assert list(inline.pull_messages(ids)) == []


@pytest.mark.slow
def test_a_cluster_without_room_is_named_within_the_start_up_limit(ray_cluster, world):
    from fedsim.engine.ray.grid import RayGrid

    cpus = ray_cluster.cluster_resources()["CPU"]
    small = {"num_cpus": 0.5}
    with RayGrid(world.app, 24, workers=1, client_resources=small) as other:
        assert other.worker_pids
        with RayGrid(
            world.app, 24, workers=1, client_resources={"num_cpus": cpus}, startup_timeout_s=2.0
        ) as full:
            begun = time.monotonic()
            with pytest.raises(RunError, match=r"worker 0 of 1 did not start within .* CPUs free"):
                full.send_and_receive(cohort_of(world, [0, 1]))
            assert time.monotonic() - begun < 5


def test_a_worker_larger_than_every_machine_is_refused_at_once(ray_cluster, world):
    from fedsim.engine.ray.grid import RayGrid

    with pytest.raises(RunError, match="no node with room for one worker of 1000 CPUs"):
        RayGrid(world.app, 24, client_resources={"num_cpus": 1000})


@pytest.mark.slow
def test_an_application_that_cannot_be_unpickled_is_named_as_a_worker_that_did_not_start(
    ray_cluster, world
):
    from fedsim.engine.ray.grid import RayGrid

    broken = dataclasses.replace(world.plan, reason=Unreadable())
    with (
        RayGrid(CohortApp(world.app._build_executor, broken), 24, workers=1) as grid,
        pytest.raises(RunError, match="worker 0 did not start: "),
    ):
        grid.send_and_receive(cohort_of(world, [0, 1]))
