"""Ordinary Flower ClientApps on both engines: memories, order, copies, failures, push and pull."""

import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedsim.engine.inline import InlineGrid
from fedsim.messages import flower_internals as internals
from tests.faults.plain_app import app

CLIENTS = 12


@pytest.fixture(scope="module")
def ray_grid(lender):
    with lender.grid(app, CLIENTS, workers=2) as grid:
        yield grid


@pytest.fixture(params=["inline", "ray"])
def grid(request):
    if request.param == "inline":
        yield InlineGrid(app, CLIENTS)
        return
    shared = request.getfixturevalue("ray_grid")
    shared._plain.contexts.clear()  # one engine serves many tests
    shared.incidents.clear()
    yield shared


def ask(clients, kind="train", content=None, **config):
    """Instructions that share one content object, as Flower's strategies send them."""
    internals.ensure_identity()
    content = content or RecordDict({"config": ConfigRecord(config)})
    return [Message(content, client + 2, kind, group_id="7") for client in clients]


def counts(replies):
    """How many messages each client has answered, as it remembers."""
    return {
        int(reply.content["metrics"]["client"]): int(reply.content["metrics"]["messages"])
        for reply in replies
    }


def test_a_client_s_memory_lives_from_call_to_call(grid):
    assert counts(grid.send_and_receive(ask([0, 1, 2]))) == {0: 1, 1: 1, 2: 1}
    assert counts(grid.send_and_receive(ask([2, 5]))) == {2: 2, 5: 1}
    assert counts(grid.send_and_receive(ask([0, 2, 5]))) == {0: 2, 2: 3, 5: 2}


def test_train_evaluate_and_query_share_a_client_s_memory(grid):
    for number, kind in enumerate(("train", "evaluate", "query"), start=1):
        replies = list(grid.send_and_receive(ask([3], kind)))
        assert counts(replies) == {3: number}
        assert replies[0].metadata.message_type == kind


def test_a_client_may_forget(grid):
    grid.send_and_receive(ask([4]))
    grid.send_and_receive(ask([4], forgets=4))
    assert counts(grid.send_and_receive(ask([4]))) == {4: 1}


def test_a_client_knows_who_it_is_among_how_many(grid):
    (reply,) = grid.send_and_receive(ask([11]))
    assert reply.content["metrics"]["client"] == 11
    assert reply.content["metrics"]["clients"] == CLIENTS


def test_replies_come_in_client_order_and_name_their_instructions(grid):
    sent = ask([7, 1, 10, 4])
    replies = list(grid.send_and_receive(sent))
    assert [reply.metadata.src_node_id - 2 for reply in replies] == [1, 4, 7, 10]
    by_node = {message.metadata.dst_node_id: message.metadata for message in sent}
    for reply in replies:
        instruction = by_node[reply.metadata.src_node_id]
        assert reply.metadata.reply_to_message_id == instruction.message_id != ""
        assert reply.metadata.dst_node_id == instruction.src_node_id
        assert reply.metadata.group_id == "7"
    assert len({reply.metadata.message_id for reply in replies}) == 4


def test_a_client_with_two_messages_in_one_call_answers_both_in_turn(grid):
    replies = list(grid.send_and_receive(ask([6, 2, 6])))
    answered = [
        (reply.content["metrics"]["client"], reply.content["metrics"]["messages"])
        for reply in replies
    ]
    assert answered == [(2, 1), (6, 1), (6, 2)]


def test_a_client_that_alters_what_it_received_alters_its_own_copy(grid):
    shared = RecordDict(
        {"arrays": ArrayRecord([np.arange(3.0)]), "config": ConfigRecord({"rate": 0.5})}
    )
    replies = list(grid.send_and_receive(ask(range(5), content=shared)))
    for client, reply in enumerate(replies):
        np.testing.assert_array_equal(
            reply.content["arrays"].to_numpy_ndarrays()[0], np.arange(3.0) + client
        )
    assert list(shared) == ["arrays", "config"]
    np.testing.assert_array_equal(shared["arrays"].to_numpy_ndarrays()[0], np.arange(3.0))


def test_a_client_that_raises_is_named_and_its_memory_is_what_it_was(grid):
    grid.send_and_receive(ask([0, 1, 2]))
    replies = list(grid.send_and_receive(ask([0, 1, 2], raises=1)))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    error = replies[1].error
    assert error.code == 2
    assert "client 1: ValueError: the battery is empty" in error.reason
    assert any("client 1: ValueError: the battery is empty" in line for line in grid.incidents)
    assert counts(grid.send_and_receive(ask([0, 1, 2]))) == {0: 3, 1: 2, 2: 3}


def test_a_node_that_does_not_exist_is_refused_naming_those_that_do(grid):
    for client in (-1, CLIENTS):
        with pytest.raises(ValueError, match=rf"node {client + 2}; the nodes are 2\.\.13"):
            grid.send_and_receive(ask([0, client]))


def test_a_push_returns_at_once_and_a_pull_gives_each_reply_once(grid):
    begun = time.monotonic()
    first = list(grid.push_messages(ask([0, 3], sleeps=3, seconds=1.0)))
    second = list(grid.push_messages(ask([1])))
    assert time.monotonic() - begun < 0.5
    assert len({*first, *second}) == 3
    pulled = list(grid.pull_messages(second))
    assert [reply.metadata.reply_to_message_id for reply in pulled] == second
    assert counts(grid.pull_messages(first)) == {0: 1, 3: 1}
    assert list(grid.pull_messages([*first, *second])) == []
    assert counts(grid.send_and_receive(ask([0, 1, 3]))) == {0: 2, 1: 2, 3: 2}


def test_some_replies_of_a_push_may_be_pulled_before_the_others(grid):
    ids = list(grid.push_messages(ask([0, 1, 2])))
    assert counts(grid.pull_messages(ids[2:])) == {2: 1}
    assert counts(grid.pull_messages(ids)) == {0: 1, 1: 1}


def test_an_unknown_message_id_pulls_nothing(grid):
    assert list(grid.pull_messages(["no such message"])) == []


def test_an_engine_offers_every_node_without_listing_them():
    nodes = InlineGrid(app, 10**9).get_node_ids()
    assert len(nodes) == 10**9
    assert nodes[0] == 2


# What Ray alone outlives.


@pytest.fixture
def fresh_ray_grid(ray_grid):
    ray_grid._plain.contexts.clear()
    ray_grid.incidents.clear()
    assert len(ray_grid.worker_pids) == 2  # both have started
    yield ray_grid
    ray_grid.client_timeout_s = None


def test_a_client_that_ends_its_process_is_named_and_the_others_answer(fresh_ray_grid):
    grid = fresh_ray_grid
    grid.send_and_receive(ask(range(4)))
    replies = list(grid.send_and_receive(ask(range(4), exits=2)))
    assert [reply.has_error() for reply in replies] == [False, False, True, False]
    assert replies[2].error.code == 8
    assert "client 2: " in replies[2].error.reason
    assert "ended unexpectedly" in replies[2].error.reason
    assert counts(grid.send_and_receive(ask(range(4)))) == {0: 3, 1: 3, 2: 2, 3: 3}


def test_a_client_that_hangs_is_named_and_the_others_answer(fresh_ray_grid):
    grid = fresh_ray_grid
    grid.client_timeout_s = 1.0
    replies = list(grid.send_and_receive(ask(range(4), sleeps=1, seconds=3600)))
    assert [reply.has_error() for reply in replies] == [False, True, False, False]
    assert "client 1: no answer within 1 s" in replies[1].error.reason
    assert counts(grid.send_and_receive(ask(range(4)))) == {0: 2, 1: 1, 2: 2, 3: 2}


def test_a_call_that_timed_out_gives_what_is_there_and_forgets_the_rest(fresh_ray_grid):
    grid = fresh_ray_grid
    grid.send_and_receive(ask(range(4)))
    begun = time.monotonic()
    replies = grid.send_and_receive(ask(range(4), sleeps=0, seconds=3600), timeout=1.5)
    assert 1.4 < time.monotonic() - begun < 4
    assert counts(replies) == {1: 2, 2: 2, 3: 2}
    assert any("client 0: unfinished" in line for line in grid.incidents)
    assert counts(grid.send_and_receive(ask(range(4)))) == {0: 2, 1: 3, 2: 3, 3: 3}
