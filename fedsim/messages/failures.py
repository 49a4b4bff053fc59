"""Who gave no admissible reply, and why."""

from typing import NamedTuple

CAUSES = (
    "raised", "died", "hung", "late", "absent",
    "names", "shape", "dtype", "not finite", "num-examples", "metrics", "twice", "stranger",
    "update norm", "buffers",
)  # fmt: skip


class Failure(NamedTuple):
    """A client that gave no admissible reply.

    Attributes:
        client_id: Who.
        server_round: When.
        cause: One of `CAUSES`: what became of the client, or why its reply was refused.
        reason: What happened, in words, with the remedy when there is one.
    """

    client_id: int
    server_round: int
    cause: str
    reason: str

    def __str__(self) -> str:
        return f"client {self.client_id}, round {self.server_round}: {self.cause}: {self.reason}"


# Flower's codes of the errors that clients are told of by
ERROR_CODES = {"raised": 2, "died": 8, "hung": 8, "error": 0}
# a code of our own: a node's client was interrupted, for it took too long
HUNG_ON_A_NODE = 1008
# and back: messages that expired or never came whole, a node that is gone, an app that crashed; all
# others are of code that raised
CAUSE_OF_CODE = {3: "late", 4: "late", 5: "died", 8: "died", HUNG_ON_A_NODE: "hung"}
