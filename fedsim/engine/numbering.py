"""Numbers of nodes and of messages."""

from flwr.app import Message

from fedsim.messages import flower_internals as internals


class Numbering:
    """Knows which nodes there are, and gives every message an id.

    Args:
        num_clients: N; client c is node c + 2.
    """

    def __init__(self, num_clients: int) -> None:
        self._num_clients = num_clients
        self._given = 0
        self._others: set[str] = set()  # ids that messages came with

    def nodes(self) -> range:
        """Return all node ids."""
        return range(internals.FIRST_NODE_ID, internals.FIRST_NODE_ID + self._num_clients)

    def check(self, message: Message) -> None:
        """Refuse a message to a node that is not there.

        Raises:
            ValueError: With the nodes that there are.
        """
        node, nodes = message.metadata.dst_node_id, self.nodes()
        if not nodes.start <= node < nodes.stop:
            raise ValueError(
                f"a message is addressed to node {node}; the nodes are "
                f"{nodes.start}..{nodes.stop - 1}"
            )

    def fresh(self) -> str:
        """Return an id that no message has."""
        self._given += 1
        return f"{self._given:064x}"

    def number(self, message: Message) -> str:
        """Return a message's id; one that has none is given one."""
        if not message.metadata.message_id:
            internals.set_message_id(message, self.fresh())
        elif not self.knows(message.metadata.message_id):
            self._others.add(message.metadata.message_id)
        return message.metadata.message_id

    def knows(self, message_id: str) -> bool:
        """Return whether some message has or had that id."""
        return message_id in self._others or 0 < _number_in(message_id) <= self._given


def _number_in(message_id: str) -> int:
    """The number that was made an id; 0 of any other id."""
    try:
        number = int(message_id, 16)
    except (TypeError, ValueError):
        return 0
    return number if f"{number:064x}" == message_id else 0
