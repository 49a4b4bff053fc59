"""Workers that will never answer: named within a limit, and nobody's bits change."""

import os
import signal
import threading

import pytest

from fedsim.engine.inline import InlineGrid
from tests.faults.worlds import CULPRIT, finish, is_alive, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory, trouble):
    folder = tmp_path_factory.mktemp("world")
    return small_world(folder, trouble=trouble, sets=("engine.chunk_size=4",))


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    return finish(world, tmp_path_factory.mktemp("undisturbed"), InlineGrid(world.app, 24))


@pytest.fixture(scope="module")
def engine(lender, world):
    from tests.engine.ray.mixed import MixedWorkers

    half = {"num_cpus": 0.5}
    with lender.grid(world.app, 24, kind=MixedWorkers, workers=2, client_resources=half) as grid:
        yield grid


@pytest.fixture
def mixed(engine):
    """A grid of a near and a far worker, both of which have started."""
    assert len(engine.worker_pids) == 2
    assert [worker.near for worker in engine._workers.pool] == [True, False]
    return engine


@pytest.mark.parametrize(
    "number", [pytest.param(0, id="near"), pytest.param(1, id="far", marks=pytest.mark.slow)]
)
def test_a_worker_that_is_stopped_in_mid_round_is_named_and_changes_no_bit(
    world, mixed, trouble, undisturbed, tmp_path, monkeypatch, number
):
    monkeypatch.setattr(mixed._vigil, "limit_s", 2.0)
    monkeypatch.setattr(mixed._workers, "pool", [mixed._workers.pool[number]])
    trouble.plan("pause", times=1)
    stopped = []

    def stop():
        stopped.append(trouble.victim())
        os.kill(stopped[0], signal.SIGSTOP)

    stopper = threading.Thread(target=stop)
    stopper.start()
    found = finish(world, tmp_path, mixed)
    stopper.join()
    assert found.params == undisturbed.params
    assert found.failed == [{}] * 3
    (line,) = [each for each in found.log.splitlines() if "no sign of life" in each]
    assert "round 1, chunk " in line
    assert (
        f"its worker {number} on node 0 (process {stopped[0]}) gave no sign of life for 2" in line
    )
    assert "the chunk runs again" in line
    assert "to wait longer raise [engine] silence_timeout_s" in line
    assert mixed.worker_pids != stopped
    assert number or not is_alive(stopped[0])  # Ray takes some seconds to end a far one


@pytest.mark.slow  # it works for as long as a silence takes
def test_a_client_that_works_for_long_and_lets_nobody_else_run_is_not_silent(
    world, mixed, trouble, tmp_path, monkeypatch
):
    monkeypatch.setattr(mixed._vigil, "limit_s", 1.0)
    monkeypatch.setattr(mixed, "client_timeout_s", 1.0)  # 4 s of its chunk
    trouble.plan("hang", times=2)  # with its chunk, and alone
    found = finish(world, tmp_path, mixed)
    assert found.failed == [{str(CULPRIT): "hung"}, {}, {}]
    assert "no sign of life" not in found.log


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["near", "far"])
def test_a_client_that_sleeps_for_ever_is_named_without_a_limit_of_its_own(
    world, mixed, trouble, tmp_path, monkeypatch, number
):
    monkeypatch.setattr(mixed._vigil, "limit_s", 1.0)
    monkeypatch.setattr(mixed._workers, "pool", [mixed._workers.pool[number]])
    trouble.plan("sleep", times=2)  # with its chunk, and alone
    found = finish(world, tmp_path, mixed)
    assert found.failed == [{str(CULPRIT): "hung"}, {}, {}]
    assert f"round 1: hung: its worker {number} on node 0 (process " in found.log
    assert "slept without doing anything and was ended; to wait longer raise [engine]" in found.log
