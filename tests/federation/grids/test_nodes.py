"""Nodes that die, come back, are late or have no data: each is called what it is."""

import logging
from dataclasses import replace

import pytest

from fedsim.basics.errors import RunError
from fedsim.federation.grids.nodes import PartitionGrid
from fedsim.runs.policy import Policy
from tests.federation.grids.fleet import Fleet
from tests.laws import federations as fed

CLIENTS = 4


def fleet_of_four(**options):
    app = fed.make_app("logistic", fed.make_procedure(), fed.InMemoryData(fed.SIZES[:CLIENTS]))
    return Fleet(app, CLIENTS, **options)


def round_of(nodes, *, absent=()):
    """One round of training; returns the replies."""
    strategy = fed.make_strategy("fedavg")
    sent = fed.configure(strategy, nodes, fed.initial_arrays())
    gone = [client in absent for client in sent.client_ids.tolist()]
    return nodes.send_and_receive(replace(sent, absent=sent.is_absent | gone), timeout=3.0)


def causes(replies):
    return {f.client_id: f.cause for f in replies.failures}


def test_nodes_that_answer_are_the_clients_of_their_partitions():
    nodes = PartitionGrid(fleet_of_four(), CLIENTS)
    replies = round_of(nodes)
    assert replies.client_ids.tolist() == [0, 1, 2, 3]
    assert not replies.failures


@pytest.mark.parametrize(
    ("code", "cause"), [(5, "died"), (8, "died"), (3, "late"), (4, "late"), (2, "raised")]
)
def test_what_flower_says_in_a_nodes_name_is_that_clients_failure(code, cause):
    fleet = fleet_of_four()
    fleet.says[fleet.nodes[2]] = code
    replies = round_of(PartitionGrid(fleet, CLIENTS))
    assert causes(replies) == {2: cause}
    assert replies.failures[0].reason == "Flower says so"
    assert replies.client_ids.tolist() == [0, 1, 3]


def test_who_is_not_heard_of_is_late_and_absent_is_who_dropped_out_by_the_scenario():
    fleet = fleet_of_four()
    nodes = PartitionGrid(fleet, CLIENTS)
    round_of(nodes)
    fleet.silent.add(fleet.nodes[1])
    replies = round_of(nodes, absent=(3,))
    assert causes(replies) == {1: "late", 3: "absent"}
    reasons = {f.client_id: f.reason for f in replies.failures}
    assert reasons[1] == "no reply arrived within 3 s"


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Policy("stop"), "client 1, round 1: died"),
        (Policy(min_replies=4), "3 of 4 clients replied"),
        (Policy(quorum=1.0), "3 of 4 clients replied that did not drop out"),
    ],
)
def test_the_policy_of_a_round_applies_to_a_dead_node(policy, why):
    fleet = fleet_of_four()
    fleet.says[fleet.nodes[1]] = 5
    replies = round_of(PartitionGrid(fleet, CLIENTS))
    with pytest.raises(RunError, match=why):
        policy.judge(1, CLIENTS, replies.failures)


@pytest.mark.parametrize("listed", [True, False])
def test_a_node_that_was_started_again_takes_its_partition_once_the_old_one_is_gone(listed, caplog):
    fleet = fleet_of_four(listed=listed)
    nodes = PartitionGrid(fleet, CLIENTS)
    round_of(nodes)
    old = fleet.nodes[2]
    fleet.restart(2)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        first = round_of(nodes)
        assert causes(first) == ({2: "died"} if listed else {})  # while Flower lists the old one
        fleet.listed = False
        for _ in range(2):
            assert causes(round_of(nodes)) == {}
    moved = [r.getMessage() for r in caplog.records if "is now held by" in r.getMessage()]
    assert len(moved) == 1
    assert f"partition 2 is now held by node {fleet.nodes[2]}: node {old} is gone" in moved[0]
    # each node is asked for its partition once
    queried = [node for node, kind in fleet.asked if kind == "query"]
    assert len(queried) == len(set(queried)) == CLIENTS + 1


def test_a_node_that_joins_beside_a_living_one_changes_nothing():
    fleet = fleet_of_four()
    nodes = PartitionGrid(fleet, CLIENTS)
    round_of(nodes)
    before = nodes.nodes.tolist()
    fleet.twins[4711] = 2
    assert causes(round_of(nodes)) == {}
    assert nodes.nodes.tolist() == before


@pytest.mark.parametrize("how", ["raises", "silent", "other Flower"])
def test_a_node_that_joins_and_cannot_take_part_is_asked_once_and_stops_nobody(how, caplog):
    fleet = fleet_of_four()
    nodes = PartitionGrid(fleet, CLIENTS)
    round_of(nodes)
    fleet.twins[4711] = 2
    if how == "raises":
        fleet.broken[4711] = "no data here"
    elif how == "silent":
        fleet.silent.add(4711)
    else:
        fleet.other_flower.add(4711)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        for _ in range(3):
            assert causes(round_of(nodes)) == {}
    assert [node for node, kind in fleet.asked if kind == "query"].count(4711) == 1
    said = [r.getMessage() for r in caplog.records if "takes no part" in r.getMessage()]
    assert len(said) == 1
    assert how != "silent" or "node 4711: no answer within 60 s" in said[0]


def test_why_a_node_holds_no_partition_reaches_the_user():
    fleet = fleet_of_four()
    fleet.broken[fleet.nodes[1]] = "cannot read data/patients.csv"
    with pytest.raises(RunError, match=r"no node holds partition 1 .* cannot read data/patients"):
        round_of(PartitionGrid(fleet, CLIENTS))


def test_a_node_whose_partition_is_none_is_named_and_takes_no_part(caplog):
    fleet = fleet_of_four()
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        assert len(PartitionGrid(fleet, 3).nodes) == 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"node {fleet.nodes[3]}: holds partition 3 of 3; it takes no part"


# --- which partition a node holds is the server's to say, where its file says it ------------------


def bound(fleet):
    return [(node, partition) for partition, node in fleet.nodes.items()]


def test_a_node_that_is_not_among_those_bound_is_neither_asked_nor_waited_for():
    fleet = fleet_of_four()
    known = bound(fleet)
    fleet.twins[2**61] = 1  # another that says it holds partition 1
    nodes = PartitionGrid(fleet, CLIENTS, bound=known)
    assert nodes.nodes.tolist() == list(fleet.nodes.values())
    assert 2**61 not in {node for node, _ in fleet.asked}
    assert not round_of(nodes).failures
    with pytest.raises(RunError, match="both hold partition 1"):  # the control
        len(PartitionGrid(fleet, CLIENTS).nodes)


def test_a_node_that_says_another_partition_than_its_own_is_named():
    fleet = fleet_of_four()
    known = dict(bound(fleet))
    first, second = fleet.nodes[0], fleet.nodes[1]
    known[first], known[second] = 1, 0
    with pytest.raises(RunError, match=rf"node {first}: says partition 0, and holds 1"):
        len(PartitionGrid(fleet, CLIENTS, bound=known.items(), timeout_s=1.0).nodes)


def test_a_partition_that_is_bound_is_not_taken_over_by_another_node():
    fleet = fleet_of_four()
    nodes = PartitionGrid(fleet, CLIENTS, bound=bound(fleet))
    round_of(nodes)
    fleet.listed = False
    gone = fleet.nodes[3]
    fleet.restart(3)  # a new node to Flower, which is not bound
    fleet.silent.add(gone)
    assert causes(round_of(nodes)).keys() == {3}
    assert nodes.nodes.tolist()[3] == gone


def test_those_bound_are_waited_for_by_name():
    fleet = fleet_of_four()
    known = bound(fleet)
    late = fleet.nodes.pop(2)
    fleet.twins[2**61] = 2
    with pytest.raises(RunError, match=r"3 of 4 nodes joined within 0\.2 s"):
        len(PartitionGrid(fleet, CLIENTS, bound=known, timeout_s=0.2).nodes)
    assert late not in fleet.get_node_ids()


def test_a_node_that_is_bound_to_a_partition_beyond_the_scenario_s_is_not_asked():
    fleet = fleet_of_four()
    nodes = PartitionGrid(fleet, CLIENTS - 1, bound=bound(fleet))
    assert nodes.nodes.tolist() == [fleet.nodes[client] for client in range(CLIENTS - 1)]
    assert fleet.nodes[CLIENTS - 1] not in {node for node, _ in fleet.asked}


def fleet_without(partition):
    """Three of four nodes; returns them and how the fourth joins."""
    fleet = fleet_of_four()
    late = fleet.nodes.pop(partition)

    def joins():
        fleet.nodes[partition] = late

    return fleet, joins


def test_a_run_begins_without_a_site_that_it_can_do_without_and_takes_it_when_it_joins(caplog):
    fleet, joins = fleet_without(2)
    nodes = PartitionGrid(fleet, CLIENTS, least=3, timeout_s=0.3, poll_s=0.05)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        replies = round_of(nodes)
        assert causes(replies) == {2: "died"}
        assert replies.failures[0].reason == "no node holds partition 2"
        assert replies.client_ids.tolist() == [0, 1, 3]
        assert causes(round_of(nodes, absent=(2,))) == {2: "absent"}
        joins()
        for _ in range(2):
            replies = round_of(nodes)
            assert replies.client_ids.tolist() == [0, 1, 2, 3]
    said = [record.getMessage() for record in caplog.records]
    assert "no node holds partition 2; the run begins without" in said[0]
    assert f"partition 2 is now held by node {fleet.nodes[2]}: it has joined" in said[1]
    assert len(said) == 2


def test_fewer_sites_than_it_needs_are_named():
    fleet, _ = fleet_without(2)
    with pytest.raises(RunError, match="3 of 4 nodes joined within"):
        round_of(PartitionGrid(fleet, CLIENTS, least=4, timeout_s=0.3, poll_s=0.05))
    # three nodes are there, of which one holds none
    fleet.broken[fleet.nodes[0]] = "no data here"
    with pytest.raises(RunError, match=r"no node holds partition 0 \(2 of 4 are missing\)"):
        round_of(PartitionGrid(fleet, CLIENTS, least=3, timeout_s=0.3, poll_s=0.05))


def test_all_that_are_there_in_time_take_part_whatever_the_least_is():
    nodes = PartitionGrid(fleet_of_four(), CLIENTS, least=1, timeout_s=5.0)
    assert causes(round_of(nodes)) == {}


def test_the_policy_of_a_round_applies_to_a_site_that_is_not_there():
    fleet, _ = fleet_without(1)
    nodes = PartitionGrid(fleet, CLIENTS, least=2, timeout_s=0.3, poll_s=0.05)
    replies = round_of(nodes)
    with pytest.raises(RunError, match="client 1, round 1: died: no node holds partition 1"):
        Policy(required=frozenset({1})).judge(1, CLIENTS, replies.failures)


def test_a_node_that_does_not_answer_is_named_and_not_its_configuration():
    fleet = fleet_of_four()
    fleet.silent.add(fleet.nodes[3])
    with pytest.raises(RunError, match=r"no node holds partition 3 .*no answer within 0\.2 s") as e:
        round_of(PartitionGrid(fleet, CLIENTS, timeout_s=0.2))
    assert "--node-config" not in str(e.value)
