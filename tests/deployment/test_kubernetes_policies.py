"""Who reaches whom by the NetworkPolicies of deploy/kubernetes, as they are written."""

import itertools

import pytest

from tests.deployment.kubernetes_files import DNS, SERVER, federation

PORTS = (53, 8000, 9094, 9095)
NEEDED = {
    ("supernode-1", "superlink", 8000),
    ("supernode-2", "superlink", 8000),
    ("superexec-server", "superlink", 8000),
    ("superexec-client-1", "supernode-1", 9094),
    ("superexec-client-2", "supernode-2", 9094),
}
ASKING = {
    "supernode-1",
    "supernode-2",
    "superexec-server",
    "superexec-client-1",
    "superexec-client-2",
}


def reached(world):
    """Who reaches whom at which port, where one of the two belongs to the federation."""
    return {
        (sender.name, receiver.name, port)
        for sender, receiver in itertools.permutations(world.pods, 2)
        for port in PORTS
        if {sender.namespace, receiver.namespace} & world.policies.keys()
        and world.may(sender, receiver, port)
    }


def test_nobody_reaches_more_than_it_needs():
    assert reached(federation()) == NEEDED | {(name, DNS, 53) for name in ASKING}


def without(world, namespace, name):
    kept = [each for each in world.policies[namespace] if each["metadata"]["name"] != name]
    assert len(kept) == len(world.policies[namespace]) - 1
    return world._replace(policies={**world.policies, namespace: kept})


@pytest.mark.parametrize(
    ("namespace", "opened"),
    [
        ("fedsim-site-1", ("stranger", "superexec-client-1", 9095)),
        (SERVER, ("superlink", "stranger", 8000)),
    ],
)
def test_without_its_default_a_namespace_is_seen_to_be_open(namespace, opened):
    world = federation()
    assert opened not in reached(world)
    assert opened in reached(without(world, namespace, "default-deny"))


@pytest.mark.parametrize(
    ("namespace", "name", "closed"),
    [
        ("fedsim-site-1", "superexec-client", ("superexec-client-1", "supernode-1", 9094)),
        ("fedsim-site-2", "supernode", ("supernode-2", "superlink", 8000)),
        (SERVER, "superlink", ("supernode-1", "superlink", 8000)),
        (SERVER, "superexec-server-dns", ("superexec-server", DNS, 53)),
    ],
)
def test_without_a_policy_its_link_is_seen_to_be_closed(namespace, name, closed):
    world = federation()
    assert closed in reached(world) - reached(without(world, namespace, name))


def test_every_selector_selects_somebody():
    world = federation()
    for namespace, policies in world.policies.items():
        for policy in policies:
            name = policy["metadata"]["name"]
            assert world.selected(policy, namespace), name
            for rule in [*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())]:
                for peer in rule.get("from", rule.get("to")):
                    assert list(world.peers(peer, namespace)), name
