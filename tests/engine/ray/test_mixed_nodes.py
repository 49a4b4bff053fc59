"""Workers of which some share the driver's memory and some do not."""

import itertools

import pytest

from fedsim.basics.json_files import JsonLines
from fedsim.engine.inline import InlineGrid
from fedsim.engine.pipe import Line
from tests.faults.worlds import finish, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    sets = ("engine.chunk_size=4", "evaluation.clients=24")
    return small_world(tmp_path_factory.mktemp("world"), sets=sets)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    return finish(world, tmp_path_factory.mktemp("undisturbed"), InlineGrid(world.app, 24))


@pytest.fixture(scope="module")
def mixed(lender, world):
    from tests.engine.ray.mixed import MixedWorkers

    half = {"num_cpus": 0.5}
    with lender.grid(world.app, 24, kind=MixedWorkers, workers=2, client_resources=half) as grid:
        assert len(grid.worker_pids) == 2  # both have started
        assert [worker.near for worker in grid._workers.pool] == [True, False]
        yield grid


def test_a_near_and_a_far_worker_both_train_and_give_the_bits_of_one_process(
    world, mixed, undisturbed, tmp_path
):
    found = finish(world, tmp_path, mixed)
    assert found.params == undisturbed.params
    assert found.failed == [{}] * 3
    chunks = JsonLines.read(tmp_path / "run-0" / "chunks.jsonl")
    assert len(chunks) == 3 * (6 + 6)
    for server_round, action in itertools.product((1, 2, 3), ("train", "evaluate")):
        mine = [c for c in chunks if (c["round"], c["action"]) == (server_round, action)]
        assert {c["worker"] for c in mine} == {0, 1}
        assert {c["node"] for c in mine} == {0}


def test_what_clients_share_is_stored_once_per_call_and_no_reference_goes_through_a_pipe(
    world, mixed, tmp_path, monkeypatch
):
    import ray

    put, said = [], []
    store, say = ray.put, Line.send
    monkeypatch.setattr(ray, "put", lambda value: put.append(value) or store(value))
    monkeypatch.setattr(Line, "send", lambda self, value: said.append(value) or say(self, value))
    finish(world, tmp_path, mixed)
    assert len(put) == 3 * 2  # a training and an evaluation per round, of six chunks each
    assert said
    assert all(b.stored is None and b.arena is not None for _, b, _ in said)


@pytest.mark.slow
def test_a_near_worker_is_told_what_is_shared_where_the_system_gives_no_memory(
    world, mixed, undisturbed, tmp_path, monkeypatch
):
    def none_left(size):
        raise OSError("no memory")

    monkeypatch.setattr("fedsim.engine.ray.memory.Arena", none_left)
    monkeypatch.setattr(mixed._memory, "shared_arena", None)
    monkeypatch.setattr(mixed._memory, "result_arenas", [])
    assert finish(world, tmp_path, mixed).params == undisturbed.params
