"""SuperNodes as Flower's SuperLink shows them, in one process."""

import itertools
import json

from flwr.app import Error, RecordDict

from fedsim.engine.inline import InlineGrid
from fedsim.federation.grids.wrapper import GridWrapper
from fedsim.messages import flower_internals as internals

FLOWER_ITSELF = 1


class Plainly:
    """A ClientApp that answers one message at a time, as on a node."""

    def __init__(self, app):
        self.app = app

    def __call__(self, message, context):
        return self.app(message, context)


class Fleet(GridWrapper):
    """Such nodes, each of which holds the partition of its place.

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

    def __init__(self, app, num_clients, run_config=None, **options):
        super().__init__(InlineGrid(Plainly(app), num_clients, run_config=run_config))
        self.nodes = {partition: 2**63 + 1000 + partition for partition in range(num_clients)}
        self.dead, self.silent, self.says, self.broken = set(), set(), {}, {}
        self.listed, self.asked, self.twins, self.other_flower = True, [], {}, set()
        self._numbers = itertools.count()
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
                told = reply.content.config_records["partition"]
                told["software"] = json.dumps(json.loads(told["software"]) | {"flwr": "0.1.0"})
            found.append(reply)
        return found

    def _error(self, message, code, source, reason):
        metadata = internals.reply_metadata(message.metadata, message_id="x", created_at=1.0)
        error = internals.message_with(metadata, error=Error(code, reason))
        internals.set_source(error, source)
        return error
