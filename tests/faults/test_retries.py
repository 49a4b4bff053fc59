"""Clients that failed are asked again, at the same place in the same chunk; quorums."""

import numpy as np
import pytest

from fedsim.basics.errors import RunError
from fedsim.basics.json_files import JsonLines
from fedsim.engine.inline import InlineGrid
from fedsim.messages.failures import Failure
from fedsim.runs.policy import Policy
from tests.faults.worlds import CULPRIT, finish, small_world

RETRY = ("engine.on_failure=retry",)


@pytest.fixture(scope="module", params=["fedavg", "flower:FedAvg"])
def strategy(request):
    return f"strategy.name={request.param}"


@pytest.fixture(scope="module")
def world(tmp_path_factory, trouble, strategy):
    folder = tmp_path_factory.mktemp("world")
    return small_world(folder, trouble=trouble, sets=(*RETRY, strategy))


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    return finish(world, tmp_path_factory.mktemp("undisturbed"), _inline(world))


@pytest.fixture(scope="module")
def dropped_out(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("dropped")
    return finish(world, out, _inline(world), lambda _: [CULPRIT])


def _inline(world):
    return InlineGrid(world.app, world.data.num_clients)


def _counts(done, name):
    return [record[name] for record in done.metrics[1:]]


@pytest.mark.parametrize(("kind", "times"), [("raise", 2), ("nan", 1), ("nan", 2)])
def test_a_client_that_succeeds_when_asked_again_has_the_undisturbed_bits(
    world, trouble, undisturbed, tmp_path, kind, times
):
    """Its memory (momentum) is committed once, or rounds 2 and 3 would differ."""
    trouble.plan(kind, times=times)  # raising: with its chunk, and alone
    found = finish(world, tmp_path, _inline(world))
    assert trouble.happened == times
    assert found.failed == [{}] * 3
    assert found.params == undisturbed.params
    assert _counts(found, "clients/retried") == [1, 0, 0]
    assert _counts(found, "clients/replied") == [24] * 3
    chunks = JsonLines.read(tmp_path / "run-0" / "chunks.jsonl")
    members = [tuple(c["clients"]) for c in chunks if c["round"] == 1 and c["chunk"] == 0]
    assert len(members) > 1
    assert set(members) == {tuple(range(20))}  # at its own place among neutral slots
    extra = _counts(found, "comm/downlink_bytes")
    assert extra[0] > extra[1] == extra[2]  # who is asked again is sent the model again


@pytest.mark.parametrize("kind", ["raise", "nan"])
def test_a_client_that_never_succeeds_is_skipped_and_counted(
    world, trouble, dropped_out, tmp_path, kind
):
    trouble.plan(kind)
    found = finish(world, tmp_path, _inline(world))
    cause = {"raise": "raised", "nan": "not finite"}[kind]
    assert found.failed == [{str(CULPRIT): cause}] * 3
    assert found.params == dropped_out.params
    assert _counts(found, "clients/retried") == [1] * 3
    assert _counts(found, "clients/failed") == [1] * 3


def test_a_client_is_asked_again_as_often_as_the_scenario_says(trouble, tmp_path):
    for retries in (1, 3):
        sets = (*RETRY, f"engine.retries={retries}", "rounds=1")
        world = small_world(tmp_path, trouble=trouble, sets=sets)
        trouble.plan("nan")
        out = tmp_path / str(retries)
        out.mkdir()
        finish(world, out, _inline(world))
        assert trouble.happened == 1 + retries


@pytest.mark.slow
def test_a_client_that_raises_on_ray_and_then_succeeds_has_the_undisturbed_bits(
    lender, trouble, tmp_path
):
    world = small_world(tmp_path, trouble=trouble, sets=RETRY)
    for name in ("inline", "ray"):
        (tmp_path / name).mkdir()
    undisturbed = finish(world, tmp_path / "inline", _inline(world))
    trouble.plan("raise", times=2)
    with lender.grid(world.app, 24, workers=1) as grid:
        found = finish(world, tmp_path / "ray", grid)
    assert found.failed == [{}] * 3
    assert found.params == undisturbed.params
    assert _counts(found, "clients/retried") == [1, 0, 0]


def test_clients_that_fail_in_evaluation_are_asked_again_too(trouble, tmp_path):
    sets = (*RETRY, "evaluation.clients=24", "rounds=1")
    found = []
    for times in (0, 2):
        world = small_world(tmp_path, trouble=trouble, split="test", sets=sets)
        trouble.plan("raise", times=times)
        out = tmp_path / str(times)
        out.mkdir()
        found.append(finish(world, out, _inline(world)).metrics[-1])
        assert trouble.happened == times
    local = [{k: v for k, v in record.items() if k.startswith("local/")} for record in found]
    assert local[0]
    assert local[0] == local[1]


def test_those_who_dropped_out_are_not_asked_again(trouble, tmp_path):
    sets = (*RETRY, "devices={drop_out=0.3}", "engine.retries=1")
    world = small_world(tmp_path, trouble=trouble, sets=sets)
    gone = {t: world.devices.fates(t, np.arange(24)).dropped for t in (1, 2, 3)}
    assert not gone[1][CULPRIT]
    trouble.plan("nan", times=2)
    out = tmp_path / "out"
    out.mkdir()
    found = finish(world, out, _inline(world))
    for server_round, failed in enumerate(found.failed, start=1):
        absent = {str(c) for c in range(24) if gone[server_round][c]}
        assert {c for c, cause in failed.items() if cause == "absent"} == absent
    assert _counts(found, "clients/retried") == [1, 0, 0]
    assert found.failed[0][str(CULPRIT)] == "not finite"


# --- quorum ---------------------------------------------------------------------------------------


def test_fewer_replies_than_the_quorum_end_the_run_naming_the_first_failure(trouble, tmp_path):
    trouble.plan("raise")
    world = small_world(tmp_path, trouble=trouble, sets=("engine.quorum=0.96",))
    (tmp_path / "out").mkdir()
    words = r"round 1: 23 of 24 clients .* quorum = 0.96; .* client 17, round 1: raised"
    with pytest.raises(RunError, match=words):
        finish(world, tmp_path / "out", _inline(world))


def test_a_quorum_is_a_share_of_those_who_did_not_drop_out():
    gone = [Failure(c, 1, "absent", "-") for c in range(5)]
    failed = Failure(7, 1, "raised", "no")
    Policy(quorum=0.8).judge(1, 10, [*gone, failed])  # 4 of 5
    with pytest.raises(RunError, match=r"4 of 5 clients .* quorum = 0.81"):
        Policy(quorum=0.81).judge(1, 10, [*gone, failed])
    Policy(quorum=1.0).judge(1, 10, gone)
    twice = Failure(8, 1, "twice", "-")  # the first reply counts
    Policy(quorum=1.0).judge(1, 10, [*gone, twice])


def test_a_quorum_is_judged_after_retries(trouble, tmp_path):
    trouble.plan("raise", times=2)
    sets = (*RETRY, "engine.quorum=1.0", "rounds=1")
    world = small_world(tmp_path, trouble=trouble, sets=sets)
    (tmp_path / "out").mkdir()
    assert finish(world, tmp_path / "out", _inline(world)).failed == [{}]


def test_the_policy_s_new_keys_leave_the_hash_of_older_scenarios_alone(tmp_path):
    scenario = small_world(tmp_path).scenario
    assert scenario.with_overrides(["engine.retries=2"]).sha256 == scenario.sha256
    retry = scenario.with_overrides(["engine.on_failure=retry"])
    for changed in (retry, scenario.with_overrides(["engine.quorum=0.5"])):
        assert changed.sha256 != scenario.sha256
    assert retry.with_overrides(["engine.retries=3"]).sha256 != retry.sha256
