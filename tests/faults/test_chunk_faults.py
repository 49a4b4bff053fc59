"""Clients and workers that fail inside a chunk of twenty: named, and nobody else's bits change."""

import os
import signal
import threading
import time

import pytest

from fedsim.basics.errors import RunError
from fedsim.engine.inline import InlineGrid
from fedsim.runs.policy import Policy
from tests.faults.worlds import CULPRIT, Misshapen, finish, is_alive, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory, trouble):
    return small_world(tmp_path_factory.mktemp("world"), trouble=trouble)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    return finish(world, tmp_path_factory.mktemp("undisturbed"), _inline(world))


@pytest.fixture(scope="module")
def dropped_out(world, tmp_path_factory):
    """The run in which the culprit is selected and drops out, always."""
    out = tmp_path_factory.mktemp("dropped")
    return finish(world, out, _inline(world), lambda _: [CULPRIT])


@pytest.fixture(scope="module")
def dropped_out_once(world, tmp_path_factory):
    """The run in which the culprit is selected and drops out in the first round alone."""
    out = tmp_path_factory.mktemp("dropped-once")
    drops = lambda server_round: [CULPRIT] if server_round == 1 else []  # noqa: E731
    return finish(world, out, _inline(world), drops)


@pytest.fixture(scope="module")
def engine(ray_cluster, world):
    from fedsim.engine.ray.grid import RayGrid

    with RayGrid(world.app, 24, workers=2, client_resources={"num_cpus": 0.5}) as grid:
        yield grid
        pids = grid.worker_pids
    _wait_until(lambda: not any(map(is_alive, pids)), "the workers outlive the grid")


@pytest.fixture
def whole_pool(engine):
    """The engine; after the test both its workers must live, and those it lost must not."""
    before = engine.worker_pids
    yield engine
    after = engine.worker_pids
    assert len(set(after)) == 2
    assert all(map(is_alive, after))
    lost = set(before) - set(after)
    _wait_until(lambda: not any(map(is_alive, lost)), f"ended workers still run: {lost}")


def _inline(world):
    return InlineGrid(world.app, world.data.num_clients)


def _wait_until(holds, otherwise, timeout_s=10.0):
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, otherwise
        time.sleep(0.05)


def test_a_drop_out_changes_the_result(undisturbed, dropped_out, dropped_out_once):
    assert len({undisturbed.params, dropped_out.params, dropped_out_once.params}) == 3


@pytest.mark.parametrize(
    ("kind", "cause", "words"),
    [
        ("raise", "raised", "ValueError: sample 3 is corrupt"),
        ("raise what cannot be unpickled", "raised", "sensor s1 gave 4.0"),
        pytest.param("kill", "died", "ended unexpectedly", marks=pytest.mark.slow),
        pytest.param("os._exit", "died", "ended unexpectedly", marks=pytest.mark.slow),
        ("sys.exit", "raised", "SystemExit: 0"),
        ("allocate", "raised", "memory"),
    ],
)
def test_a_client_that_fails_in_every_round_counts_as_dropped_out(
    world, whole_pool, trouble, dropped_out, tmp_path, kind, cause, words
):
    trouble.plan(kind)
    found = finish(world, tmp_path, whole_pool)
    assert found.failed == [{str(CULPRIT): cause}] * 3
    for server_round in (1, 2, 3):
        lines = [
            line
            for line in found.log.splitlines()
            if f"client {CULPRIT}, round {server_round}: {cause}: " in line
        ]
        assert len(lines) == 1
        assert words in lines[0]
    assert found.params == dropped_out.params
    if cause == "died":  # with its chunk, with it again, alone; from then on alone first
        assert trouble.happened == 3 + 1 + 1


def test_a_client_that_returns_nan_in_every_round_counts_as_dropped_out(
    world, whole_pool, trouble, dropped_out, tmp_path
):
    trouble.plan("nan")
    found = finish(world, tmp_path, whole_pool)
    assert found.failed == [{str(CULPRIT): "not finite"}] * 3
    assert f"client {CULPRIT}, round 3: not finite: " in found.log
    assert found.params == dropped_out.params


@pytest.mark.slow  # test_silence.py has one
def test_a_client_that_hangs_in_native_code_in_round_1_counts_as_dropped_out_then(
    world, whole_pool, trouble, dropped_out_once, tmp_path
):
    trouble.plan("hang", times=2)  # with its chunk, and alone
    whole_pool.client_timeout_s = 0.3
    try:
        found = finish(world, tmp_path, whole_pool)
    finally:
        whole_pool.client_timeout_s = None
    assert found.failed == [{str(CULPRIT): "hung"}, {}, {}]
    assert f"client {CULPRIT}, round 1: hung: no answer within 0.3 s of its start" in found.log
    assert found.params == dropped_out_once.params


@pytest.mark.slow
def test_a_client_that_hangs_in_native_code_in_every_round_counts_as_dropped_out(
    world, whole_pool, trouble, dropped_out, tmp_path
):
    trouble.plan("hang")
    whole_pool.client_timeout_s = 0.3
    try:
        found = finish(world, tmp_path, whole_pool)
    finally:
        whole_pool.client_timeout_s = None
    assert found.failed == [{str(CULPRIT): "hung"}] * 3
    assert f"client {CULPRIT}, round 3: hung: no answer within 0.3 s of its start" in found.log
    assert found.params == dropped_out.params
    assert trouble.happened == 2 + 1 + 1  # with its chunk, alone; from then on alone first


@pytest.mark.slow
def test_a_client_that_returns_wrong_shapes_in_every_round_counts_as_dropped_out(
    world, ray_cluster, tmp_path
):
    """Of a vectorised chunk all replies have one shape; ordinary clients answer as they like."""
    from fedsim.engine.ray.grid import RayGrid

    app, half = Misshapen(world.app, CULPRIT), {"num_cpus": 0.5}
    with RayGrid(app, 24, workers=1, client_resources=half) as grid:
        found = finish(world, tmp_path, grid)
        grid._plain.contexts.clear()  # what clients remember of the first run
        dropped = finish(world, tmp_path, grid, lambda _: [CULPRIT])
    assert found.failed == [{str(CULPRIT): "shape"}] * 3
    assert f"client {CULPRIT}, round 3: shape: " in found.log
    assert dropped.failed == [{str(CULPRIT): "absent"}] * 3
    assert found.params == dropped.params


def test_failures_are_counted_by_cause_beside_those_who_replied(
    world, whole_pool, trouble, tmp_path
):
    trouble.plan("raise")
    record = finish(world, tmp_path, whole_pool).metrics[-1]
    counted = {name: value for name, value in record.items() if name.startswith("clients/")}
    assert counted == {
        "clients/selected": 24,
        "clients/replied": 23,
        "clients/absent": 0,
        "clients/failed": 1,
        "clients/failed/raised": 1,
    }


@pytest.mark.slow
def test_a_client_that_kills_its_workers_in_round_1_counts_as_dropped_out_then(
    world, whole_pool, trouble, dropped_out_once, tmp_path
):
    trouble.plan("kill", times=3)  # with its chunk, when the chunk runs again, and alone
    found = finish(world, tmp_path, whole_pool)
    assert found.failed == [{str(CULPRIT): "died"}, {}, {}]
    assert f"client {CULPRIT}, round 1: died: its worker " in found.log
    assert found.params == dropped_out_once.params


def test_a_client_that_kills_its_worker_once_changes_no_bit(
    world, whole_pool, trouble, undisturbed, tmp_path
):
    trouble.plan("kill", times=1)
    found = finish(world, tmp_path, whole_pool)
    assert trouble.happened == 1
    assert found.failed == [{}] * 3
    assert found.params == undisturbed.params


def test_a_worker_killed_from_outside_is_named_and_changes_no_bit(
    world, whole_pool, trouble, undisturbed, tmp_path
):
    trouble.plan("pause", times=1)
    killed = []

    def kill():
        killed.append(trouble.victim())
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    workers = whole_pool.worker_pids
    found = finish(world, tmp_path, whole_pool)
    killer.join()
    assert killed[0] in workers
    assert found.failed == [{}] * 3
    assert f"(process {killed[0]}) ended unexpectedly" in found.log
    assert f"round 1, chunk 0, worker {workers.index(killed[0])}" in found.log
    assert found.params == undisturbed.params


@pytest.mark.slow
def test_an_idle_worker_killed_between_rounds_changes_no_bit(
    world, whole_pool, undisturbed, tmp_path
):
    for pid in whole_pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
    found = finish(world, tmp_path, whole_pool)
    assert found.failed == [{}] * 3
    assert found.params == undisturbed.params


@pytest.mark.parametrize(("kind", "cause"), [("raise", "raised"), ("nan", "not finite")])
def test_inline_names_who_raises_or_returns_nan(world, trouble, dropped_out, tmp_path, kind, cause):
    trouble.plan(kind)
    found = finish(world, tmp_path, _inline(world))
    assert found.failed == [{str(CULPRIT): cause}] * 3
    assert found.params == dropped_out.params


def test_inline_names_who_calls_sys_exit(world, trouble, dropped_out, tmp_path):
    trouble.plan("sys.exit")
    found = finish(world, tmp_path, _inline(world))
    assert found.failed == [{str(CULPRIT): "raised"}] * 3
    assert found.params == dropped_out.params


def test_a_reply_that_was_refused_leaves_no_memory_behind(
    world, trouble, dropped_out_once, tmp_path
):
    trouble.plan("nan", times=1)
    found = finish(world, tmp_path, _inline(world))
    assert found.failed == [{str(CULPRIT): "not finite"}, {}, {}]
    assert found.params == dropped_out_once.params


def test_an_engine_that_has_served_another_run_brings_no_memories_into_the_next(
    world, undisturbed, tmp_path
):
    engine = _inline(world)
    assert finish(world, tmp_path, engine).params == undisturbed.params
    assert finish(world, tmp_path, engine, keep_memories=True).params == undisturbed.params


def test_a_client_that_fails_twice_in_round_1_counts_as_dropped_out_then(
    world, whole_pool, trouble, dropped_out_once, tmp_path
):
    trouble.plan("raise", times=2)  # with its chunk, and alone
    found = finish(world, tmp_path, whole_pool)
    assert found.failed == [{str(CULPRIT): "raised"}, {}, {}]
    assert found.params == dropped_out_once.params


def test_a_chunk_that_fails_once_for_no_one_changes_no_bit(
    world, whole_pool, trouble, undisturbed, tmp_path
):
    trouble.plan("raise", times=1)  # with its chunk; alone it does well
    found = finish(world, tmp_path, whole_pool)
    assert found.failed == [{}] * 3
    assert found.params == undisturbed.params


def _run_under(policy_sets, trouble, tmp_path):
    world = small_world(tmp_path, trouble=trouble, sets=policy_sets)
    out = tmp_path / "out"
    out.mkdir()
    return finish(world, out, _inline(world))


def test_on_failure_stop_ends_the_run_at_the_first_failure_naming_it(trouble, tmp_path):
    trouble.plan("raise")
    with pytest.raises(RunError, match=rf"client {CULPRIT}, round 1: raised: .*sample 3"):
        _run_under(("engine.on_failure=stop",), trouble, tmp_path)


def test_fewer_replies_than_min_replies_end_the_run_naming_the_first_failure(trouble, tmp_path):
    trouble.plan("raise")
    with pytest.raises(RunError, match=rf"23 of 24 .*min_replies = 24.*client {CULPRIT}, round 1"):
        _run_under(("engine.min_replies=24",), trouble, tmp_path)


def test_as_many_replies_as_min_replies_let_the_run_go_on(trouble, tmp_path):
    trouble.plan("raise")
    assert _run_under(("engine.min_replies=23",), trouble, tmp_path).failed[2] != {}


def test_on_failure_stop_holds_for_the_evaluation_on_clients_too(trouble, tmp_path):
    trouble.plan("raise")
    sets = ("engine.on_failure=stop", "evaluation.clients=24")
    world = small_world(tmp_path, trouble=trouble, split="test", sets=sets)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RunError, match=rf"client {CULPRIT}, round 1: raised: .*sample 3"):
        finish(world, out, _inline(world))


def test_drop_out_is_no_failure_under_any_policy():
    from fedsim.messages.failures import Failure

    absent = [Failure(4, 1, "absent", "was selected and dropped out")]
    Policy("stop", 5).judge(1, 1, absent)
    with pytest.raises(RunError, match="client 4"):
        Policy("stop", 1).judge(1, 2, [Failure(4, 1, "raised", "no")])
