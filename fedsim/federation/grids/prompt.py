"""Flower's Grid over a SuperLink, which looks for replies every three seconds, asked more often."""

import time
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.federation.grids.wrapper import GridWrapper

# A reply is found after at most so long, or after this share of the time that the others took.
_SOON_S, _SHARE, _SELDOM_S = 0.2, 0.05, 3.0


class PromptGrid(GridWrapper):
    """Finds replies soon after they came, and asks a SuperLink no more than it must.

    Args:
        inner: Flower's Grid. Whether it is awaited like this is for `prompt` to say.
    """

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send instructions and return the replies that came within `timeout` seconds."""
        waiting = set(self.inner.push_messages(messages))
        begun, found = time.monotonic(), list[Message]()
        while waiting:
            replies = list(self.inner.pull_messages(waiting))
            found.extend(replies)
            waiting.difference_update(each.metadata.reply_to_message_id for each in replies)
            taken = time.monotonic() - begun
            if not waiting or (timeout is not None and taken >= timeout):
                break
            pause = min(max(_SOON_S, _SHARE * taken), _SELDOM_S)
            time.sleep(pause if timeout is None else min(pause, timeout - taken))
        return found


def prompt(grid: Grid) -> Grid:
    """Return a Grid of Flower's own with replies found sooner, and any other one as it is."""
    return PromptGrid(grid) if type(grid).__module__.partition(".")[0] == "flwr" else grid
