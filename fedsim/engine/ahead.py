"""Work that is done before its reply is wanted: jobs under way on a virtual clock, in one batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.chunks import Done, absences
from fedsim.engine.client_states import ClientStore
from fedsim.messages.cohort import Cohort
from fedsim.messages.failures import Failure
from fedsim.messages.replies import Replies

Key = tuple[int, int]  # a client, and the round in which its work begins
UnderWay = Callable[[frozenset[Key]], Cohort]


class TrainedCohort(NamedTuple):
    """What came of a cohort's training, before anything of it is kept.

    Attributes:
        replies: Of those who answered, and who failed.
        results: The chunks' results, by the places of their members.
    """

    replies: Replies
    results: Done


class _Finished(NamedTuple):
    """One client's finished work.

    Attributes:
        reply: Its reply alone; None if it failed.
        failures: What is known of it otherwise.
        state: Its new state, rows of one client; empty without any.
    """

    reply: Replies | None
    failures: tuple[Failure, ...]
    state: Mapping[str, Tensor]


class Ahead:
    """Answers cohorts of a virtual clock, and trains with them what is wanted later.

    Every job under way is trained at the first time that some job is wanted that is not trained
    yet. What is kept for each is its own reply, so memory grows with the jobs under way. A client's
    state is kept when its reply is wanted, not before: until then it is that of a client at work.

    Args:
        under_way: Returns the instructions of all jobs under way, and of those that are wanted,
            but for some that are named.
    """

    def __init__(self, under_way: UnderWay) -> None:
        self._under_way = under_way
        self._finished: dict[Key, _Finished] = {}

    def answered(
        self, cohort: Cohort, train: Callable[[Cohort], TrainedCohort], store: ClientStore
    ) -> Replies:
        """Return the replies to a cohort; the new states of those who answered are kept.

        Args:
            cohort: Who is wanted now.
            train: Trains a cohort.
            store: The clients' states.
        """
        absent = absences(cohort)
        wanted = [
            (client, cohort.round_of(place))
            for place, client in enumerate(cohort.client_ids.tolist())
            if client not in absent
        ]
        if any(key not in self._finished for key in wanted):
            batch = self._under_way(frozenset(self._finished))
            asked = set(zip(batch.client_ids.tolist(), _rounds(batch), strict=True))
            if not asked.issuperset(key for key in wanted if key not in self._finished):
                batch = cohort.altered(is_ahead=True)  # asked again after a failure
            self._take(batch, train(batch))
        parts = [self._finished.pop(key) for key in wanted]
        failures = {f.client_id: f for part in parts for f in part.failures} | absent
        for key, part in zip(wanted, parts, strict=True):
            if part.reply is not None and part.state and part.reply.admit().num_clients:
                store.commit([key[0]], part.state)
        return _joined(
            cohort, [part.reply for part in parts if part.reply is not None],
            [failures[client] for client in sorted(failures)],
        )  # fmt: skip

    def forget(self) -> None:
        """Forget all that is finished, for a run that begins elsewhere."""
        self._finished.clear()

    def _take(self, batch: Cohort, trained: TrainedCohort) -> None:
        rounds = dict(zip(batch.client_ids.tolist(), _rounds(batch), strict=True))
        failures: dict[int, list[Failure]] = {}
        for failure in trained.replies.failures:
            failures.setdefault(failure.client_id, []).append(failure)
        states: dict[int, Mapping[str, Tensor]] = {}
        for places, result in trained.results.items():
            if result.state:
                for row, client in enumerate(batch.client_ids[list(places)].tolist()):
                    states[client] = {
                        name: rows[row : row + 1].clone() for name, rows in result.state.items()
                    }
        replied = trained.replies.client_ids.tolist()
        for row, client in enumerate(replied):
            alone = _alone(trained.replies, row)
            own = tuple(failures.pop(client, ()))
            self._finished[client, rounds[client]] = _Finished(alone, own, states.get(client, {}))
        for client, known in failures.items():
            self._finished[client, rounds[client]] = _Finished(None, tuple(known), {})


def _rounds(cohort: Cohort) -> Sequence[int]:
    if cohort.rounds is None:
        return [cohort.server_round] * len(cohort)
    rounds: list[int] = cohort.rounds.tolist()
    return rounds


def _alone(replies: Replies, row: int) -> Replies:
    """One client's reply, in memory of its own."""
    span = slice(row, row + 1)

    def cut(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: rows[span].clone() for name, rows in named.items()}

    reference = replies.reference
    if reference is not None and reference.dim() == 2:
        reference = reference[span].clone()
    return replace(
        replies,
        client_ids=replies.client_ids[span],
        params=None if replies.params is None else replies.params[span].clone(),
        reference=reference,
        buffers=cut(replies.buffers),
        extra=cut(replies.extra),
        encoded=cut(replies.encoded),
        num_examples=replies.num_examples[span],
        metrics=cut(replies.metrics),
        staleness=replies.staleness[span],
        failures=(),
        _built={},
        _instructions={},
    )


def _joined(cohort: Cohort, parts: list[Replies], failures: list[Failure]) -> Replies:
    """The replies of several clients, in client order, to one cohort."""
    if not parts:
        return Replies.empty(cohort, failures)
    first = parts[0]

    def join(named: str) -> dict[str, Tensor]:
        if len(parts) == 1:
            return dict(getattr(first, named))
        return {
            name: torch.cat([getattr(part, named)[name] for part in parts])
            for name in getattr(first, named)
        }

    references = [part.reference for part in parts if part.reference is not None]
    shared = references[0].dim() == 1 and all(each is references[0] for each in references)
    dim = references[0].shape[-1]
    return replace(
        first,
        server_round=cohort.server_round,
        client_ids=np.concatenate([part.client_ids for part in parts]),
        params=torch.cat([part.params for part in parts if part.params is not None]),
        reference=references[0] if shared else torch.cat([r.reshape(1, dim) for r in references]),
        buffers=join("buffers"),
        extra=join("extra"),
        encoded=join("encoded"),
        num_examples=torch.cat([part.num_examples for part in parts]),
        metrics=join("metrics"),
        staleness=torch.cat([part.staleness for part in parts]),
        failures=tuple(failures),
        ttl=cohort.ttl,
        group=cohort.group,
    )
