"""What clients with jobs under way were sent: by round, and only while one of them needs it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.federation.clock.timetable import Job
from fedsim.messages.cohort import Cohort, parted
from fedsim.messages.layout import Layout, Payload

_BYTES = "bytes"


class Instructions:
    """The instructions that jobs under way began with, by round."""

    def __init__(self) -> None:
        self._sent: dict[int, Cohort] = {}

    def __len__(self) -> int:
        """Rounds of which instructions are kept."""
        return len(self._sent)

    def keep(self, cohort: Cohort, clients: list[int]) -> None:
        """Keep what clients were sent in a round.

        Args:
            cohort: The round's instructions.
            clients: Those who begin a job with them, in ascending order.
        """
        if clients:
            self._sent[cohort.server_round] = _some(cohort, clients)

    def forget(self, outstanding: Iterable[Job]) -> None:
        """Keep what these jobs need, and nothing else."""
        needed = {job.server_round for job in outstanding}
        for server_round in self._sent.keys() - needed:
            del self._sent[server_round]

    def due(self, server_round: int, jobs: Sequence[Job], *, is_ahead: bool = False) -> Cohort:
        """Return the instructions of jobs, as one cohort.

        Every client gets what it was sent when its job began. Where all began in one round, what
        they share stays shared.

        Args:
            server_round: The round in which they are delivered.
            jobs: At least one.
            is_ahead: Whether they are, or might have been, trained before they are wanted.
        """
        jobs = sorted(jobs, key=lambda job: job.client)
        begun = [job.server_round for job in jobs]
        alone = self._sent[begun[0]] if len(set(begun)) == 1 else None
        if alone is not None:
            made = _some(alone, [job.client for job in jobs])
        else:
            made = self._joined(jobs)
        changes: dict[str, Any] = {"is_ahead": True} if is_ahead else {}
        if any(each != server_round for each in begun):
            changes |= {"server_round": server_round, "rounds": np.array(begun, dtype=np.int64)}
        if any(job.work < 1 for job in jobs):
            changes["work"] = np.array([job.work for job in jobs])
        if any(job.drops for job in jobs):
            changes["absent"] = np.array([job.drops for job in jobs], dtype=bool)
        return made.altered(**changes) if changes else made

    def _joined(self, jobs: Sequence[Job]) -> Cohort:
        """One cohort of jobs that began in several rounds: each client has rows of its own."""
        cohorts = [self._sent[job.server_round] for job in jobs]
        places = [_place(sent, job.client) for sent, job in zip(cohorts, jobs, strict=True)]
        first, pairs = cohorts[0], list(zip(cohorts, places, strict=True))
        rows = [_row(sent, place) for sent, place in pairs]
        settings = [_settings(sent, place) for sent, place in pairs]
        config, own = parted(settings)
        return Cohort(
            client_ids=np.array([job.client for job in jobs], dtype=np.int64),
            server_round=first.server_round,
            layout=first.layout,
            shared=Payload(),
            personal=Payload(
                torch.stack([row.params for row in rows if row.params is not None]),
                {n: torch.stack([row.buffers[n] for row in rows]) for n in rows[0].buffers},
                {n: torch.stack([row.extra[n] for row in rows]) for n in rows[0].extra},
            ),
            config=config,
            own=own,
            message_type=first.message_type,
            node_ids=None
            if first.node_ids is None
            else np.array([sent.nodes[place] for sent, place in pairs]),
            ttl=first.ttl,
            group=first.group,
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return (plain values, tensors) for a checkpoint."""
        plain: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for server_round, sent in self._sent.items():
            key = str(server_round)
            nodes = None if sent.node_ids is None else [int(node) for node in sent.node_ids]
            plain[key] = {
                "clients": sent.client_ids.tolist(),
                "config": _plain(sent.config),
                "own": None if sent.own is None else [_plain(each) for each in sent.own],
                "message_type": sent.message_type,
                "ttl": sent.ttl,
                "group": sent.group,
                "nodes": nodes,
            }
            for who, payload in (("shared", sent.shared), ("personal", sent.personal)):
                if payload.params is not None:
                    tensors[f"{key}/{who}/params"] = payload.params
                for kind in ("buffers", "extra"):
                    for name, tensor in getattr(payload, kind).items():
                        tensors[f"{key}/{who}/{kind}/{name}"] = tensor
        return plain, tensors

    def restore(
        self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: Layout
    ) -> None:
        """Take back what `state` returned.

        Args:
            plain: Its plain values.
            tensors: Its tensors.
            layout: How the model's tensors lie.
        """
        self._sent = {}
        for key, sent in plain.items():
            nodes = sent["nodes"]
            self._sent[int(key)] = Cohort(
                client_ids=np.array(sent["clients"], dtype=np.int64),
                server_round=int(key),
                layout=layout,
                shared=_payload(tensors, f"{key}/shared/"),
                personal=_payload(tensors, f"{key}/personal/"),
                config=_read(sent["config"]),
                own=None if sent["own"] is None else tuple(_read(each) for each in sent["own"]),
                message_type=sent["message_type"],
                ttl=sent["ttl"],
                group=sent["group"],
                node_ids=None if nodes is None else np.array(nodes, dtype=np.uint64),
            )


def _place(sent: Cohort, client: int) -> int:
    return int(np.searchsorted(sent.client_ids, client))


def _some(sent: Cohort, clients: list[int]) -> Cohort:
    """Some clients' part of a cohort; the cohort itself where that is all of it."""
    if clients == sent.client_ids.tolist():
        return sent
    places = [_place(sent, client) for client in clients]
    return sent.altered(
        client_ids=sent.client_ids[places],
        personal=sent.personal.rows(places),
        own=None if sent.own is None else tuple(sent.own[place] for place in places),
        node_ids=None if sent.node_ids is None else sent.node_ids[places],
    )


def _row(sent: Cohort, place: int) -> Payload:
    """What one client received, without a leading axis."""
    shared, mine = sent.shared, sent.personal
    return Payload(
        shared.params if mine.params is None else mine.params[place],
        {**shared.buffers, **{n: t[place] for n, t in mine.buffers.items()}},
        {**shared.extra, **{n: t[place] for n, t in mine.extra.items()}},
    )


def _settings(sent: Cohort, place: int) -> Mapping[str, Any]:
    return sent.config if sent.own is None else {**sent.config, **sent.own[place]}


def _payload(tensors: Mapping[str, Tensor], prefix: str) -> Payload:
    mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    def of(kind: str) -> dict[str, Tensor]:
        return {n.removeprefix(kind): t for n, t in mine.items() if n.startswith(kind)}

    return Payload(mine.get("params"), of("buffers/"), of("extra/"))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them: bytes as text."""
    return {k: {_BYTES: v.hex()} if isinstance(v, bytes) else v for k, v in config.items()}


def _read(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {k: bytes.fromhex(v[_BYTES]) if isinstance(v, dict) else v for k, v in plain.items()}
