"""Nodes that die, come back, are late or have no data: each is called what it is."""

import itertools
import logging
from dataclasses import replace

import pytest
from flwr.app import Error, RecordDict

from fedsim.basics.errors import RunError
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.nodes import PartitionGrid
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages import flower_internals as internals
from fedsim.runs.policy import Policy
from tests.laws import federations as fed

CLIENTS, FLOWER_ITSELF = 4, 1


class Plainly:
    """A ClientApp that answers one message at a time, as on a node."""

    def __init__(self, app):
        self.app = app

    def __call__(self, message, context):
        return self.app(message, context)


class Fleet(GridWrapper):
    """SuperNodes as Flower's SuperLink shows them.

    Nodes have numbers of Flower's making, instructions get theirs when they are sent, and errors
    about nodes come from Flower's own node.

    Attributes:
        nodes: Flower's number of each node, by partition.
        dead: Nodes that are gone, though Flower may still list them.
        silent: Nodes of which nothing is heard.
        says: What Flower says in the name of a node instead of its reply: an error's code.
        broken: What a node answers to a query: an error's reason.
        listed: Whether dead nodes are still among those that Flower lists.
        twins: Partitions of nodes that joined beside those.
        other_flower: Nodes with another Flower.
    """

    def __init__(self, **options):
        app = fed.make_app("logistic", fed.make_procedure(), fed.InMemoryData(fed.SIZES[:CLIENTS]))
        super().__init__(InlineGrid(Plainly(app), CLIENTS))
        self.nodes = {partition: 2**63 + 1000 + partition for partition in range(CLIENTS)}
        self.dead, self.silent, self.says, self.broken = set(), set(), {}, {}
        self.listed, self.asked, self.twins, self.other_flower = True, [], {}, set()
        self._numbers = itertools.count()
        self.layout_of_app = app.layout
        for name, value in options.items():
            setattr(self, name, value)

    def restart(self, partition):
        """Start the node of a partition again: a new one to Flower."""
        self.dead.add(self.nodes[partition])
        self.nodes[partition] = 2**62 + 77 + partition

    def get_node_ids(self):
        gone = self.dead if self.listed else set()
        return [*self.nodes.values(), *self.twins, *gone]

    def send_and_receive(self, messages, *, timeout=None):
        found = []
        for message in messages:
            number = f"flower-{next(self._numbers)}"
            internals.set_message_id(message, number)
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            self.asked.append((node, kind))
            if node in self.silent:
                continue
            code = 5 if node in self.dead else self.says.get(node)
            if code is not None and kind != "query":
                found.append(self._error(message, code, FLOWER_ITSELF, "Flower says so"))
                continue
            if node in self.broken and kind == "query":
                found.append(self._error(message, 2, node, self.broken[node]))
                continue
            if node in self.dead:
                continue
            of = {each: p for p, each in self.nodes.items()} | self.twins
            partition = of[node]
            metadata = internals.instruction_metadata(
                run_id=1, message_id=number, node_id=internals.node_of(partition),
                message_type=kind, group_id="", ttl=100.0, created_at=1.0,
            )  # fmt: skip
            content = message.content if message.has_content() else RecordDict()
            (reply,) = self.inner.send_and_receive(
                [internals.message_with(metadata, content=content)]
            )
            internals.set_source(reply, node)
            if node in self.other_flower:
                reply.content.config_records["partition"]["flwr"] = "0.1.0"
            found.append(reply)
        return found

    def _error(self, message, code, source, reason):
        metadata = internals.reply_metadata(message.metadata, message_id="x", created_at=1.0)
        error = internals.message_with(metadata, error=Error(code, reason))
        internals.set_source(error, source)
        return error


def round_of(nodes, *, absent=()):
    """One round of training; returns the replies."""
    strategy = fed.make_strategy("fedavg")
    sent = fed.configure(strategy, nodes, fed.initial_arrays())
    gone = [client in absent for client in sent.client_ids.tolist()]
    return nodes.send_and_receive(replace(sent, absent=sent.is_absent | gone), timeout=3.0)


def causes(replies):
    return {f.client_id: f.cause for f in replies.failures}


def test_nodes_that_answer_are_the_clients_of_their_partitions():
    nodes = PartitionGrid(Fleet(), CLIENTS)
    replies = round_of(nodes)
    assert replies.client_ids.tolist() == [0, 1, 2, 3]
    assert not replies.failures


@pytest.mark.parametrize(
    ("code", "cause"), [(5, "died"), (8, "died"), (3, "late"), (4, "late"), (2, "raised")]
)
def test_what_flower_says_in_a_nodes_name_is_that_clients_failure(code, cause):
    fleet = Fleet()
    fleet.says[fleet.nodes[2]] = code
    replies = round_of(PartitionGrid(fleet, CLIENTS))
    assert causes(replies) == {2: cause}
    assert replies.failures[0].reason == "Flower says so"
    assert replies.client_ids.tolist() == [0, 1, 3]


def test_who_is_not_heard_of_is_late_and_absent_is_who_dropped_out_by_the_scenario():
    fleet = Fleet()
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
    fleet = Fleet()
    fleet.says[fleet.nodes[1]] = 5
    replies = round_of(PartitionGrid(fleet, CLIENTS))
    with pytest.raises(RunError, match=why):
        policy.judge(1, CLIENTS, replies.failures)


@pytest.mark.parametrize("listed", [True, False])
def test_a_node_that_was_started_again_takes_its_partition_once_the_old_one_is_gone(listed, caplog):
    fleet = Fleet(listed=listed)
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
    fleet = Fleet()
    nodes = PartitionGrid(fleet, CLIENTS)
    round_of(nodes)
    before = nodes.nodes.tolist()
    fleet.twins[4711] = 2
    assert causes(round_of(nodes)) == {}
    assert nodes.nodes.tolist() == before


@pytest.mark.parametrize("how", ["raises", "silent", "other Flower"])
def test_a_node_that_joins_and_cannot_take_part_is_asked_once_and_stops_nobody(how, caplog):
    fleet = Fleet()
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
    assert len(said) == (0 if how == "silent" else 1)


def test_why_a_node_holds_no_partition_reaches_the_user():
    fleet = Fleet()
    fleet.broken[fleet.nodes[1]] = "cannot read data/patients.csv"
    with pytest.raises(RunError, match=r"no node holds partition 1 .* cannot read data/patients"):
        round_of(PartitionGrid(fleet, CLIENTS))


def test_a_node_whose_partition_is_none_is_named_and_takes_no_part(caplog):
    fleet = Fleet()
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        assert len(PartitionGrid(fleet, 3).nodes) == 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"node {fleet.nodes[3]}: holds partition 3 of 3; it takes no part"
