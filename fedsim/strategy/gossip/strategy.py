"""Averaging without a server: every node keeps a model and mixes it with its neighbours'.

`GossipStrategy` holds all nodes' models and moves the messages; a strategy says what a node makes
of them, by the kernels of `fedsim.aggregators.averaging`.
"""

import abc
import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregators import Recipe, Round
from fedsim.aggregators.averaging import variance
from fedsim.aggregators.sums import weighted_sum
from fedsim.aggregators.updates import Updates
from fedsim.basics import rng
from fedsim.basics.errors import RunError, require_choice, require_positive
from fedsim.basics.idle import Idle, at
from fedsim.federation.topology.kinds import ring
from fedsim.federation.topology.mixing import Mixing, mixing_matrix, spectral_gap
from fedsim.federation.topology.topology import Neighbours, Topology
from fedsim.messages.layout import Payload, TensorSpec
from fedsim.messages.replies import Replies
from fedsim.strategy.base import FederatedStrategy
from fedsim.strategy.declarations import State

if TYPE_CHECKING:
    import networkx as nx

Protocol = Literal["synchronous", "buffered"]
Start = Literal["own", "shared"]
_GAP_NODES = 2000  # of larger graphs the spectral gap takes minutes


class GossipState(NamedTuple):
    """Every node, between two rounds.

    Attributes:
        tick: Rounds done.
        models: `[N, dim]`.
        buffers: By name `[N, ...]`; a node keeps its own, they are never averaged.
        start_variances: float64 `[N, matrices]`, of the tensors with two dimensions or more.
        trainings: int64 `[N]`, how often each node has trained.
        next_tick: int64 `[N]`, when each is due to train (buffered protocol).
        inbox: float64 `[N, dim + corrected + 1]`, summed over what each node has received since it
            last averaged: weight times (model, variances of the corrected tensors, 1). No rows in
            the synchronous protocol, where nothing waits.
        waiting: int64 `[N]`, how many models that are; likewise.
    """

    tick: int
    models: Tensor
    buffers: Mapping[str, Tensor]
    start_variances: Tensor
    trainings: Tensor
    next_tick: Tensor
    inbox: Tensor
    waiting: Tensor


class Mail(NamedTuple):
    """What a node averages with its own model.

    Attributes:
        mean: float64 `[dim]`, weighted mean of the received models.
        variances: float64 `[corrected]`, the same mean of their tensors' variances.
        self_weight: beta, what the own model weighs; the mail weighs the rest.
    """

    mean: Tensor
    variances: Tensor
    self_weight: float


class GossipStrategy(FederatedStrategy, abc.ABC):
    """Moves the models between nodes; a concrete strategy says how a node averages them.

    The model of a round, which Flower passes on and the server evaluates, is the mean of all nodes'
    models. Nobody trains it, and what a wrapper does to it is without effect.
    """

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("interval", "buffer_ratio"), at("protocol", "synchronous")),
    )

    def __init__(
        self,
        *,
        topology: Topology | None = None,
        self_weight: float = 0.5,
        mixing: Mixing = "uniform",
        protocol: Protocol = "synchronous",
        interval: tuple[int, int] = (8, 12),
        send_every: int = 1,
        buffer_ratio: float = 1.0,
        message_loss: float = 0.0,
        start: Start = "own",
        recipe: Recipe | None = None,
    ) -> None:
        require_choice("mixing", mixing, Mixing)
        require_choice("protocol", protocol, Protocol)
        require_choice("start", start, Start)
        for name, share in (("self_weight", self_weight), ("message_loss", message_loss)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} = {share!r}: must be in [0, 1]")
        if len(interval) != 2 or not 1 <= interval[0] <= interval[1]:
            raise ValueError(f"interval = {list(interval)}: must be [a, b] with 1 <= a <= b")
        if send_every < 1:
            raise ValueError(f"send_every = {send_every!r}: must be >= 1")
        require_positive("buffer_ratio", buffer_ratio)
        self._topology = ring() if topology is None else topology
        self._self_weight = self_weight
        self._mixing: Mixing = mixing
        self._buffered = protocol == "buffered"
        self._interval = interval
        self._send_every = send_every
        self._buffer_ratio = buffer_ratio
        self._message_loss = message_loss
        self._start: Start = start
        self._recipe = recipe
        if recipe is not None and recipe != Recipe("mean"):
            for key, value, needed in (
                ("protocol", protocol, "synchronous"), ("mixing", mixing, "uniform")
            ):  # fmt: skip
                if value != needed:
                    raise ValueError(
                        f"{key} = {value!r} with rule = {recipe.rule!r}: a robust rule needs all "
                        f"models by themselves, alike; use {key} = {needed!r}"
                    )
        else:
            self._recipe = None

    @abc.abstractmethod
    def merge(self, own: Tensor, variances: Tensor, mail: Mail) -> Tensor:
        """Return a node's next model, float64 `[dim]`.

        Args:
            own: Its model, float64 `[dim]`.
            variances: float64 `[corrected]`, of its own tensors.
            mail: What it received.
        """

    def corrected(self) -> Sequence[TensorSpec]:
        """Return the tensors whose variances a node wants to know; by default none."""
        return ()

    def check(self, clients: int, cohort: int) -> None:
        """Refuse an f that a node's model and its neighbours' do not bear."""
        if self._recipe is None:
            return
        neighbours = self._topology.neighbours(clients, server_round=1, seed=self.seed)
        fewest = min(range(clients), key=lambda node: len(neighbours[node]))
        try:
            self._recipe.check(len(neighbours[fewest]) + 1)
        except ValueError as error:
            raise ValueError(
                f"{error}; node {fewest} has {len(neighbours[fewest])} neighbours and itself"
            ) from None

    # --- what FederatedStrategy asks ------------------------------------------------------

    def init(self, params: Tensor, clients: int) -> State:
        """Every node starts from its own initialisation, or all from the common model."""
        self._topology.graph(clients, server_round=1, seed=self.seed)  # refused before round 1
        models = torch.stack([self._first_model(params, node) for node in range(clients)])
        variances = [_variances(model, self._parts(self._matrices())) for model in models]
        rows = clients if self._buffered else 0
        return GossipState(
            tick=0,
            models=models,
            buffers={
                name: tensor.expand(clients, *tensor.shape).clone()
                for name, tensor in self.initial_buffers.items()
            },
            start_variances=torch.stack(variances),
            trainings=torch.zeros(clients, dtype=torch.int64),
            next_tick=torch.ones(clients, dtype=torch.int64),
            inbox=torch.zeros((rows, len(params) + len(self.corrected()) + 1), dtype=torch.float64),
            waiting=torch.zeros(rows, dtype=torch.int64),
        )

    def broadcast(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Every node goes on from its own model."""
        rows = torch.tensor(cohort, dtype=torch.int64)
        buffers = {name: stack[rows] for name, stack in state.buffers.items()}
        return Payload(), Payload(state.models[rows], buffers)

    def evaluated(
        self, state: State, params: Tensor, cohort: np.ndarray
    ) -> tuple[Payload, Payload]:
        """Every node evaluates its own model."""
        return self.broadcast(state, params, cohort)

    def select(self, state: State, cohort: np.ndarray) -> np.ndarray:
        """Those who are due to train; everybody in the synchronous protocol.

        Raises:
            RunError: If a node was not there in round 1.
        """
        late = cohort[cohort >= len(state.models)]
        if len(late):
            raise RunError(
                f"round {state.tick + 1}: client {late[0]} joined after round 1, and the graph has "
                f"{len(state.models)} nodes; start when all nodes are there"
            )
        due: np.ndarray = cohort[self._is_due(state)[cohort]]
        return due

    def personal_models(self, state: State) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """Every node's model."""
        return state.models, state.buffers

    def server_update(
        self, state: State, params: Tensor, replies: Replies
    ) -> tuple[Tensor, State, dict[str, float]]:
        """Let the nodes that are online send, receive and average.

        All of them average the others' models from before anybody has.
        """
        online = self._online_nodes(state, replies)
        state = self._trained(state, replies)
        nodes = len(state.models)
        clock = {"server_round": state.tick, "seed": self.seed}
        neighbours = self._topology.neighbours(nodes, **clock)
        arrived, lost = self._delivered(state, neighbours, replies.client_ids, online)
        state, averaged = self._averaged(state, neighbours, arrived)
        first = state.models[0]
        honest = torch.ones(nodes)
        honest[sorted(self.dishonest)] = 0
        mean = first.double() + weighted_sum(honest, state.models, first) / float(honest.sum())
        sent = lost + sum(map(len, arrived.values()))
        metrics = {
            **self._metrics(state, mean),
            "messages": float(sent),
            "messages_lost": float(lost),
            "message_bytes": float(sent * state.models[0].nbytes),
        }
        if nodes <= _GAP_NODES:
            graph = self._topology.graph(nodes, **clock)
            metrics["spectral_gap"] = _gap(graph, self._mixing, self._self_weight)
        if self._buffered or self._recipe is not None:
            metrics["averaged"] = float(averaged)
        if self._recipe is not None:
            metrics["nodes_beyond_f"] = float(self._beyond(arrived, state.tick))
        return mean.to(params.dtype), state, metrics

    # --- one round ------------------------------------------------------------------------

    def _first_model(self, params: Tensor, node: int) -> Tensor:
        """A node's model before round 1.

        Its own initialisation, where none is declared, is the common model with the entries of
        every tensor permuted: of the same mean and variance, and not correlated.
        """
        if self._start == "shared":
            return params
        if (own := self.start_of(node)) is not None:
            return own.to(params)
        generator = rng.generator(self.seed, "own start", node)
        permuted = torch.empty_like(params)
        for part in self.layout.slices.values():
            order = generator.permutation(part.stop - part.start)
            permuted[part] = params[part][torch.from_numpy(order)]
        return permuted

    def _is_due(self, state: GossipState) -> np.ndarray:
        if not self._buffered:
            return np.ones(len(state.models), dtype=bool)
        due: np.ndarray = (state.next_tick <= state.tick + 1).numpy()
        return due

    def _online_nodes(self, state: GossipState, replies: Replies) -> list[int]:
        """Who replied, and who takes part without being due."""
        everyone = np.arange(len(state.models))
        online = everyone if self.participants is None else self.participants
        idle = online[~self._is_due(state)[online]]
        return sorted({*idle.tolist(), *replies.client_ids.tolist()})

    def _trained(self, state: GossipState, replies: Replies) -> GossipState:
        """The State after training, one tick later."""
        tick, trained = state.tick + 1, torch.tensor(replies.client_ids, dtype=torch.int64)
        models, trainings = state.models.clone(), state.trainings.clone()
        next_tick = state.next_tick.clone()
        buffers = {name: stack.clone() for name, stack in state.buffers.items()}
        assert replies.params is not None
        models[trained] = replies.params
        for name, stack in replies.buffers.items():
            buffers[name][trained] = stack
        trainings[trained] += 1
        for node in trained.tolist() if self._buffered else ():
            draw = rng.generator(self.seed, "training interval", tick, node)
            next_tick[node] = tick + int(draw.integers(self._interval[0], self._interval[1] + 1))
        return state._replace(
            tick=tick, models=models, buffers=buffers, trainings=trainings, next_tick=next_tick
        )

    def _delivered(
        self, state: GossipState, neighbours: Neighbours, trained: np.ndarray, online: list[int]
    ) -> tuple[dict[int, list[int]], int]:
        """For each node online the senders of what it received, and how many messages were lost."""
        arrived: dict[int, list[int]] = {node: [] for node in online}
        lost = 0
        for sender in trained.tolist():
            if state.trainings[sender] % self._send_every:
                continue
            passes = np.full(len(neighbours[sender]), bool(state.models[sender].isfinite().all()))
            if self._message_loss:
                draw = rng.generator(self.seed, "message loss", state.tick, sender)
                passes &= draw.random(len(passes)) >= self._message_loss
            for receiver, through in zip(neighbours[sender].tolist(), passes, strict=True):
                if receiver in arrived and through:
                    arrived[receiver].append(sender)
                elif receiver in arrived:
                    lost += 1
        return arrived, lost

    def _averaged(
        self, state: GossipState, neighbours: Neighbours, arrived: Mapping[int, list[int]]
    ) -> tuple[GossipState, int]:
        """The State after those with enough mail have averaged it, and how many they were."""
        before, parts = state.models, self._parts(self.corrected())
        variances = {node: _variances(before[node], parts) for node in arrived}
        models, inbox, waiting = before.clone(), state.inbox.clone(), state.waiting.clone()
        dim, one, averaged = before.shape[1], torch.ones(1, dtype=torch.float64), 0
        sent = {
            sender: torch.cat([before[sender].double(), variances[sender], one])
            for sender in sorted({sender for senders in arrived.values() for sender in senders})
        }
        for node, senders in arrived.items():
            mail, count = torch.zeros(inbox.shape[1], dtype=torch.float64), len(senders)
            if senders:
                weights = [self._weight(neighbours, node, s) for s in senders]
                shares = torch.tensor(weights, dtype=torch.float64)
                mail = weighted_sum(shares, torch.stack([sent[s] for s in senders]), mail)
            if self._buffered:
                mail, count = mail + inbox[node], count + int(waiting[node])
                full = count >= self._buffer_ratio * len(neighbours[node])
                inbox[node], waiting[node] = (0, 0) if full else (mail, count)
                if not full:
                    continue
            if self._recipe is not None:
                merged = self._robust(before, node, senders, state.tick)
                if merged is not None:
                    models[node] = merged.to(models.dtype)
                    averaged += 1
            elif count:
                mean, own_weight = mail / mail[-1], self._own_weight(neighbours, node, mail[-1])
                own = before[node].double()
                letter = Mail(mean[:dim], mean[dim:-1], own_weight)
                models[node] = self.merge(own, variances[node], letter).to(models.dtype)
                averaged += 1
        return state._replace(models=models, inbox=inbox, waiting=waiting), averaged

    def _robust(
        self, before: Tensor, node: int, senders: Sequence[int], tick: int
    ) -> Tensor | None:
        """A node's next model by its robust rule, from its own model and those received.

        None when too few have arrived for its f: it keeps its own.
        """
        assert self._recipe is not None
        own = before[node]
        # as differences to its own, so that centred clipping begins there
        updates = Updates.of(before[sorted([node, *senders])], own)
        try:
            tolerated = self._recipe.check(len(updates))
        except ValueError:
            return None
        draw = rng.generator(self.seed, "buckets", tick, node)
        centre = torch.zeros(len(own), dtype=torch.float64)
        step = self._recipe.aggregate(updates, Round(tolerated, draw, centre))
        return own.double() + (1 - self._self_weight) * step

    def _beyond(self, arrived: Mapping[int, list[int]], tick: int) -> int:
        """How many honest nodes heard more attackers than their rule bears."""
        assert self._recipe is not None
        count, attacking = 0, self.attacking(tick)
        for node, senders in arrived.items():
            attackers = len(attacking & set(senders))
            if node in self.dishonest or not attackers:
                continue
            with contextlib.suppress(ValueError):  # too few: it keeps its own model
                count += attackers > self._recipe.check(len(senders) + 1)
        return count

    def _weight(self, neighbours: Neighbours, node: int, other: int) -> float:
        """What a message weighs among the received: all alike, or as Metropolis and Hastings."""
        if self._mixing == "uniform":
            return 1.0
        return 1 / (1 + max(len(neighbours[node]), len(neighbours[other])))

    def _own_weight(self, neighbours: Neighbours, node: int, received: Tensor) -> float:
        """What the own model weighs; Metropolis-Hastings leaves it what did not arrive."""
        if self._mixing == "uniform":
            return self._self_weight
        whole = sum(self._weight(neighbours, node, other) for other in neighbours[node].tolist())
        return 1 - min(whole, float(received))

    # --- diagnostics ----------------------------------------------------------------------

    def _metrics(self, state: GossipState, mean: Tensor) -> dict[str, float]:
        squares = [
            float((model.double() - mean).square().sum())
            for node, model in enumerate(state.models)
            if node not in self.dishonest
        ]
        found = {"consensus_distance": math.sqrt(math.fsum(squares) / len(squares))}
        specs = self._matrices()
        now = torch.stack([_variances(model, self._parts(specs)) for model in state.models])
        for place, spec in enumerate(specs):
            before = state.start_variances[:, place]
            if (before > 0).any():
                ratios = now[before > 0, place] / before[before > 0]
                found[f"variance_ratio/{spec.name}"] = float(ratios.mean())
        return found

    def _matrices(self) -> list[TensorSpec]:
        return [spec for spec in self.layout.trainable if len(spec.shape) >= 2]

    def _parts(self, specs: Sequence[TensorSpec]) -> list[slice]:
        return [self.layout.slices[spec.name] for spec in specs]


def _variances(model: Tensor, parts: Sequence[slice]) -> Tensor:
    """The variance of each part of a flat model, float64 `[parts]`."""
    return torch.tensor([float(variance(model[part])) for part in parts], dtype=torch.float64)


@functools.lru_cache(maxsize=8)
def _gap(graph: "nx.Graph", mixing: Mixing, self_weight: float) -> float:
    """The spectral gap of the graph's mixing matrix."""
    matrix = mixing_matrix(graph, mixing=mixing, self_weight=self_weight)
    # both kinds are reversible, D W symmetric for a diagonal D, hence similar to this matrix, whose
    # eigenvalues are cheaper
    return spectral_gap(np.sqrt(matrix * matrix.T))
