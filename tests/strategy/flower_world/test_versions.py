"""Nodes and a server with Flower of two versions."""

import json
from importlib.metadata import version

import pytest
from flwr.clientapp import ClientApp

from fedsim.basics.errors import RunError
from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.nodes import PartitionGrid
from fedsim.runs.world import build
from tests.strategy.flower_world.worlds import scenario

MAJOR, MINOR = version("flwr").split(".")[:2]


class OtherFlower(ClientApp):
    """Stands for nodes of which one has another Flower installed, or tells nothing of it."""

    def __init__(self, app, told):
        super().__init__()
        self.app, self.told = app, told

    def __call__(self, message, context):
        reply = self.app(message, context)
        if context.node_config["partition-id"] == 1:
            record = reply.content.config_records["partition"]
            software = json.loads(record["software"])
            assert software.pop("flwr") == version("flwr")
            told = {} if self.told is None else {"flwr": self.told}
            record["software"] = json.dumps(software | told)
        return reply


def nodes(told):
    world = build(scenario({"name": "fedavg"}))
    return PartitionGrid(InlineGrid(OtherFlower(world.app, told), 8), 8).nodes


@pytest.mark.parametrize("theirs", [f"{MAJOR}.{int(MINOR) + 1}.0", f"{int(MAJOR) + 1}.{MINOR}.0"])
def test_a_node_with_flower_of_another_minor_version_is_refused_by_its_partition(theirs):
    ours = version("flwr")
    with pytest.raises(
        RunError, match=rf"partition 1 runs flwr {theirs} and the server flwr {ours}; start all"
    ):
        nodes(theirs)


@pytest.mark.parametrize("theirs", [f"{MAJOR}.{MINOR}.99", None])
def test_a_node_of_the_same_minor_version_or_that_tells_none_is_let_pass(theirs):
    assert len(nodes(theirs)) == 8
