"""What of a client's reply is sent in few bytes: compressed updates. Needs torch and NumPy alone.

A part of local training that changes the reply is a `CompressingPart`. After a chunk is trained
the executor asks it, client by client, what to send in place of the model. Who trains where, beside
whom, and by which executor changes nothing about it.
"""

import abc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.basics.rng import generator
from fedsim.client.job import ChunkJob, ChunkResult
from fedsim.client.part import ClientPart
from fedsim.client.procedure import Compression
from fedsim.messages.layout import Layout


class Outcome(NamedTuple):
    """What a client's training came to, before it is compressed.

    Attributes:
        server_round: The round.
        received: The model that it started from, `[dim]`.
        trained: The model that it ended with, `[dim]`.
        kept: What the part keeps for the client, vectors `[dim]` and numbers by name.
        sent: What the strategy sent the client besides the model.
        draw: Random numbers of this client in this round.
    """

    server_round: int
    received: Tensor
    trained: Tensor
    kept: Mapping[str, Tensor]
    sent: Mapping[str, Tensor]
    draw: np.random.Generator


class Compressed(NamedTuple):
    """What a client sends and keeps.

    Attributes:
        base: What `encoded` is written against: "model", the one received, or "memory", which the
            strategy has of every client.
        encoded: What a codec wrote.
        params: The model that the server reads from it, `[dim]`.
        kept: What the part keeps, as `Outcome.kept`.
    """

    base: str
    encoded: Mapping[str, Tensor]
    params: Tensor
    kept: Mapping[str, Tensor]


class CompressingPart(ClientPart, abc.ABC):
    """A part that compresses the reply; it changes nothing about training itself.

    Vectors that it keeps are, in `initial_state`, one tensor for each of the model's, called
    `VECTOR.TENSOR`; numbers are called by their name alone.
    """

    stacks = True
    compresses = True

    @property
    def strength(self) -> float:
        """0: steps are plain ones."""
        return 0.0

    @abc.abstractmethod
    def compressed(self, outcome: Outcome) -> Compressed:
        """Return what the client sends and keeps."""


def compress(
    layout: Layout, job: ChunkJob, result: ChunkResult, *, part: Compression, seed: int
) -> ChunkResult:
    """Return the members' results with compressed replies.

    Members that do not take part keep what they had.

    Args:
        layout: Of the model that travels.
        job: The chunk.
        result: What its members return; `params` `[C, dim]` is changed in place.
        part: The part that compresses.
        seed: Of its random numbers.
    """
    assert result.params is not None
    if not layout.dim:
        return result  # all is personal: nothing travels
    of, rows = f"{type(part).__name__}/", range(len(result.num_examples))
    state = {name: stack.clone() for name, stack in result.state.items()}
    encoded: list[dict[str, Tensor]] = []
    for row in rows:
        received = job.shared.params if job.personal.params is None else job.personal.params[row]
        assert received is not None
        mine = {n.removeprefix(of): t[row].cpu() for n, t in state.items() if n.startswith(of)}
        own = {name: stack[row] for name, stack in job.personal.extra.items()}
        made = part.compressed(
            Outcome(
                job.round_of(row),
                received.cpu(),
                result.params[row],
                _as_vectors(layout, mine),
                {**job.shared.extra, **own},
                generator(seed, "compression", job.round_of(row), job.client_ids[row]),
            )
        )
        encoded.append({f"{made.base}.{name}": tensor for name, tensor in made.encoded.items()})
        result.params[row].copy_(made.params)
        if not job.absent[row]:
            for name, tensor in _as_tensors(layout, made.kept).items():
                state[of + name][row] = tensor
    stacked = {name: torch.stack([each[name] for each in encoded]) for name in encoded[0]}
    return replace(result, state=state, encoded=stacked)


def begins(params: Mapping[str, Tensor], *vectors: str) -> dict[str, Tensor]:
    """Return vectors of zeros as a compressing part keeps them before a client first trains.

    Example:
        >>> begins({"w": torch.ones(2)}, "error")
        {'error.w': tensor([0., 0.])}
    """
    return {f"{v}.{name}": torch.zeros_like(t) for v in vectors for name, t in params.items()}


def _as_vectors(layout: Layout, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {spec.name for spec in layout.trainable}
    vectors: dict[str, dict[str, Tensor]] = {}
    numbers: dict[str, Tensor] = {}
    for key, tensor in kept.items():
        vector, _, name = key.partition(".")
        if name in names:
            vectors.setdefault(vector, {})[name] = tensor
        elif not name:
            numbers[key] = tensor
    return numbers | {vector: layout.flatten(named) for vector, named in vectors.items()}


def _as_tensors(layout: Layout, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Tensor] = {}
    for key, tensor in kept.items():
        if tensor.dim() == 1 and len(tensor) == layout.dim and layout.dim:
            found |= {f"{key}.{name}": part for name, part in layout.unflatten(tensor).items()}
        else:
            found[key] = tensor
    return found
