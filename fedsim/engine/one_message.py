"""Clients of any Flower ClientApp: one message at a time, answered as on nodes of their own."""

import time
from collections.abc import Sequence

from flwr.app import Error, Message

from fedsim.engine.journal import Journal
from fedsim.engine.numbering import Numbering
from fedsim.engine.plain_replies import ReplyWatch
from fedsim.engine.work import MessageWork, Perform, WorkOutcome, packed
from fedsim.messages import flower_internals as internals
from fedsim.messages.layout import Payload


class PlainClients:
    """Lets a ClientApp answer message by message, and keeps each client's context in between.

    Args:
        numbering: Gives messages and replies their ids.
        journal: Is told of what went wrong.

    Attributes:
        contexts: The packed state of each client's context that has any.
    """

    def __init__(self, numbering: Numbering, journal: Journal) -> None:
        self.contexts: dict[int, bytes] = {}
        self._numbering, self._journal = numbering, journal

    def answer(
        self,
        batch: Sequence[Message],
        perform: Perform,
        *,
        deadline: float | None,
        client_timeout_s: float | None,
        watch: ReplyWatch | None,
    ) -> list[Message]:
        """Return the replies, in client order; a client answers one message at a time.

        Args:
            batch: Instructions, several to one client allowed.
            perform: Does the works.
            deadline: `time.monotonic()` after which nothing is waited for.
            client_timeout_s: Seconds one client may take; None waits for ever.
            watch: Looks at every reply.
        """
        contents: dict[int, bytes] = {}
        replies: list[tuple[int, int, Message]] = []
        waves = _waves(batch)
        order = {id(message): place for place, message in enumerate(batch)}
        for wave in waves:
            works = [
                self._work(index, message, contents, client_timeout_s)
                for index, message in enumerate(wave)
            ]
            for work, outcome in perform(works, Payload(), None, deadline):
                assert isinstance(work, MessageWork)
                self._journal.detail(outcome)
                reply = self._reply(work, outcome)
                if watch is not None:
                    watch.look(wave[work.index], reply, outcome.reason)
                if reply is not None:
                    place = order[id(wave[work.index])]
                    replies.append((work.client, place, reply))
        if watch is not None:
            watch.end_of_call()
        return [reply for _, _, reply in sorted(replies, key=lambda item: item[:2])]

    def _work(
        self, index: int, message: Message, contents: dict[int, bytes], limit_s: float | None
    ) -> MessageWork:
        """One message as a piece of work; contents that messages share are packed once."""
        self._numbering.check(message)
        self._numbering.number(message)
        content = message.content
        if id(content) not in contents:
            contents[id(content)] = packed(content)
        client = internals.client_of(message.metadata.dst_node_id)
        state = self.contexts.get(client, b"")
        return MessageWork(index, message.metadata, contents[id(content)], client, state, limit_s)

    def _reply(self, work: MessageWork, outcome: WorkOutcome) -> Message | None:
        metadata = internals.reply_metadata(
            work.metadata, message_id=self._numbering.fresh(), created_at=time.time()
        )
        reason = f"client {work.client}: {outcome.reason}"
        if outcome.fault is not None:
            self._journal.incidents.append(reason)
        if outcome.fault == "late":
            return None
        if outcome.fault is not None:
            code = 2 if outcome.fault == "raised" else 8
            return internals.message_with(metadata, error=Error(code, reason))
        answer, state = outcome.value
        if state:
            self.contexts[work.client] = state
        else:
            self.contexts.pop(work.client, None)
        if isinstance(answer, Error):
            return internals.message_with(metadata, error=answer)
        return internals.message_with(metadata, content=answer)


def _waves(batch: Sequence[Message]) -> list[list[Message]]:
    """Split messages so that no client has two in the same wave."""
    waves: list[list[Message]] = []
    seen: dict[int, int] = {}
    for message in batch:
        node = message.metadata.dst_node_id
        turn = seen.get(node, 0)
        seen[node] = turn + 1
        if turn == len(waves):
            waves.append([])
        waves[turn].append(message)
    return waves
